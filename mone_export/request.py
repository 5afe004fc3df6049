"""prepare(): what a user asked for, checked before anything is computed.

All that can fail cheaply fails here; `--dry-run` goes little further. A `Request` holds the options as they
were given, a `Job` what they have become: the model, the recipe, the file's size, the text. No weight is
read.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mone_export.architectures import weights_inputs
from mone_export.artifacts import (
    Calibration,
    Candidate,
    ChannelStats,
    Corpus,
    Plan,
    Protected,
    differing,
)
from mone_export.calibration import ranks
from mone_export.calibration.corpus import BUILT_IN, check_files, head, read_all, read_corpus
from mone_export.calibration.work_folder import begun
from mone_export.errors import MoneError
from mone_export.fitting import candidates
from mone_export.lazily import Tensor
from mone_export.llama_options import LlamaOptions
from mone_export.output.checkpoints import check_expressible, checkpoint_size
from mone_export.output.importance import Rounding
from mone_export.output.provenance import Keys
from mone_export.output.quantizing import IMATRIX_TYPES
from mone_export.output.redoing import stated
from mone_export.output.splitting import LEAST as LEAST_SPLIT
from mone_export.output.writing import OUTTYPES, layouts, measure, ordinary_widths, packed_together
from mone_export.paths import (
    check_card,
    check_folder,
    check_outputs,
    check_room,
    check_temporary,
    on_one_disk,
    page_outputs,
    sweep,
)
from mone_export.pruning.allocation import even_counts
from mone_export.pruning.plan_files import load_plan, load_recipe
from mone_export.pruning.planning import plan_without_scores
from mone_export.pruning.thinning import channel_bytes, narrow_widths, widths_of
from mone_export.recipe import AUTO, DEFAULT_NOVICE, Mtp, Recipe
from mone_export.room import room
from mone_export.runtime import Progress
from mone_export.source import DEMO, Checkpoint, Source, open_source
from mone_export.source.gguf_format import TIER_COUNT_KEY
from mone_export.source.shape import Dtype, Stream, resolve_device
from mone_export.source.substituted import MADE_KEY, has_novices
from mone_export.terminal import as_size

if TYPE_CHECKING:
    from mone_export.calibration.engines import Engine, Setup

_UNROUNDED = ("f32", "f16", "bf16")
HELD_OUT_ROWS = 8  # of text that no calibration sees, to try counts on
DEMO_CHUNKS = (64, 512)  # rows, tokens: the demo model is small and was trained on short rows
PAPER_CHUNKS = (100, 2048)  # MoNE's 100 samples of 2048 tokens
NO_EARLY_END = (
    "--until-stable needs the ratio, and all layers after each batch, in one process from "
    "start to end: leave out --fit, --workdir, --stream and torchrun, or --until-stable"
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asked for.

    `model` is a folder, a Hugging Face id or `demo`; of `ratio` and `fit` at least one is given, the latter a
    size in bytes or what `room.room` takes. `outfile` may be a folder: then the file is named after model,
    ratio and type. `method`, `score`, `novice`, `allocation`, `min_kept`, `guarded`, `seed` and `mtp` are
    those of `Recipe.of`; with `stock` the method, unless given, is the best whose file unpatched llama.cpp
    runs. `files`,
    `datasets`, `field`, `seed`, `n_row` and `seq_len` say what to calibrate on, as in `read_corpus`; of the
    last two, None is the paper's 100 rows of 2048 tokens (64 of 512 for the demo). `stats` names a file to
    keep the calibration in, or to take it from when it exists: it must be of the text given, or no text be
    given. `plan` names a file with the choice of experts, made by `plan_out` on this or another copy of the
    model. `hf_out` is a folder for the pruned model as a checkpoint, beside `outfile` or alone. In `workdir`
    an unfinished calibration is kept, too, and taken up by the next call, and so is what a second pass has
    found. `protect` has texts, `FILE=N` or pairs of both: the N experts of each layer that a text needs most
    stay whole. `sequential` measures each layer again after the pruned ones before it. `until_stable` ends
    the calibration when the decision's overlap with that at half the text is that much. `report` names a page
    to write about the file, `card` a folder for what is published with it; `command` is what they say made
    it.
    """

    model: str | Path | Source
    outfile: str | Path | None = None
    ratio: float | None = None
    fit: int | str | None = None
    outtype: str = "auto"
    stock: bool = False
    method: str | None = None
    score: str | None = None
    novice: str | None = None
    allocation: str | None = None
    min_kept: int | None = None
    guarded: bool = True
    protect: Sequence[str | tuple[str | Path, int]] = ()
    sequential: bool = False
    files: Sequence[str | Path] = ()
    datasets: Sequence[str] = ()
    field: str = "text"
    n_row: int | None = None
    seq_len: int | None = None
    seed: int = 0
    stats: str | Path | None = None
    workdir: str | Path | None = None
    plan: str | Path | None = None
    plan_out: str | Path | None = None
    hf_out: str | Path | None = None
    split_max_size: int | None = None
    imatrix: str | Path | None = None
    with_imatrix: bool = True
    until_stable: float | None = None
    device: str = "auto"
    dtype: Dtype = "auto"
    stream: Stream = "auto"
    memory: int | None = None
    llama: LlamaOptions = LlamaOptions()
    revision: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False
    mtp: Mtp | None = None
    report: str | Path | None = None
    card: str | Path | None = None
    command: str = ""

    @property
    def recipe(self) -> Recipe:
        """How to prune; with `fit` alone the ratio is not known yet, and 0 here. A plan brings its own."""
        if self.plan is not None:
            planned = load_recipe(self.plan)
            method = self.method or ("drop" if self.stock and planned.method == "mone" else None)
            return planned.changed(method=method, novice=self._novice, mtp=self.mtp)
        return Recipe.of(
            self.ratio or 0.0,
            method=self.method or ("drop" if self.stock else None),
            score=self.score,
            novice=self._novice,
            allocation=self.allocation,
            min_kept=self.min_kept,
            guarded=self.guarded,
            seed=self.seed,
            mtp=self.mtp,
        )

    @property
    def _novice(self) -> str | None:
        return None if self.novice == AUTO else self.novice

    @property
    def protected_texts(self) -> tuple[tuple[Path, int], ...]:
        """The texts whose experts are protected, and how many experts of each layer."""
        return tuple(map(_protected_text, self.protect))

    def mixes_types(self, source: Source) -> bool:
        """Whether experts may have types of their own: where a size decides, and the file is rounded."""
        return self.fit is not None and self.outtype not in _UNROUNDED and not source.packed

    @property
    def chunks(self) -> tuple[int, int]:
        """Rows of text, and tokens in each."""
        n_row, seq_len = DEMO_CHUNKS if self.model == DEMO else PAPER_CHUNKS
        return (
            n_row if self.n_row is None else self.n_row,
            seq_len if self.seq_len is None else self.seq_len,
        )

    @property
    def only_checkpoint(self) -> bool:
        """Whether no GGUF is made."""
        return self.hf_out is not None and self.outfile is None

    @property
    def channels(self) -> Path | None:
        """Where the sums of a second pass are kept; None: only as long as they are needed."""
        return Path(self.workdir) / "rank-0" / "channels" if self.workdir else None

    @property
    def stats_file(self) -> Path | None:
        """Where the statistics are kept."""
        if self.stats is None:
            return Path(self.workdir) / "statistics.safetensors" if self.workdir else None
        return Path(self.stats)


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A request that has passed every cheap check, and what the checks found; nothing in it is open any more.

    Until a choice among several `candidates` is made, ratio and type are those of the largest. `size` and
    `size_unpruned` (about) are bytes of the file; `saved` are statistics made before; `corpus` is None where
    no text is needed; `held_out` [n, seq_len] are rows that no calibration sees; `plan` is one that was made
    before. `protected_texts` are those whose experts are protected, and how many of each layer; `protected`
    those experts, once the texts were run. `stated` are the file's keys that say which command made it.
    """

    request: Request
    source: Source
    recipe: Recipe
    outtype: str
    size: int
    size_unpruned: int
    device: str
    saved: Calibration | None = None
    candidates: tuple[Candidate, ...] = ()
    corpus: Corpus | None = None
    held_out: Tensor | None = None
    plan: Plan | None = None
    protected_texts: tuple[tuple[Corpus, int], ...] = ()
    protected: tuple[Protected, ...] = ()
    stated: Keys = field(default_factory=dict)

    @property
    def outfile(self) -> Path:
        """The file to write, or the folder where there is no file."""
        if self.request.hf_out is not None and self.request.outfile is None:
            return Path(self.request.hf_out)
        given = Path(self.request.outfile or ".")
        if not given.is_dir():
            return given
        share = f"-{self.recipe.ratio:.0%}".replace("%", "pc") if self.recipe.ratio else ""
        outtype = "" if self.outtype == "auto" else f"-{self.outtype}"
        return given / f"{self.source.name}{share}{outtype}.gguf"

    @property
    def limit(self) -> int | None:
        """The largest size of the file, where one was asked for."""
        return None if self.request.fit is None else int(self.request.fit)

    @property
    def mixed(self) -> bool:
        """Whether experts may have types of their own."""
        return self.recipe.allocation == "budget" and self.request.mixes_types(self.source)

    def mixes(self, item: Candidate) -> bool:
        """Whether experts may have other types than a candidate's: such files are rounded."""
        return self.mixed and item.outtype not in ("auto", *_UNROUNDED)

    @property
    def decides(self) -> bool:
        """Whether what becomes of the experts depends on a calibration, a choice that is still open too."""
        return len(self.candidates) > 1 or self.recipe.needs_statistics

    @property
    def needs_statistics(self) -> bool:
        """Whether anything depends on a calibration, an importance matrix too."""
        return self.decides or self.wants_imatrix

    @property
    def lacks_sensitivity(self) -> bool:
        """Whether saved statistics are without the sensitivities that the counts need: its run was ended.

        A work folder's are completed in any case: its files are those of a run that came through.
        """
        wanted = self.probed or self.request.workdir is not None
        return self.saved is not None and wanted and not self.saved.sensitivity

    @property
    def probed(self) -> bool:
        """Whether the counts need the layers' sensitivities."""
        return self.decides and self.plan is None and self.recipe.allocation in ("sensitivity", "search")

    def engine(self, *, stream: Stream | None = None) -> "Engine":
        """Load the model as the request says, or streamed as `stream` says."""
        from mone_export.calibration.engines import open_engine  # longer than all that saved statistics need

        setup = self.setup
        return open_engine(self.source, replace(setup, stream=stream) if stream else setup)

    @property
    def rounding(self) -> Rounding:
        """The type of the file, and whether it gets an importance matrix."""
        imatrix = self.request.imatrix
        kept = None if imatrix is None else Path(imatrix)
        return Rounding(self.outtype, self.wants_imatrix, kept, self.stated)

    @property
    def wants_imatrix(self) -> bool:
        """Whether an importance matrix is made: asked for, needed, or there is a calibration at hand."""
        mixed = self.mixed or (self.plan is not None and self.plan.mixes_types)
        return _with_imatrix(self.request, self.source, self.recipe, self.outtype, mixed=mixed)

    @property
    def streamed(self) -> bool:
        """Whether the model's layers come into memory one at a time."""
        from mone_export.calibration.engines import pinned

        return bool(pinned(self.source, self.setup).get("--stream") == "on")

    @property
    def setup(self) -> "Setup":
        """Where and how the model runs."""
        from mone_export.calibration.engines import Setup

        request = self.request
        return Setup(
            device=resolve_device(self.device),
            dtype=request.dtype,
            stream=request.stream,
            memory=request.memory,
            llama=request.llama,
        )


