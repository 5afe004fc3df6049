"""prepare(): what a user asked for, checked before anything is computed.

All that can fail cheaply fails here; `--dry-run` goes little further. A `Request` holds the options as they
were given, a `Job` what they have become: the model's shape, the file's size, the text. No weight is read.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mone_export.architectures import weights_inputs
from mone_export.artifacts import Calibration, Candidate, Corpus, MoeSpec
from mone_export.calibration import ranks
from mone_export.calibration.corpus import head, read_corpus
from mone_export.errors import MoneError
from mone_export.fitting import candidates
from mone_export.model import Dtype, Stream, check_weights, inspect, load_tokenizer, resolve, resolve_device
from mone_export.output.llamacpp import projector_command
from mone_export.output.quantizing import IMATRIX_TYPES
from mone_export.output.writing import OUTTYPES, check_output, measure
from mone_export.pruning.allocation import ALLOCATIONS
from mone_export.pruning.novices import NOVICE_NAMES
from mone_export.pruning.planning import METHODS, SCOPES, check_scope, kept_per_layer, plan_without_scores
from mone_export.pruning.scoring import SCORE_NAMES
from mone_export.runtime import Progress

if TYPE_CHECKING:
    from mone_export.calibration.loading import Model

SPARE_ROWS = 8  # of text, to judge the layers' counts by
NO_EARLY_END = (
    "--until-stable needs the ratio, and all layers after each batch, in one process from "
    "start to end: leave out --fit, --workdir, --stream and torchrun, or --until-stable"
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asked for.

    `model` is a folder, a Hugging Face id or `demo`; of `ratio` and `fit`, a size in bytes, at least one is
    given. `files`, `datasets`, `field`, `seed`, `n_row` and `seq_len` say what to calibrate on, as in
    `read_corpus`. `stats` names a file to keep the calibration in, or to take it from when it exists: it must
    be of the text given, or no text be given. In `workdir` an unfinished one is kept, too, and taken up by
    the next call. `score` None is the method's own. `until_stable` ends the calibration when the decision's
    overlap with that at half the text is that much. `allocate` is `auto` for `sensitivity` where layers may
    keep different numbers of experts, else `even`.
    """

    model: str
    outfile: Path
    ratio: float | None = None
    outtype: str = "auto"
    fit: int | None = None
    files: Sequence[str | Path] = ()
    datasets: Sequence[str] = ()
    field: str = "text"
    n_row: int = 100
    seq_len: int = 2048
    method: str = "mone"
    score: str | None = None
    novice: str = "least-squares"
    min_kept: int | None = None
    scope: str = "layer"
    allocate: str = "auto"
    sequential: bool = False
    guarded: bool = True
    stats: Path | None = None
    workdir: Path | None = None
    device: str = "auto"
    dtype: Dtype = "auto"
    stream: Stream = "auto"
    memory: int | None = None
    seed: int = 0
    until_stable: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A request that has passed every cheap check, and what the checks found; nothing in it is open any more.

    Until a choice among several `candidates` is made, ratio and type are those of the largest. `size` and
    `size_unpruned` are bytes of the file; `saved` are statistics made before; `corpus` is None where they are
    enough; `spare` [n, seq_len] are rows that no calibration sees. `scope` is the plan's.
    """

    request: Request
    path: Path
    spec: MoeSpec
    device: str
    score: str
    scope: str
    ratio: float
    outtype: str
    size: int
    size_unpruned: int
    stats: Path | None = None
    saved: Calibration | None = None
    candidates: tuple[Candidate, ...] = ()
    corpus: Corpus | None = None
    spare: Tensor | None = None

    def load_model(self, *, stream: Stream | None = None) -> "Model":
        """Load the model as the request says, or streamed as `stream` says."""
        from mone_export.calibration.loading import load  # takes longer than all that saved statistics need

        request = self.request
        return load(
            self.path,
            device=self.device,
            dtype=request.dtype,
            stream=stream or request.stream,
            memory=request.memory,
        )


def prepare(request: Request, *, progress: Progress | None = None) -> Job:
    """Check a request, and read all that it needs but the weights; `MoneError` for what cannot be done."""
    _check_together(request)
    path = resolve(request.model)
    stats = request.stats or (request.workdir / "statistics.safetensors" if request.workdir else None)
    saved = Calibration.load(stats) if stats is not None and stats.exists() else None
    spec = inspect(path, saved=saved)
    if saved and saved.spec != spec:
        raise MoneError(f"{stats} was made from another model: choose another --stats file")
    device = resolve_device(ranks.own_device(request.device))
    score = request.score or METHODS.get(request.method, "error")
    if stats is not None and saved is None and stats.parent != request.workdir:
        check_output(stats, option="--stats")
    scope = _scope(request)
    searches = scope == "search"
    asks_model = searches or request.sequential or request.novice == "joint"
    tokenizer = None
    if not saved or request.files or request.datasets or asks_model:
        tokenizer = load_tokenizer(path)
    names: dict[str, Any] = {"method": request.method, "score": score, "novice": request.novice}
    ratio, outtype, found = request.ratio, request.outtype, []
    largest: Candidate | None = None
    if request.fit is not None:
        check_names(spec, outtype=outtype, **names)
        found = candidates(
            path,
            spec,
            request.fit,
            outtype=outtype,
            ratio=ratio,
            min_kept=request.min_kept,
            scope=scope,
            progress=progress,
            **names,
        )
        largest = max(found, key=lambda item: item.size)
        ratio, outtype = largest.ratio, largest.outtype
    assert ratio is not None
    size_unpruned, size = announce(
        path,
        spec,
        ratio=ratio,
        min_kept=request.min_kept,
        scope=scope,
        outfile=request.outfile,
        outtype=outtype,
        largest=largest,
        at_most=len(found) > 1,
        **names,
    )
    job = Job(
        request=request,
        path=path,
        spec=spec,
        device=device,
        score=score,
        scope=scope,
        ratio=ratio,
        outtype=outtype,
        size=size,
        size_unpruned=size_unpruned,
        stats=stats,
        saved=saved,
        candidates=tuple(found),
    )
    if tokenizer is None:  # the statistics are enough
        return job
    whole = read_corpus(
        request.files,
        tokenizer,
        datasets=request.datasets,
        field=request.field,
        seed=request.seed,
        n_row=request.n_row + (SPARE_ROWS if searches else 0),
        seq_len=request.seq_len,
    )
    spare = whole.tokens[request.n_row :] if searches else None
    return replace(job, corpus=head(whole, request.n_row), spare=spare)


def _check_together(request: Request) -> None:
    """Refuse options that contradict each other, whatever the model."""
    if request.sequential and (request.method != "mone" or request.score == "aimer"):
        raise MoneError(
            "--sequential decides layer after layer from the statistics: leave out --method and "
            "--score aimer, or --sequential"
        )
    if request.allocate not in ALLOCATIONS:
        raise MoneError(f"unknown --allocate {request.allocate}: choose from {', '.join(ALLOCATIONS)}")
    if request.scope != "layer" and request.allocate in ("sensitivity", "search"):
        raise MoneError(
            f"--scope {request.scope} and --allocate {request.allocate} both say how many experts each layer "
            "keeps: leave one of them out"
        )
    if request.ratio is None and request.fit is None:
        raise MoneError("how many experts should go? pass --ratio, such as 0.5, or a size with --fit")
    if request.fit is not None and (request.scope != "layer" or request.allocate == "search"):
        raise MoneError(
            "--fit shares out the experts by --allocate even or sensitivity: leave out --scope model and "
            "--allocate search, or pass the --ratio and --outtype that it chooses instead of it"
        )
    until = request.until_stable
    if until is not None and not 0 < until <= 1:
        raise MoneError(f"--until-stable {until:g} is no overlap: pass a number above 0, up to 1")
    several = request.fit is not None or request.workdir or request.stream == "on" or ranks.n_rank() > 1
    if until is not None and several:
        raise MoneError(NO_EARLY_END)


def _scope(request: Request) -> str:
    """Return how a plan comes by its counts per layer."""
    if request.allocate == "auto":
        return "sensitivity" if (request.method, request.scope) == ("mone", "layer") else request.scope
    return request.scope if request.allocate == "even" else request.allocate


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
    largest: Candidate | None = None,
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
    if largest:  # measured already
        size, size_between, size_unpruned = largest.size, largest.size_between, largest.size_unpruned
    else:
        names = {"score": score, "method": method, "scope": scope}
        blank = plan_without_scores(spec, ratio=ratio, min_kept=min_kept, **names)
        size, size_between = measure(path, blank, novice=novice, outtype=outtype)
        size_unpruned, _ = measure(path, plan_without_scores(spec, ratio=0), outtype=outtype)
    temporary = f", and {size_between / 1e6:.1f} MB beside it for a while" if size_between else ""
    about = "at most " if at_most else "about " if scope not in SCOPES and size_between else ""
    log.info("%s will have %s%.1f MB%s", outfile, about, size / 1e6, temporary)
    check_output(outfile, needed=size + size_between)
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
        ("--scope", scope, (*SCOPES, *ALLOCATIONS)),
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
