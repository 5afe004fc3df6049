"""What --protect does for a text that the calibration hardly holds, and what it takes from the others.

The calibration is of one kind of text; a little of another, `unlike` or `rare` (`rare_text.py`), is
protected. Judged is held-out text of all three kinds. Two controls: nothing protected, and `mixed`, the
calibration with the same rows of the other text added to it and nothing protected, which costs as much.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from typing import Any

import numpy as np

from measuring import Json
from measuring.methods import (
    MODELS,
    SEQ_LEN,
    compare,
    log_probabilities,
    rare_rows,
    rows_of,
    thinned,
    trained,
)

WAYS = ("even", "sensitivity", "thin")
KINDS = ("unlike", "rare")


def measure_protect(args: argparse.Namespace) -> Json:
    """Measure each way to prune with and without protection, once for each calibration sample."""
    import torch

    torch.set_num_threads(args.threads)
    return {
        "settings": {
            "models": {
                name: dict(zip(("like", "unlike"), MODELS[name], strict=True)) for name in args.models
            },
            "ratio": args.ratio,
            "samples": args.samples,
            "calibration_tokens": args.rows * SEQ_LEN,
            "protected_tokens": [n_row * SEQ_LEN for n_row in args.protected_rows],
            "evaluation_tokens": args.eval_rows * SEQ_LEN,
        },
        "runs": [run for name in args.models for run in _runs_of(name, args)],
    }


def _runs_of(name: str, args: argparse.Namespace) -> Iterator[Json]:
    from mone_export.calibration.loading import load

    model = load(trained(name, minutes=args.minutes), device="cpu", dtype="float32")
    like, unlike = MODELS[name]
    texts = {
        "like": rows_of(model, "held-out", like, args.eval_rows),
        "unlike": rows_of(model, "held-out", unlike, args.eval_rows),
        "rare": rare_rows(model, args.eval_rows),
    }
    wanted = {text: log_probabilities(model.module, corpus.tokens) for text, corpus in texts.items()}
    for sample in range(args.samples):
        corpus = rows_of(model, "calibration", like, args.rows, first=sample, step=args.samples)
        longest = max(args.protected_rows)
        rare = {
            "unlike": rows_of(model, "calibration", unlike, longest, first=sample, step=args.samples),
            "rare": rare_rows(model, longest, seed=1 + sample),
        }
        for arm, module in _arms(model, corpus, rare, args):
            run = {"model": name, "sample": sample} | arm | compare(module, texts, wanted)
            print(run, file=sys.stderr, flush=True)
            yield run


def _arms(
    model: Any, corpus: Any, rare: Mapping[str, Any], args: argparse.Namespace
) -> Iterator[tuple[Json, Any]]:
    """Yield each arm, by `way`, `protected` text and its rows, `n` and whether it is `mixed`, pruned."""
    from mone_export.calibration.corpus import head
    from mone_export.pruning.protecting import most_needed

    prunings = Pruning(model, corpus, args.ratio)
    for way in args.ways:
        with prunings.pruned(way) as (module, _):
            yield {"way": way, "protected": "", "n": 0, "mixed": False}, module
    for kind, n_row in product(KINDS, args.protected_rows):
        text = head(rare[kind], n_row)
        calibration, mixed = _calibrated(model, text), Pruning(model, _joined(corpus, text), args.ratio)
        for way in args.ways:
            arm = {"way": way, "protected": kind, "protected_tokens": n_row * SEQ_LEN}
            for n in args.numbers:
                with prunings.pruned(way, most_needed(calibration, n)) as (module, n_saved):
                    yield arm | {"n": n, "mixed": False, "n_saved": n_saved}, module
            with mixed.pruned(way) as (module, _):
                yield arm | {"n": 0, "mixed": True}, module


class Pruning:
    """A model pruned after one calibration; super experts are not guarded."""

    def __init__(self, model: Any, corpus: Any, ratio: float) -> None:
        """Calibrate, the second pass included."""
        from mone_export.calibration.engines import engine_of
        from mone_export.deciding import fitted
        from mone_export.pruning.thinning import widths_of
        from mone_export.statistics import with_sensitivity

        self._model, self._ratio = model, ratio
        self._calibration = with_sensitivity(model, corpus, _calibrated(model, corpus))
        self._widths = widths_of(model.spec, 1)
        self._thinner = fitted(engine_of(model), corpus, self._widths)

    @contextmanager
    def pruned(self, way: str, protected: Any = None) -> Iterator[tuple[Any, int]]:
        """Yield the model with half of its experts gone, and how many stay that would not have."""
        from mone_export.calibration.masking import masked
        from mone_export.pruning.novices import novices
        from mone_export.pruning.protecting import protect, with_count
        from mone_export.pruning.scoring import score

        scores = score(self._calibration, "error", guarded=False)
        chosen, n_saved = self._plan(way, scores), 0
        if protected:
            free, chosen = chosen, self._plan(way, protect(scores, [protected]))
            n_saved = with_count(chosen, free).protected[0].n_saved
        if way == "thin":
            with thinned(self._model, self._calibration, self._thinner, chosen) as module:
                yield module, n_saved
            return
        vectors = {layer: novices(stats) for layer, stats in self._calibration.layers.items()}
        pruned = {layer.layer: layer.pruned for layer in chosen.layers}
        with masked(self._model.module, pruned, vectors):
            yield self._model.module, n_saved

    def _plan(self, way: str, scores: Any) -> Any:
        from mone_export.pruning.fates import plan_fates
        from mone_export.pruning.planning import plan
        from mone_export.recipe import Recipe

        if way != "thin":
            return plan(scores, recipe=Recipe.of(self._ratio, allocation=way, guarded=False))
        recipe = Recipe.of(self._ratio, novice="thin", guarded=False)
        return plan_fates(scores, self._thinner.errors, self._widths, recipe)


def _calibrated(model: Any, corpus: Any) -> Any:
    from mone_export.calibration.passes import calibrate

    return calibrate(model, corpus, model_sha256="")


def _joined(first: Any, second: Any) -> Any:
    """Return the rows of two texts as one."""
    from mone_export.artifacts import Corpus
    from mone_export.calibration.corpus import fingerprint_rows

    rows = np.concatenate([first.ids, second.ids])
    return Corpus(rows, f"{first.name}, {second.name}", fingerprint_rows(rows))