def prepare(request: Request, *, dry: bool = False, progress: Progress | None = None) -> Job:
    """Check a request, and read all that it needs except the weights; `MoneError` for what cannot be done.

    A `dry` run needs no place for an output.
    """
    _check_plan(request)
    check_files(request.files)
    recipe = request.recipe
    _check_together(request, recipe)
    source = open_source(
        request.model, revision=request.revision, trust_remote_code=request.trust_remote_code
    )
    if isinstance(request.fit, str):
        request = replace(request, fit=_room(request.fit, source))
    saved = _saved(request, source)
    request = _with_inputs(request, source, recipe, saved)
    _check_substituted(request, recipe, source)
    recipe = _with_thin(request, recipe, source, saved)
    _check_for_model(recipe, request.outtype, source)
    _check_protected_texts(request, recipe, source)
    if not dry:
        _check_place(request)
        if recipe.novice == "thin" and (recipe.ratio or request.fit is not None):
            _check_channels(request, source)
    source.check(known=saved is not None)  # what was calibrated fits
    chosen = None if request.plan is None else _loaded_plan(request, source, recipe)
    if source.substituted:
        chosen = source.substituted.plan(source.spec)
    if request.hf_out is not None:
        check_expressible(source, chosen or plan_without_scores(source.spec, recipe))
    keys = _stated(request, source, recipe, saved)
    job = replace(_sized(request, source, recipe, keys, progress), saved=saved, plan=chosen)
    if chosen and (chosen.n_tier or chosen.mixes_types or chosen.width or source.substituted):
        size = measure(source, chosen, outtype=Rounding(job.outtype, stated=keys))
        job = replace(job, size=size)
    if not dry:
        check_paths(job)
        _announce(job)
    if recipe.allocation == "search" and not chosen:
        _check_search(job)
    return _with_protected_texts(_with_text(job))


