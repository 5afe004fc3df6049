"""export(): the whole road in one function. Read this file first.

load -> calibrate -> score -> plan -> write; everything that can fail cheaply fails before anything expensive
starts.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mone_export.architectures import weights_inputs
from mone_export.artifacts import (
    Calibration,
    Candidate,
    Corpus,
    ExpertStats,
    MoeSpec,
    Plan,
    Report,
    Scores,
    Stability,
)
from mone_export.calibration import ranks
from mone_export.calibration.checkpoint import Checkpoint, begun
from mone_export.calibration.corpus import head, read_corpus
from mone_export.calibration.loading import Dtype, Model, Stream, choose, load
from mone_export.calibration.masking import Divergence, measure_residuals, recalibrate
from mone_export.calibration.passes import calibrate
from mone_export.calibration.stability import Decide, Watch
from mone_export.calibration.usage import RARELY, rarely_seen
from mone_export.errors import MoneError
from mone_export.fitting import candidates, judge
from mone_export.model import check_weights, fingerprint, inspect, load_tokenizer, resolve, resolve_device
from mone_export.output.llamacpp import projector_command
from mone_export.output.quantizing import IMATRIX_TYPES
from mone_export.output.writing import OUTTYPES, check_output, measure, write
from mone_export.pruning.allocation import error_curves, search
from mone_export.pruning.damage import mean_relative_error
from mone_export.pruning.guard import guard, super_experts
from mone_export.pruning.novices import NOVICE_NAMES, joint_novices, novices
from mone_export.pruning.planning import (
    METHODS,
    SCOPES,
    check_scope,
    kept_per_layer,
    least_kept,
    plan,
    plan_without_scores,
)
from mone_export.pruning.scoring import SCORE_NAMES, score_weights
from mone_export.pruning.scoring import score as score_experts
from mone_export.runtime import Progress

SPARE_ROWS = 8  # of text, to judge the layers' counts by

log = logging.getLogger(__name__)

_BUILTIN_TEXT = (
    "calibrating on the built-in text, mostly Python code and technical English; "
    "for other uses pass text like yours: -f FILE"
)


def export(
    model: str,
    *,
    ratio: float | None = None,
    outfile: Path,
    outtype: str = "auto",
    fit: int | None = None,
    files: Sequence[str | Path] = (),
    datasets: Sequence[str] = (),
    field: str = "text",
    n_row: int = 100,
    seq_len: int = 2048,
    method: str = "mone",
    score: str | None = None,
    novice: str = "mean",
    min_kept: int | None = None,
    scope: str = "layer",
    allocate: str = "even",
    sequential: bool = False,
    guarded: bool = True,
    stats: Path | None = None,
    workdir: Path | None = None,
    device: str = "auto",
    dtype: Dtype = "auto",
    stream: Stream = "auto",
    memory: int | None = None,
    seed: int = 0,
    until_stable: float | None = None,
    progress: Progress | None = None,
) -> Report | None:
    """Prune `ratio` of a model's experts, replace them by novices and write the result as a GGUF.

    With `fit`, a size in bytes, the ratio and the type that do the least harm are chosen, unless given.
    `model` is a folder, a Hugging Face id or `demo`. `files`, `datasets`, `field`, `seed`, `n_row` and
    `seq_len` say what to calibrate on, as in `read_corpus`. `stats` names a file to keep the calibration in,
    or to take it from when it exists: it must be of the text given, or no text be given. In `workdir` an
    unfinished one is kept, too, and taken up by the next call. `score` None is the method's own.
    `until_stable` ends the calibration when the decision's overlap with that at half the text is that much.
    Every failure is a `MoneError` and leaves no file behind. Of several processes that share the rows
    (torchrun) the first alone returns a report.
    """
    if sequential and (method != "mone" or scope != "layer" or allocate != "even" or score == "aimer"):
        raise MoneError(
            "--sequential decides layer after layer from the statistics, each by itself: "
            "leave out --method, --scope, --allocate and --score aimer, or --sequential"
        )
    if ratio is None and fit is None:
        raise MoneError("how many experts should go? pass --ratio, such as 0.5, or a size with --fit")
    if fit is not None and (scope != "layer" or allocate != "even"):
        raise MoneError(
            "--fit prunes the same number of experts in every layer: leave out --scope and --allocate, "
            "or pass the --ratio and --outtype that it chooses instead of it"
        )
    clock = _Clock()
    path = resolve(model)
    spec = inspect(path)
    device = resolve_device(ranks.own_device(device))
    score = score or METHODS.get(method, "mone")
    stats = stats or (workdir / "statistics.safetensors" if workdir else None)
    if until_stable is not None and not 0 < until_stable <= 1:
        raise MoneError(f"--until-stable {until_stable:g} is no overlap: pass a number above 0, up to 1")
    if stats is not None and not stats.exists() and stats.parent != workdir:
        check_output(stats, option="--stats")
    tokenizer = load_tokenizer(path)
    fitting: list[Candidate] = []
    if fit is not None:
        check_names(spec, method=method, score=score, novice=novice, outtype=outtype)
        fitting = candidates(
            path,
            spec,
            fit,
            outtype=outtype,
            ratio=ratio,
            min_kept=min_kept,
            method=method,
            novice=novice,
            progress=progress,
        )
        largest = max(fitting, key=lambda item: item.size)
        ratio, outtype = largest.ratio, largest.outtype
    assert ratio is not None
    size_unpruned, _ = announce(
        path,
        spec,
        ratio=ratio,
        min_kept=min_kept,
        method=method,
        scope="search" if allocate == "search" else scope,
        score=score,
        novice=novice,
        outfile=outfile,
        outtype=outtype,
        at_most=len(fitting) > 1,
    )
    calibration = Calibration.load(stats) if stats is not None and stats.exists() else None
    corpus = None
    n_spare = SPARE_ROWS if allocate == "search" else 0  # rows that the calibration does not see
    if calibration is None or files or datasets or novice == "joint" or n_spare or sequential:
        whole = read_corpus(
            files,
            tokenizer,
            datasets=datasets,
            field=field,
            seed=seed,
            n_row=n_row + n_spare,
            seq_len=seq_len,
        )
        corpus, spare = head(whole, n_row), whole.tokens[n_row:]
    watch = None
    clock.lap("checks")
    with ranks.joined():
        model_sha256 = ranks.from_first(fingerprint(path, progress=progress) if ranks.rank() == 0 else "")
        clock.lap("fingerprint")
        checkpoint = None
        if workdir is not None:
            text = corpus.sha256 if corpus else calibration.corpus_sha256 if calibration else ""
            checkpoint, dtype, stream = _checkpoint(
                workdir,
                path,
                spec,
                (model_sha256, text),
                device=device,
                dtype=dtype,
                stream=stream,
                memory=memory,
            )
        if calibration is not None and stats is not None:
            if corpus and until_stable:  # it may have ended early
                corpus = head(corpus, calibration.n_token // seq_len)
            check_origin(stats, calibration, model_sha256, corpus)
        else:
            assert corpus is not None
            if not (files or datasets):
                log.info(_BUILTIN_TEXT)
            loaded = load(path, device=device, dtype=dtype, stream=stream, memory=memory)
            clock.lap("load")
            if ratio and not fitting and score != "aimer":  # which no text changes
                decide = _decision(
                    spec, score, seed=seed, ratio=ratio, min_kept=min_kept, method=method, scope=scope
                )
                watch = Watch(decide, n_token=corpus.tokens.numel() // ranks.n_rank(), until=until_stable)
            if until_stable and (fitting or loaded.files or workdir or ranks.n_rank() > 1):
                raise MoneError(
                    "--until-stable needs the ratio, and all layers after each batch, in one process from "
                    "start to end: leave out --fit, --workdir, --stream and torchrun, or --until-stable"
                )
            calibration = calibrate(
                loaded,
                corpus,
                model_sha256=model_sha256,
                checkpoint=checkpoint,
                memory=memory,
                progress=progress,
                watch=watch,
            )
            corpus = head(corpus, calibration.n_token // seq_len)
            del loaded  # its memory is free for the writing
            if stats is not None and ranks.rank() == 0:
                calibration.save(stats)
            ranks.wait()
            clock.lap("calibrate")
        if checkpoint is not None:
            checkpoint.clear()
    if ranks.rank() > 0:
        return None
    way: dict[str, Any] = {"device": device, "dtype": dtype, "stream": stream, "memory": memory}
    if fitting:
        first = rank(path, calibration, score, guarded=guarded, seed=seed, **way)
        fitting = judge(
            fitting,
            path,
            calibration,
            lambda part: plan(first, ratio=part, min_kept=min_kept, method=method),
            novice=novice,
        )
        ratio, outtype = fitting[0].ratio, fitting[0].outtype
        size_unpruned, _ = measure(path, plan_without_scores(spec, ratio=0), outtype=outtype)
        clock.lap("fit")
    if sequential:
        assert corpus is not None
        known = "least-squares" if novice == "joint" else novice
        calibration = recalibrate(
            load(path, **way | {"stream": "off"}),
            corpus,
            calibration,
            lambda so_far: plan(
                rank(path, so_far, score, guarded=guarded, seed=seed), ratio=ratio, min_kept=min_kept
            ),
            lambda stats: novices(stats, known),
            progress=progress,
        )
        clock.lap("layer by layer")
    scores = rank(path, calibration, score, guarded=guarded, seed=seed, **way)
    chosen = plan(scores, ratio=ratio, min_kept=min_kept, method=method, scope=scope)
    if n_spare:
        loaded = load(path, **way | {"stream": "off"})  # its answers are compared many times
        chosen = search_counts(
            loaded,
            spare,
            calibration,
            scores,
            novice=novice,
            ratio=ratio,
            min_kept=min_kept,
            progress=progress,
        )
        del loaded
        clock.lap("search")
    vectors = None
    if novice == "joint" and method == "mone":
        assert corpus is not None
        loaded = load(path, **way)
        residuals = measure_residuals(loaded, corpus, chosen, memory=memory, progress=progress)
        del loaded
        vectors = {
            layer: joint_novices(calibration.layers[layer], residual) for layer, residual in residuals.items()
        }
        clock.lap("second pass")
    size = write(
        path,
        calibration,
        chosen,
        outfile,
        novice=novice,
        vectors=vectors,
        outtype=outtype,
        progress=progress,
    )
    clock.lap("write")
    stability = watch.stability() if watch else None
    return Report(
        outfile=outfile,
        size=size,
        size_unpruned=size_unpruned,
        n_kept={layer.layer: len(layer.kept) for layer in chosen.layers},
        parts=calibration.parts,
        stability=stability,
        seconds=clock.seconds,
        remarks=(*_unstable(stability, until_stable), *_remarks(calibration, chosen)),
        candidates=tuple(fitting),
    )


def search_counts(
    model: Model,
    rows: Tensor,
    calibration: Calibration,
    scores: Scores,
    *,
    novice: str,
    ratio: float,
    min_kept: int | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Return the plan whose counts per layer do a model the least harm found on `rows` [n_row, seq_len]."""
    spec = calibration.spec
    known = "least-squares" if novice == "joint" else novice  # joint novices belong to one plan
    vectors = {layer: novices(stats, known) for layer, stats in calibration.layers.items()}
    divergence = Divergence(model, rows)
    done = 0

    def decide(counts: Mapping[int, int]) -> Plan:
        return plan(scores, ratio=ratio, min_kept=min_kept, scope="search", counts=counts)

    def measure_counts(counts: Mapping[int, int]) -> float:
        nonlocal done
        done += 1
        if progress:
            progress(done, 0, "searching the counts of the layers")
        return divergence({layer.layer: layer.pruned for layer in decide(counts).layers}, vectors)

    counts = search(
        error_curves(calibration, scores, known),
        kept_per_layer(spec, ratio, min_kept=min_kept),
        least_kept(spec, min_kept),
        measure_counts,
    )
    return decide(counts)


