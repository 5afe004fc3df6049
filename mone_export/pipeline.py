"""export(): the whole road in one function. Read this file first.

prepare -> calibrate -> decide -> write; everything that can fail cheaply fails before anything expensive
starts (`request.prepare`).
"""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mone_export.artifacts import Calibration, Corpus, ExpertStats, Plan, Report, Stability
from mone_export.calibration import ranks
from mone_export.calibration.checkpoint import Checkpoint, begun
from mone_export.calibration.corpus import head
from mone_export.calibration.stability import Decide, Watch
from mone_export.calibration.usage import RARELY, rarely_seen
from mone_export.deciding import behind_pruned, decide, joint_vectors, settle, with_sensitivity
from mone_export.errors import MoneError
from mone_export.model import Dtype, Stream, fingerprint
from mone_export.output.writing import write
from mone_export.pruning.damage import mean_relative_error
from mone_export.pruning.guard import guard, super_experts
from mone_export.pruning.planning import plan
from mone_export.pruning.scoring import score as score_experts
from mone_export.request import NO_EARLY_END, Job, Request, prepare
from mone_export.runtime import Progress

log = logging.getLogger(__name__)

_BUILTIN_TEXT = (
    "calibrating on the built-in text, mostly Python code and technical English; "
    "for other uses pass text like yours: -f FILE"
)


def export(model: str, *, progress: Progress | None = None, **options: Any) -> Report | None:
    """Prune a model's experts, replace them by novices and write the result as a GGUF.

    `options` are those of `Request`: `outfile`, and `ratio` or `fit` must be among them. With `fit`, a size
    in bytes, the ratio and the type that do the least harm are chosen, unless given. Every failure is a
    `MoneError` and leaves no output behind; finished statistics stay. Of several processes that share the
    rows (torchrun) the first alone returns a report.
    """
    clock = _Clock()
    request = Request(model=model, **options)
    job = prepare(request, progress=progress)
    clock.lap("checks")
    with ranks.joined():
        model_sha256 = ranks.from_first(fingerprint(job.path, progress=progress) if ranks.rank() == 0 else "")
        clock.lap("fingerprint")
        job, checkpoint = _opened(job, model_sha256) if request.workdir else (job, None)
        if job.saved:
            calibration, stability = _saved(job, job.saved, model_sha256), None
        else:
            calibration, stability = _measured(job, model_sha256, checkpoint, clock, progress)
        if checkpoint is not None:
            checkpoint.clear()
    if ranks.rank() > 0:
        return None
    if job.candidates:
        job = settle(job, calibration)
        clock.lap("fit")
    chosen = decide(job, calibration, progress=progress)
    if job.spare is not None:
        clock.lap("search")
    if request.sequential:
        calibration = behind_pruned(job, calibration, chosen.n_kept, progress=progress)
        chosen = decide(job, calibration, counts=chosen.n_kept)
        clock.lap("layer by layer")
    vectors = None
    if request.novice == "joint" and request.method == "mone":
        vectors = joint_vectors(job, calibration, chosen, progress=progress)
        clock.lap("second pass")
    size = write(
        job.path,
        calibration,
        chosen,
        request.outfile,
        novice=request.novice,
        vectors=vectors,
        outtype=job.outtype,
        progress=progress,
    )
    clock.lap("write")
    return Report(
        outfile=request.outfile,
        size=size,
        size_unpruned=job.size_unpruned,
        n_kept=chosen.n_kept,
        parts=calibration.parts,
        stability=stability,
        seconds=clock.seconds,
        remarks=(*_unstable(stability, request.until_stable), *_remarks(calibration, chosen)),
        candidates=job.candidates,
    )


def _opened(job: Job, model_sha256: str) -> tuple[Job, Checkpoint]:
    """Open the work folder; what the job leaves to `auto` stays as it was when the folder was begun."""
    from mone_export.calibration.loading import choose

    request = job.request
    assert request.workdir is not None
    folder = request.workdir / f"rank-{ranks.rank()}"
    before: Mapping[str, Any] = begun(folder)
    dtype: Dtype = before.get("--dtype", "auto") if request.dtype == "auto" else request.dtype
    stream: Stream = before.get("--stream", "auto") if request.stream == "auto" else request.stream
    torch_dtype, streamed = choose(
        job.path, job.spec, device=job.device, dtype=dtype, stream=stream, memory=request.memory
    )
    text = job.corpus or job.saved
    work: dict[str, Any] = {
        "model": model_sha256,
        "text": text.sha256 if isinstance(text, Corpus) else text.corpus_sha256 if text else "",
        "--device": job.device.partition(":")[0],
        "--dtype": str(torch_dtype).removeprefix("torch."),
        "--stream": "on" if streamed else "off",
        "processes": ranks.n_rank(),
    }
    decided = replace(request, dtype=work["--dtype"], stream=work["--stream"])
    return replace(job, request=decided), Checkpoint(folder, work)