def _protected_text(given: str | tuple[str | Path, int]) -> tuple[Path, int]:
    """Return the text that `FILE=N` names, and the number."""
    name, _, number = given.rpartition("=") if isinstance(given, str) else (given[0], "", given[1])
    try:
        n = int(number)
    except ValueError:
        n = 0
    if not name or n < 1:
        raise MoneError(
            f"--protect {given}: pass a text and how many experts of a layer stay, such as a.txt=4"
        )
    return Path(name), n


def _check_protected_texts(request: Request, recipe: Recipe, source: Source) -> None:
    """Refuse to protect more experts of a layer than stay in it, and texts that are not there."""
    spec = source.spec
    kept = min(even_counts(spec, recipe).values()) if request.fit is None else min(spec.present.values())
    for file, n in request.protected_texts:
        if n > kept:
            asked = f"--ratio {recipe.ratio:g}" if request.fit is None else source.name
            raise MoneError(
                f"--protect {file}={n} is more than the {kept} experts that {asked} leaves in a layer: pass "
                f"{kept} or less, or prune less"
            )
        if not file.is_file():
            raise MoneError(f"--protect {file}={n}: there is no such file")


def _with_protected_texts(job: Job) -> Job:
    """Return the job with the texts whose experts are protected, as far as anything is pruned."""
    request, (n_row, seq_len) = job.request, job.request.chunks
    if not request.protected_texts or not (job.needs_statistics or job.recipe.ratio):
        return job
    reader = job.source.tokenizer()
    texts = []
    for file, n in request.protected_texts:
        text = read_all(file, reader, field=request.field, n_row=n_row, seq_len=seq_len)
        _check_text(job, text)
        texts.append((text, n))
    return replace(job, protected_texts=tuple(texts))