def rank(
    path: Path,
    calibration: Calibration,
    score: str,
    *,
    guarded: bool,
    seed: int,
    device: str = "auto",
    dtype: Dtype = "auto",
    stream: Stream = "auto",
    memory: int | None = None,
) -> Scores:
    """Score the experts, from the statistics or the weights; guarded super experts stand above all others."""
    if score == "aimer":
        scores = score_weights(load(path, device=device, dtype=dtype, stream=stream, memory=memory))
    else:
        scores = score_experts(calibration, score, seed=seed)
    return guard(scores, calibration) if guarded else scores


def announce(
    path: Path,
    spec: MoeSpec,
    *,
    ratio: float,
    min_kept: int | None,
    method: str,
    scope: str,
    score: str,
    novice: str,
    outfile: Path,
    outtype: str,
    at_most: bool = False,
) -> tuple[int, int]:
    """Check everything that needs no weights, and return the sizes in bytes: (unpruned file, pruned file).

    Raises `MoneError` for an unknown name, a bad ratio, an output that cannot be written, a model llama.cpp
    cannot convert, and too little disk for the file and its intermediate one together.
    """
    check_names(
        spec, method=method, score=score, novice=novice, outtype=outtype, scope=scope, outfile=outfile
    )
    check_scope(method, scope)
    kept_per_layer(spec, ratio, min_kept=min_kept, method=method)
    check_output(outfile)
    check_weights(path)
    blank = plan_without_scores(spec, ratio=ratio, min_kept=min_kept, score=score, method=method, scope=scope)
    size, intermediate = measure(path, blank, novice=novice, outtype=outtype)
    size_unpruned, _ = measure(path, plan_without_scores(spec, ratio=0), outtype=outtype)
    temporary = f", and {intermediate / 1e6:.1f} MB beside it for a while" if intermediate else ""
    log.info("%s will have %s%.1f MB%s", outfile, "at most " if at_most else "", size / 1e6, temporary)
    check_output(outfile, needed=size + intermediate)
    if command := projector_command(path, outfile):
        log.info("only the text part is exported; llama.cpp converts the other: %s", command)
    return size_unpruned, size