def _saved(job: Job, saved: Calibration, model_sha256: str) -> Calibration:
    """Return saved statistics that are of this model and text."""
    assert job.stats is not None
    corpus, request = job.corpus, job.request
    if corpus and request.until_stable:  # it may have ended early
        corpus = head(corpus, saved.n_token // request.seq_len)
    check_origin(job.stats, saved, model_sha256, corpus)
    return saved


def _measured(
    job: Job, model_sha256: str, checkpoint: Checkpoint | None, clock: "_Clock", progress: Progress | None
) -> tuple[Calibration, Stability | None]:
    """Calibrate; return the statistics, and how stable the decision became while they grew."""
    from mone_export.calibration.passes import calibrate  # here for the reason that `deciding` gives

    request = job.request
    assert job.corpus is not None
    if not (request.files or request.datasets):
        log.info(_BUILTIN_TEXT)
    loaded = job.load_model()
    clock.lap("load")
    if request.until_stable and loaded.files:
        raise MoneError(NO_EARLY_END)
    watch = _watch(job, job.corpus)
    calibration = calibrate(
        loaded,
        job.corpus,
        model_sha256=model_sha256,
        checkpoint=checkpoint,
        memory=request.memory,
        progress=progress,
        watch=watch,
    )
    if ranks.rank() == 0:
        corpus = head(job.corpus, calibration.n_token // request.seq_len)
        calibration = with_sensitivity(loaded, corpus, calibration, progress=progress)
        if job.stats is not None:
            calibration.save(job.stats)
    ranks.wait()
    clock.lap("calibrate")
    return calibration, watch.stability() if watch else None


def check_origin(stats: Path, calibration: Calibration, model_sha256: str, corpus: Corpus | None) -> None:
    """Insist that saved statistics belong to this model, and to this text if one is given; say which it was.

    Raises `MoneError` with both fingerprints.
    """
    text_sha256 = calibration.corpus_sha256
    for what, found, wanted in (
        ("model", calibration.model_sha256, model_sha256),
        ("calibration text", text_sha256, text_sha256 if corpus is None else corpus.sha256),
    ):
        if found != wanted:
            raise MoneError(
                f"{stats} was made from another {what} (SHA-256 {found[:16]}, this one is {wanted[:16]}): "
                "choose another --stats file, or the same model, text, --chunks and --ctx-size"
            )
    log.info("statistics of %d tokens of %s from %s", calibration.n_token, calibration.corpus_name, stats)


def _watch(job: Job, corpus: Corpus) -> Watch | None:
    """Return what follows the decision while text goes by; None where none changes it, or none is near."""
    request = job.request
    if not job.ratio or job.candidates or job.score == "aimer":
        return None
    decide = _decision(job)
    return Watch(decide, n_token=corpus.tokens.numel() // ranks.n_rank(), until=request.until_stable)


def _decision(job: Job) -> Decide:
    """Return the function from layers' statistics to the experts that the job's scores would prune.

    As many in each layer as the ratio says, whatever the layer's share of the plan will be.
    """
    request = job.request

    def decide(layers: Mapping[int, ExpertStats]) -> Mapping[int, frozenset[int]]:
        so_far = Calibration(
            spec=replace(job.spec, moe_layers=tuple(layers)),
            model_sha256="",
            corpus_sha256="",
            corpus_name="",
            n_token=0,
            layers=layers,
        )
        scores = score_experts(so_far, job.score, seed=request.seed)
        chosen = plan(
            guard(scores, so_far) if request.guarded else scores,
            ratio=job.ratio,
            min_kept=request.min_kept,
            method=request.method,
            scope=request.scope,
        )
        return {layer.layer: frozenset(layer.pruned) for layer in chosen.layers}

    return decide


def _unstable(stability: Stability | None, until: float | None) -> Iterator[str]:
    if stability and until and stability.mean < until:
        yield (
            f"--until-stable {until:g} was not reached in {stability.n_token} tokens: "
            "more text may still change which experts go (--chunks)"
        )


def _remarks(calibration: Calibration, chosen: Plan) -> tuple[str, ...]:
    """Say what a user should know: experts the calibration hardly saw, what giving up novices costs."""
    remarks = []
    if chosen.method != "mone":
        lost, left = (mean_relative_error(calibration, chosen, name) for name in ("zero", "least-squares"))
        remarks.append(
            f"the pruned experts made {lost:.1%} of the layers' squared output, which is lost; "
            f"with novices (--method mone) an estimated {left:.1%} would be"
        )
    for number, experts in super_experts(calibration).items():
        gone = next(set(experts) & set(layer.pruned) for layer in chosen.layers if layer.layer == number)
        remarks.append(
            f"layer {number}: super experts {', '.join(map(str, experts))} reach extreme outputs; "
            f"{'pruned: ' + ', '.join(map(str, sorted(gone))) if gone else 'all kept'}"
        )
    for layer in chosen.layers:
        stats = calibration.layers[layer.layer]
        if rare := rarely_seen(stats):
            never = sum(int(stats.count[expert]) == 0 for expert in rare)
            kept = sum(expert in layer.kept for expert in rare)
            remarks.append(
                f"layer {layer.layer}: {len(rare)} experts seen in fewer than {RARELY} of {stats.n_token} "
                f"tokens ({never} never, {kept} kept): {', '.join(map(str, rare))}"
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