def _loaded_plan(request: Request, source: Source, recipe: Recipe) -> Plan:
    """Return the plan of a file, which the model's type allows."""
    assert request.plan is not None
    plan = load_plan(request.plan, source.spec, recipe)
    if plan.mixes_types and request.outtype in ("auto", *_UNROUNDED):
        raise MoneError(
            f"{request.plan} gives experts types of their own, which --outtype {request.outtype} does not "
            "round to: pass the --outtype that the plan was made with, such as q4_k_m"
        )
    return plan


def _saved(request: Request, source: Source) -> Calibration | None:
    """Return the statistics that a request takes up, of this config; they know the model's shape."""
    stats = request.stats_file
    saved = Calibration.load(stats) if stats is not None and stats.exists() else None
    source.known_from(saved)
    if saved and saved.config and _road(saved.config) != (now := _road(source.computing_config)):
        raise MoneError(
            f"{stats} was made from {_road(saved.config)}, {source.name} is {now}, whose experts may be "
            "numbered and rounded otherwise: choose another --stats file"
        )
    if saved and (keys := differing(saved.config, source.computing_config)):
        raise MoneError(
            f"{stats} was made with another config.json, different in {', '.join(keys[:5])}: choose another "
            "--stats file, or restore the config"
        )
    if saved and saved.spec != source.spec:
        raise MoneError(f"{stats} was made from another model: choose another --stats file")
    return saved


def _road(config: Mapping[str, Any]) -> str:
    """Return what statistics with such a config are of: a GGUF's keys begin with the architecture."""
    return "a GGUF" if any("." in key for key in config) else "a checkpoint"


def _with_inputs(request: Request, source: Source, recipe: Recipe, saved: Calibration | None) -> Request:
    """Return the request, without an importance matrix where saved statistics have no inputs for one."""
    known = request.fit is None and request.plan is None  # what is not rounded
    if known and not _with_imatrix(request, source, recipe, request.outtype):
        return request
    if saved is None or saved.inputs:
        return request
    if request.imatrix is not None or request.outtype in IMATRIX_TYPES:
        raise MoneError(
            f"{request.stats_file} has nothing that an importance matrix could be made of: choose another "
            "--stats file, and the text runs through the model again"
        )
    if not request.with_imatrix:
        return request
    log.info("%s has nothing for an importance matrix: rounded without one", request.stats_file)
    return replace(request, with_imatrix=False)


def _with_imatrix(
    request: Request, source: Source, recipe: Recipe, outtype: str, *, mixed: bool = False
) -> bool:
    """Return whether a file of a type gets an importance matrix.

    Where types are `mixed`, it is rounded whatever the type is.
    """
    if request.imatrix is not None or outtype in IMATRIX_TYPES:
        return True
    at_hand = recipe.needs_statistics or request.fit is not None or mixed
    exact = ("auto", *_UNROUNDED) if mixed else source.direct_types
    return request.with_imatrix and at_hand and outtype not in exact


def _check_plan(request: Request) -> None:
    """Refuse options that say what a plan says already."""
    given = {
        "--ratio": request.ratio,
        "--fit": request.fit,
        "--score": request.score,
        "--allocate": request.allocation,
        "--min-kept": request.min_kept,
        "--protect": request.protect or None,
        "--until-stable": request.until_stable,
        "--sequential": request.sequential or None,
    }
    said = [option for option, value in given.items() if value is not None]
    if request.plan is not None and said:
        raise MoneError(f"{said[0]} with --plan, which says which experts go: leave one of them out")


