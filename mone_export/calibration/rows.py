"""All layers for one batch of rows after the other: what every calibration of a model in memory shares.

Where the statistics so far are kept and found again, when enough rows have been seen, and what comes out.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from mone_export.artifacts import Calibration, Corpus, ExpertStats, Found, MoeSpec, Part, by_layer, by_matrix
from mone_export.calibration.work_folder import WorkFolder
from mone_export.errors import MoneError

SECONDS_PER_STEP = 60.0  # how much work a model in memory may lose

Layers = dict[Any, Any]
"""What observers of a model have found, by layer or matrix: replaced, never changed; earlier ones stay."""


def add_to(found: Layers, key: int | str, batch: Any) -> None:
    """Add what a batch has given to what was found before."""
    so_far = found.get(key)
    found[key] = so_far.merge(batch) if so_far else batch


def row_by_row(
    batches: Callable[[int], Iterable[range]],
    found: Layers,
    *,
    n_row: int,
    work: WorkFolder | None = None,
    report: Callable[[int, int], None] | None = None,
    stop: Callable[[Layers], bool] | None = None,
    device: torch.device | str = "cpu",
) -> int:
    """Run `n_row` rows, less those that `work` holds the statistics of, and return how many were run in all.

    `batches` runs the rows from a given one on; it yields those of a batch when `found` holds what was found
    in them, on `device`. `report` hears of the rows that are done, of how many; `stop` is asked after each
    batch whether `found` is enough.
    """
    done = 0
    if work and (steps := work.steps()):
        done = steps[-1]
        found |= {key: sums.to(device) for key, sums in work.load(done).items()}
    saved = time.monotonic()
    if report:
        report(done, n_row)
    for rows in batches(done):
        if report:
            report(rows.stop, n_row)
        if work and (rows.stop == n_row or time.monotonic() - saved >= SECONDS_PER_STEP):
            older = work.steps()
            work.save(rows.stop, {key: sums.to("cpu") for key, sums in found.items()})
            for step in older:
                work.forget(step)
            saved = time.monotonic()
        if stop and stop(found):
            return rows.stop
    return n_row


def stats_bytes(spec: MoeSpec) -> int:
    """Return how many bytes the statistics of all layers take, about, inputs of matrices among them."""
    of_expert = 3 * spec.hidden_size + 10 + spec.hidden_size + spec.expert_size
    return 8 * len(spec.moe_layers) * spec.n_expert * of_expert


def check_finite(layers: Mapping[int, ExpertStats], remedy: str) -> None:
    """Raise `MoneError` with a remedy where a layer's outputs were not finite."""
    for layer, stats in layers.items():
        if not torch.isfinite(stats.norm_sq_sum).all():
            raise MoneError(
                f"layer {layer}: expert outputs are not finite; the weights overflow in this precision: "
                f"{remedy}"
            )


def calibration_of(
    found: Found,
    corpus: Corpus,
    *,
    spec: MoeSpec,
    model_sha256: str,
    config: Mapping[str, Any],
    made_with: Mapping[str, str],
) -> Calibration:
    """Return what was found, with what it was measured on."""
    return Calibration(
        spec=spec,
        model_sha256=model_sha256,
        config=config,
        made_with=made_with,
        corpus_sha256=corpus.sha256,
        corpus_name=corpus.name,
        n_token=corpus.tokens.numel(),
        layers=by_layer(found),
        inputs=by_matrix(found),
        parts=(Part(corpus.sha256, corpus.sources or {corpus.name: corpus.tokens.numel()}),),
    )