def check_names(
    spec: MoeSpec,
    *,
    method: str,
    score: str,
    novice: str,
    outtype: str,
    scope: str = "layer",
    outfile: Path = Path("OUT"),
) -> None:
    """Raise `MoneError` for an unknown name, and for one that this model or this road has no use for."""
    if outtype in IMATRIX_TYPES:
        raise MoneError(
            f"--outtype {outtype} needs an importance matrix of the pruned model: export --outtype f16 "
            "to F16, then run `llama-imatrix -m F16 -f TEXT -o IMATRIX` "
            f"and `llama-quantize --imatrix IMATRIX F16 {outfile} {outtype}`"
        )
    for what, name, known in (
        ("--method", method, tuple(METHODS)),
        ("--score", score, SCORE_NAMES),
        ("--scope", scope, (*SCOPES, "search")),
        ("--novice", novice, NOVICE_NAMES),
        ("--outtype", outtype, OUTTYPES),
    ):
        if name not in known:
            raise MoneError(f"unknown {what} {name}: choose from {', '.join(known)}")
    if novice == "joint" and weights_inputs(spec.arch):
        raise MoneError(
            f"--novice joint fits novices to the weights of experts' outputs, but {spec.arch} weights their "
            "inputs: use --novice mean"
        )


def _checkpoint(
    workdir: Path,
    path: Path,
    spec: MoeSpec,
    origin: tuple[str, str],
    *,
    device: str,
    dtype: Dtype,
    stream: Stream,
    memory: int | None,
) -> tuple[Checkpoint, Dtype, Stream]:
    """Open the work folder; what is left to `auto` stays as it was when the folder was begun.

    `origin` holds the fingerprints of model and text. Returns the folder, and what `auto` has become.
    """
    folder = workdir / f"rank-{ranks.rank()}"
    before: Mapping[str, Any] = begun(folder)
    dtype = before.get("--dtype", dtype) if dtype == "auto" else dtype
    stream = before.get("--stream", stream) if stream == "auto" else stream
    torch_dtype, streamed = choose(path, spec, device=device, dtype=dtype, stream=stream, memory=memory)
    job: dict[str, Any] = {
        "model": origin[0],
        "text": origin[1],
        "--device": device.partition(":")[0],
        "--dtype": str(torch_dtype).removeprefix("torch."),
        "--stream": "on" if streamed else "off",
        "processes": ranks.n_rank(),
    }
    return Checkpoint(folder, job), job["--dtype"], job["--stream"]


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


def _decision(spec: MoeSpec, score: str, *, seed: int, **options: Any) -> Decide:
    """Return the function from layers' statistics to the experts that `plan(**options)` would prune."""

    def decide(layers: Mapping[int, ExpertStats]) -> Mapping[int, frozenset[int]]:
        so_far = Calibration(
            spec=replace(spec, moe_layers=tuple(layers)),
            model_sha256="",
            corpus_sha256="",
            corpus_name="",
            n_token=0,
            layers=layers,
        )
        chosen = plan(score_experts(so_far, score, seed=seed), **options)
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