def _check_together(request: Request, recipe: Recipe) -> None:
    """Refuse options that contradict each other, whatever the model."""
    if request.outtype in IMATRIX_TYPES and not request.with_imatrix:
        raise MoneError(
            f"--outtype {request.outtype} needs an importance matrix: leave out --no-imatrix, or pass q2_k"
        )
    asked = (request.ratio, request.fit, request.plan)
    if asked == (None, None, None) and not has_novices(request.model):
        raise MoneError("how many experts should go? pass --ratio, such as 0.5, or a size with --fit")
    if request.stock and request.method == "mone":
        raise MoneError(
            "--stock with --method mone: novices need the patched llama.cpp; leave one of them out"
        )
    if request.sequential and (recipe.method != "mone" or recipe.score in ("aimer", "random")):
        raise MoneError(
            "--sequential decides layer after layer from the statistics: leave out --method and "
            f"--score {recipe.score}, or --sequential"
        )
    if request.sequential and recipe.novice == "joint":
        raise MoneError(
            "--sequential and --novice joint each measure the layers again, in ways that do not combine: "
            "leave one of them out"
        )
    if recipe.novice == "thin":
        _check_known_thin(request)
    if request.split_max_size is not None and request.split_max_size < LEAST_SPLIT:
        raise MoneError("--split-max-size is below a million bytes: pass a larger one, such as 4G")
    if request.fit is not None and recipe.allocation not in ("even", "sensitivity", "budget"):
        raise MoneError(
            f"--fit shares out the experts by --allocate even or sensitivity, not {recipe.allocation}: leave "
            "one of them out, or pass the --ratio and --outtype that --fit chooses instead of it"
        )
    _check_checkpoint(request)
    if recipe.allocation == "search" and request.stream == "on":
        raise MoneError(
            "--allocate search tries counts in a model that is in memory as a whole: leave out --stream on, "
            "or pass --allocate sensitivity"
        )
    _check_early_end(request, recipe)


def _check_checkpoint(request: Request) -> None:
    """Refuse what a checkpoint is no place for, and what is said of a GGUF where none is made."""
    if request.hf_out is None:
        return
    if request.fit is not None:
        raise MoneError(
            "--fit counts a GGUF's bytes, and gives experts types that a checkpoint cannot have: pass "
            "--ratio, or leave out --hf-out"
        )
    of_gguf = {
        "--outtype": request.outtype != "auto",
        "--imatrix": request.imatrix is not None,
        "--split-max-size": request.split_max_size is not None,
        "--report": request.report is not None,
        "--card": request.card is not None,
    }
    said = [option for option, given in of_gguf.items() if given]
    if request.only_checkpoint and said:
        raise MoneError(
            f"{said[0]} is about a GGUF, --hf-out alone makes none: pass -o FILE, or leave it out"
        )


def _check_substituted(request: Request, recipe: Recipe, source: Source) -> None:
    """Refuse to choose among experts of which some are constants already, and to calibrate them."""
    if not source.substituted:
        return
    given = {
        "--ratio": recipe.ratio,
        "--fit": request.fit,
        "--plan": request.plan,
        "--method": request.method,
        "--stock": request.stock,
    }
    for option in [option for option, value in given.items() if value and value != "mone"]:
        raise MoneError(
            f"{source.name} has constants in the place of experts already, and so has its GGUF: leave out "
            f"{option}, or prune the model it was made from"
        )

    if request.imatrix is not None or request.outtype in IMATRIX_TYPES:
        raise MoneError(
            f"{source.name} has constants in the place of experts: no importance matrix is made of such "
            "checkpoints; leave out --imatrix and --outtype, then pass the GGUF that is made, with --ratio 0"
        )


def _check_known_thin(request: Request) -> None:
    """Refuse what does not know thin experts."""
    if request.sequential:
        raise MoneError(
            f"--sequential does not know thin experts: leave it out, or pass --novice {DEFAULT_NOVICE}"
        )
    if request.method == "narrow" and (request.fit is not None or request.protect):
        option = "--protect" if request.protect else "--fit"
        raise MoneError(f"{option} is about whole experts, --method narrow leaves none: use --method drop")
    if request.fit is not None and request.ratio is not None:
        raise MoneError("--fit shares out thin experts by itself: leave out --ratio, or --novice thin")


def _check_early_end(request: Request, recipe: Recipe) -> None:
    until = request.until_stable
    if until is None:
        return
    if not 0 < until <= 1:
        raise MoneError(f"--until-stable {until:g} is no overlap: pass a number above 0, up to 1")
    if recipe.score in ("aimer", "random"):
        raise MoneError(
            f"--until-stable with --score {recipe.score}, which no text changes: leave one of them out"
        )
    if request.fit is not None or request.workdir or request.stream == "on" or ranks.n_rank() > 1:
        raise MoneError(NO_EARLY_END)


