"""export(): the whole road in one function. Read this file first.

load -> calibrate -> score -> plan -> write; everything that can fail cheaply fails before anything expensive
starts.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from mone_export.artifacts import Calibration, Corpus, MoeSpec, Plan, Report
from mone_export.calibration import calibrate
from mone_export.corpus import read_corpus
from mone_export.errors import MoneError
from mone_export.model import (
    Dtype,
    fingerprint,
    inspect,
    load,
    load_tokenizer,
    open_weights,
    resolve,
    resolve_device,
)
from mone_export.novices import NOVICES
from mone_export.planning import kept_per_layer, plan, plan_without_scores
from mone_export.runtime import Progress
from mone_export.scoring import SCORE_NAMES
from mone_export.scoring import score as score_experts
from mone_export.writing import OUTTYPES, check_output, measure, write

log = logging.getLogger(__name__)

_BUILTIN_TEXT = (
    "calibrating on the built-in text, mostly Python code and technical English; "
    "for other uses pass text like yours: -f FILE"
)


def export(
    model: str,
    *,
    ratio: float,
    outfile: Path,
    outtype: str = "auto",
    files: Sequence[Path] = (),
    n_row: int = 100,
    seq_len: int = 2048,
    score: str = "mone",
    novice: str = "mean",
    min_kept: int | None = None,
    stats: Path | None = None,
    device: str = "auto",
    dtype: Dtype = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Prune `ratio` of a model's experts, replace them by novices and write the result as a GGUF.

    `model` is a folder, a Hugging Face id or `demo`. `stats` names a file to keep the calibration in, or to
    take it from when it exists. Every failure is a `MoneError` and leaves no file behind.
    """
    clock = _Clock()
    path = resolve(model)
    spec = inspect(path)
    device = resolve_device(device)
    if stats is not None and not stats.exists():
        check_output(stats, option="--stats")
    tokenizer = load_tokenizer(path)
    size_unpruned, _ = announce(
        path,
        spec,
        ratio=ratio,
        min_kept=min_kept,
        score=score,
        novice=novice,
        outfile=outfile,
        outtype=outtype,
    )
    corpus = read_corpus(files, tokenizer, n_row=n_row, seq_len=seq_len)
    clock.lap("checks")
    model_sha256 = fingerprint(path, progress=progress)
    clock.lap("fingerprint")
    calibration = _reuse(stats, model_sha256, corpus)
    if calibration is None:
        if not files:
            log.info(_BUILTIN_TEXT)
        loaded = load(path, device=device, dtype=dtype)
        clock.lap("load")
        calibration = calibrate(loaded, corpus, model_sha256=model_sha256, progress=progress)
        del loaded  # its memory is free for the writing
        if stats is not None:
            calibration.save(stats)
        clock.lap("calibrate")
    chosen = plan(score_experts(calibration, score, seed=seed), ratio=ratio, min_kept=min_kept)
    size = write(path, calibration, chosen, outfile, novice=novice, outtype=outtype, progress=progress)
    clock.lap("write")
    return Report(
        outfile=outfile,
        size=size,
        size_unpruned=size_unpruned,
        n_kept={layer.layer: len(layer.kept) for layer in chosen.layers},
        seconds=clock.seconds,
        remarks=_remarks(calibration, chosen),
    )


def announce(
    path: Path,
    spec: MoeSpec,
    *,
    ratio: float,
    min_kept: int | None,
    score: str,
    novice: str,
    outfile: Path,
    outtype: str,
) -> tuple[int, int]:
    """Check everything that needs no weights, and return the sizes in bytes: (unpruned file, pruned file).

    Raises `MoneError` for an unknown name, a bad ratio, an output that cannot be written, a model llama.cpp
    cannot convert, and too little disk for the file and its intermediate one together.
    """
    for what, name, known in (
        ("--score", score, SCORE_NAMES),
        ("--novice", novice, tuple(NOVICES)),
        ("--outtype", outtype, OUTTYPES),
    ):
        if name not in known:
            raise MoneError(f"unknown {what} {name}: choose from {', '.join(known)}")
    kept_per_layer(spec, ratio, min_kept=min_kept)
    check_output(outfile)
    open_weights(path)
    blank = plan_without_scores(spec, ratio=ratio, min_kept=min_kept, score=score)
    size, intermediate = measure(path, blank, novice=novice, outtype=outtype)
    size_unpruned, _ = measure(path, plan_without_scores(spec, ratio=0), outtype=outtype)
    temporary = f", and {intermediate / 1e6:.1f} MB beside it for a while" if intermediate else ""
    log.info("%s will have %.1f MB%s", outfile, size / 1e6, temporary)
    check_output(outfile, needed=size + intermediate)
    return size_unpruned, size


def _reuse(stats: Path | None, model_sha256: str, corpus: Corpus) -> Calibration | None:
    """Load saved statistics when there are some, and insist that they belong to this model and text."""
    if stats is None or not stats.exists():
        return None
    calibration = Calibration.load(stats)
    for what, found, wanted in (
        ("model", calibration.model_sha256, model_sha256),
        ("calibration text", calibration.corpus_sha256, corpus.sha256),
    ):
        if found != wanted:
            raise MoneError(
                f"{stats} was made from another {what} (SHA-256 {found[:16]}, this one is {wanted[:16]}): "
                "choose another --stats file, or the same model, text, --chunks and --ctx-size"
            )
    log.info("statistics of %d tokens taken from %s", calibration.n_token, stats)
    return calibration


def _remarks(calibration: Calibration, chosen: Plan) -> tuple[str, ...]:
    """Say what a user should know about the calibration: experts it never saw."""
    remarks = []
    for layer in chosen.layers:
        count = calibration.layers[layer.layer].count
        unseen = [expert for expert in range(len(count)) if count[expert] == 0]
        if unseen:
            kept = sum(expert in layer.kept for expert in unseen)
            remarks.append(
                f"layer {layer.layer}: {len(unseen)} experts never selected in {calibration.n_token} tokens "
                f"({kept} of them kept): {', '.join(map(str, unseen))}"
            )
    return tuple(remarks)


class _Clock:
    """Seconds per stage, in the order of the laps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