def _check_for_model(recipe: Recipe, outtype: str, source: Source) -> None:
    """Refuse what cannot be done with this model."""
    if TIER_COUNT_KEY.format(arch=source.spec.arch) in source.computing_config:
        raise MoneError(f"{source.name} has thin experts: prune the file that it was made from")
    if outtype not in OUTTYPES:
        raise MoneError(f"unknown --outtype {outtype}: choose from {', '.join(OUTTYPES)}")
    if recipe.method == "narrow" and (reason := not_narrow(source, recipe, outtype)):
        raise MoneError(f"--method narrow: {reason}: use --method drop")
    if recipe.novice == "joint" and weights_inputs(source.spec.arch):
        raise MoneError(
            f"--novice joint fits novices to the weights of experts' outputs, but {source.spec.arch} weights "
            "their inputs: use --novice mean"
        )
    if recipe.novice == "thin" and recipe.method == "mone":
        check_thin(source)
    even_counts(source.spec, recipe)
    if source.spec.kept_before and recipe.method != "mone":
        raise MoneError(
            f"{source.name} has novices, and a file by --method {recipe.method} has none: prune the file "
            "that it was made from, or use --method mone"
        )


def _with_thin(request: Request, recipe: Recipe, source: Source, saved: Calibration | None) -> Recipe:
    """Return the recipe with thin experts where the user left it open and they are possible.

    Where they are not, one line says why pruned experts become constants, or go.
    """
    left_open = not (request._novice or request.allocation or request.score or request.plan)
    if request.stock and request.method is None and left_open and recipe.ratio:
        return _narrow(request, recipe, source, saved)
    fits = request.fit is not None and request.ratio is None and not request.sequential
    if not left_open or recipe.method != "mone" or recipe.score in ("aimer", "random"):
        return recipe
    if not fits and (not recipe.ratio or request.fit is not None):
        return recipe
    if reason := _why_constants(request, source, saved):
        log.info("pruned experts become constants, none is thin: %s", reason)
        return recipe.changed(allocation="budget") if fits else recipe
    return recipe.changed(novice="thin", allocation="budget")


def _narrow(request: Request, recipe: Recipe, source: Source, saved: Calibration | None) -> Recipe:
    """Return the recipe of an ordinary file, whose experts have fewer channels where that is possible."""
    narrow = Recipe.of(
        recipe.ratio,
        method="narrow",
        min_kept=recipe.min_kept,
        guarded=recipe.guarded,
        seed=recipe.seed,
        mtp=recipe.mtp,
    )
    reason = "--fit and --protect are about whole ones" if request.fit or request.protect else ""
    if (
        reason := reason
        or _why_constants(request, source, saved)
        or not_narrow(source, narrow, request.outtype)
    ):
        log.info("the experts that stay keep all their channels: %s", reason)
        return recipe
    return narrow


def not_narrow(source: Source, recipe: Recipe, outtype: str = "auto") -> str:
    """Return why a file cannot have narrower experts, all as wide, empty where it can."""
    if reason := _not_thin(source):
        return reason
    inner = narrow_widths(source.spec, packed_together(source, outtype))[1:-1]
    try:
        possible = ordinary_widths(source, plan_without_scores(source.spec, recipe), inner)
    except MoneError as error:
        return str(error)
    return "" if possible else "no narrower width is one that the file can state"


def _why_constants(request: Request, source: Source, saved: Calibration | None) -> str:
    """Return why no expert can be thin, empty where some can."""
    if request.sequential:
        return "--sequential does not know them"
    if request.hf_out is not None:
        return "a checkpoint (--hf-out) has no place for them"
    if saved and not (request.files or request.datasets or _is_builtin(request, source, saved)):
        return "they take the text of the statistics once more: pass it with -f"
    if reason := _not_thin(source):
        return f"{source.name} can have none, since {reason}"
    block = packed_together(source, request.outtype, mixed=request.mixes_types(source))
    if len(widths_of(source.spec, block)) == 2:
        return f"experts of {source.spec.expert_size} channels are too narrow for it in this type"
    try:
        _check_channels(request, source)
    except MoneError as error:
        return str(error)
    return ""


def _is_builtin(request: Request, source: Source, saved: Calibration) -> bool:
    """Return whether statistics are of the built-in text as it would be read now.

    Of other texts that is known without a tokenizer, which takes seconds.
    """
    named = {name for part in saved.parts for name in part.sources}
    try:
        return named <= {BUILT_IN} and saved.corpus_sha256 == _text(request, source).sha256
    except MoneError:  # too short for the rows that are asked for now
        return False


def _check_channels(request: Request, source: Source) -> None:
    """Refuse a second pass whose sums have no room where they will lie, unless they lie there already."""
    folder = request.channels
    if folder is None or not ChannelStats.are_in(folder, source.spec.moe_layers):
        check_temporary(channel_bytes(source.spec), folder)


def check_thin(source: Source) -> None:
    """Refuse models whose experts cannot be thin."""
    if reason := _not_thin(source):
        raise MoneError(
            f"{source.name} can have no thin experts, since {reason}: pass --novice {DEFAULT_NOVICE}"
        )


def _not_thin(source: Source) -> str:
    return source.not_thin or ("it was pruned before" if source.spec.kept_before else "")


def _check_place(request: Request) -> None:
    """Refuse a run without a place for its output, or whose place cannot be written to."""
    if request.only_checkpoint:
        return
    if request.outfile is None:
        raise MoneError("where to? pass -o FILE, or -o FOLDER")
    out = Path(request.outfile)
    check_room(out / "model.gguf" if out.is_dir() else out)


def check_paths(job: Job) -> None:
    """Refuse outputs that would destroy what is read, each other, or a file that is not ours."""
    request, stats = job.request, job.request.stats_file
    outputs = {} if request.only_checkpoint else {"-o": job.outfile}
    inputs = {"MODEL": job.source.files}
    inputs["-f"] = [path for given in request.files if (path := Path(str(given).rpartition("=")[0] or given))]
    inputs["-f"] += [Path(given) for given in request.files]
    inputs["--protect"] = [file for file, _ in request.protected_texts]
    if request.plan is not None:
        inputs["--plan"] = [Path(request.plan)]
    if request.plan_out is not None:
        outputs["--plan-out"] = Path(request.plan_out)
    if request.imatrix is not None:
        outputs["--imatrix"] = Path(request.imatrix)
    if request.report is not None:
        outputs |= page_outputs(Path(request.report), overwrite=request.overwrite)
    if request.card is not None:
        check_card(Path(request.card))
    if stats is not None and stats.exists():
        inputs["--stats"] = [stats]
        sweep(stats)
    elif request.stats is not None and stats is not None:
        outputs["--stats"] = stats
    check_outputs(outputs, inputs, overwrite=request.overwrite)
    if request.hf_out is not None:
        folders = {"--workdir": request.workdir, "--card": request.card}
        others = {**inputs, **{option: [path] for option, path in outputs.items()}}
        others |= {option: [Path(path)] for option, path in folders.items() if path is not None}
        check_folder(Path(request.hf_out), others, ours=MADE_KEY)


def _stated(request: Request, source: Source, recipe: Recipe, saved: Calibration | None) -> Keys:
    """Return the keys that say which command makes the file.

    Statistics are a cache where there is a text, if they were computed as they would be now.
    """
    request = _begun(request, source)
    values = {each.name: getattr(request, each.name) for each in fields(request)}
    defaults = {each.name: each.default for each in fields(request) if each.default is not MISSING}
    defaults["n_row"], defaults["seq_len"] = replace(request, n_row=None, seq_len=None).chunks
    values["n_row"], values["seq_len"] = request.chunks
    unused = request.fit is None and not recipe.needs_statistics
    own = saved is None or (unused and not _with_imatrix(request, source, recipe, request.outtype))
    if saved and not own and _computed_as_now(request, source, saved):
        own = bool(request.files or request.datasets) or _is_builtin(request, source, saved)
    return stated(values, defaults, source, recipe, None if own else request.stats_file)


def _begun(request: Request, source: Source) -> Request:
    """Return the request with what its work folder was begun with, where that is not what is chosen now."""
    if request.workdir is None or not isinstance(source, Checkpoint) or source.substituted:
        return request
    if not (before := begun(Path(request.workdir) / "rank-0")):
        return request
    from mone_export.calibration.engines import Setup, pinned

    device = resolve_device(request.device)
    setup = Setup(device=device, dtype=request.dtype, stream=request.stream, memory=request.memory)
    now = pinned(source, setup)
    changed: dict[str, Any] = {
        name: before[option]
        for name, option in (("dtype", "--dtype"), ("stream", "--stream"))
        if getattr(request, name) == "auto" and before.get(option, now[option]) != now[option]
    }
    return replace(request, **changed)


def _computed_as_now(request: Request, source: Source, saved: Calibration) -> bool:
    """Return whether statistics are of the device and precision that are used now, as far as they say."""
    if not isinstance(source, Checkpoint):
        return True
    device = resolve_device(request.device).partition(":")[0]
    own = "float32" if device == "cpu" else str(source.config.dtype).removeprefix("torch.")
    wanted = {"device": device, "dtype": own if request.dtype == "auto" else request.dtype}
    return not differing({name: saved.made_with.get(name) for name in wanted}, wanted)


def _sized(request: Request, source: Source, recipe: Recipe, keys: Keys, progress: Progress | None) -> Job:
    """Return the job with its file's size, exact for the same number of experts in every layer.

    Raises `MoneError` for a model llama.cpp cannot convert, and a size that nothing fits.
    """
    device = ranks.own_device(request.device)
    if device != "auto":
        resolve_device(device)
    if request.fit is not None and source.spec.kept_before:
        raise MoneError(f"--fit cannot tell yet what {source.name} loses, which has novices: pass --ratio")
    if request.only_checkpoint:
        plans = (plan_without_scores(source.spec, each) for each in (recipe, replace(recipe, ratio=0.0)))
        size, whole = (checkpoint_size(source, plan) for plan in plans)
        return Job(request, source, recipe, request.outtype, size, whole, device, stated=keys)
    if request.fit is None:
        outtype = request.outtype
        imatrix = _with_imatrix(request, source, recipe, outtype)
        blank = plan_without_scores(source.spec, recipe)
        layout = layouts(source, blank, (outtype,), imatrix=imatrix, stated=keys)[outtype]
        sizes = layout.size, layout.size_with_all(source.spec)
        return Job(request, source, recipe, outtype, *sizes, device, stated=keys)
    found = candidates(
        source,
        recipe,
        int(request.fit),
        outtype=request.outtype,
        any_ratio=request.ratio is None,
        measured=partial(layouts, imatrix=request.with_imatrix, stated=keys),
        progress=progress,
    )
    if found[0].ratio == 0 and request.ratio is None:
        found = found[:1]  # the exactest type takes all experts: nothing else could be better
    largest = max(found, key=lambda item: item.size)
    return Job(
        request,
        source,
        replace(recipe, ratio=largest.ratio),
        largest.outtype,
        largest.size,
        largest.size_unpruned,
        device,
        candidates=tuple(found),
        stated=keys,
    )


def _room(asked: str, source: Source) -> int:
    """Return the size that this machine can hold, and say how it comes about."""
    found = room(source, asked)
    log.info("--fit %s: %s", asked, found)
    return found.size


def _announce(job: Job) -> None:
    """Say how large the file will be; raises `MoneError` when the disk has no room for it."""
    even = (job.recipe.allocation == "even" and not job.plan) or not job.recipe.ratio
    size, about = job.size, "" if even else "about "
    if job.limit is not None and (len(job.candidates) > 1 or not even):  # what is chosen may fill it
        size, about = job.limit, "at most "
    log.info("%s will have %s%s", job.outfile, about, as_size(size))
    check_room(job.outfile, needed=size, option="--hf-out" if job.request.only_checkpoint else "-o")
    if job.request.hf_out is not None and not job.request.only_checkpoint:
        folder, chosen = Path(job.request.hf_out), job.plan
        check_room(folder, option="--hf-out")
        needed = size if on_one_disk(job.outfile, folder) else 0
        needed += checkpoint_size(job.source, chosen or plan_without_scores(job.source.spec, job.recipe))
        check_room(folder, needed=needed, option="--hf-out")
    if command := job.source.projector_command(job.outfile):
        log.info("only the text part is exported; llama.cpp converts the other: %s", command)


def _check_text(job: Job, corpus: Corpus) -> None:
    """Refuse tokens that the model has no embeddings for; warn of rows longer than it was made for."""
    n_vocab, window = job.source.limits
    if n_vocab is not None and (largest := int(corpus.ids.max())) >= n_vocab:
        raise MoneError(
            f"the tokenizer gives token {largest}, the model has embeddings for {n_vocab}: the tokenizer is "
            "another model's, get this model's own"
        )
    if window is not None and (seq_len := corpus.ids.shape[1]) > window:
        log.warning(
            "rows of %d tokens are longer than the model's window of %d: -c %d", seq_len, window, window
        )


def _check_search(job: Job) -> None:
    """Refuse to try counts in a model that does not fit into memory as a whole."""
    if job.streamed:
        raise MoneError(
            "--allocate search tries counts in a model that is in memory as a whole, and this one does not "
            "fit: pass --allocate sensitivity"
        )


def _text(request: Request, source: Source, *, n_more: int = 0) -> Corpus:
    """Return the text to calibrate on, and so many rows after it."""
    n_row, seq_len = request.chunks
    return read_corpus(
        request.files,
        source.tokenizer(),
        datasets=request.datasets,
        field=request.field,
        seed=request.seed,
        n_row=n_row + n_more,
        seq_len=seq_len,
    )


def _with_text(job: Job) -> Job:
    """Return the job with the text it needs: none where the statistics are enough, or not needed."""
    request, recipe = job.request, job.recipe
    searches = recipe.allocation == "search" and not job.plan
    asks_model = searches or request.sequential or recipe.novice in ("joint", "thin")
    given = bool(request.files or request.datasets)
    saved_is_enough = job.saved and not given and not asks_model
    enough = saved_is_enough and not job.lacks_sensitivity
    if enough or not job.needs_statistics:
        return job
    n_row, _ = request.chunks
    whole = _text(request, job.source, n_more=HELD_OUT_ROWS if searches else 0)
    if job.saved and saved_is_enough and head(whole, n_row).sha256 != job.saved.corpus_sha256:
        return job  # what is missing cannot be measured on this text
    _check_text(job, whole)
    return replace(job, corpus=head(whole, n_row), held_out=whole.tokens[n_row:] if searches else None)
