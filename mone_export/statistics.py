"""collect(): the statistics that a job needs, saved before or measured now.

Around the calibration itself lies what to do with a work folder, which saved statistics are good enough, and
how much text is enough.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mone_export import __version__
from mone_export.artifacts import Calibration, Corpus, ExpertStats, Stability, differing
from mone_export.calibration import ranks
from mone_export.calibration.corpus import head
from mone_export.calibration.stability import Watch
from mone_export.calibration.work_folder import WorkFolder, alone_in, begun
from mone_export.errors import MoneError, first_line
from mone_export.lazily import torch
from mone_export.pruning.allocation import sensitivities
from mone_export.pruning.damage import relative_error
from mone_export.pruning.novices import novices
from mone_export.pruning.planning import plan
from mone_export.pruning.protecting import most_needed
from mone_export.pruning.scoring import score
from mone_export.request import NO_EARLY_END, Job
from mone_export.runtime import Progress
from mone_export.source.shape import Dtype, Stream

if TYPE_CHECKING:
    from mone_export.calibration.engines import Engine
    from mone_export.calibration.loading import Model

log = logging.getLogger(__name__)

_BUILTIN_TEXT = (
    "calibrating on the built-in text, mostly Python code and technical English; "
    "for other uses pass text like yours: -f FILE"
)

# `calibration.engines` brings in most of transformers, which takes longer than all that saved statistics
# need: so it is imported where a model is at work.


def collect(
    job: Job, *, progress: Progress | None = None
) -> tuple[Job, Calibration | None, Stability | None]:
    """Return a job's statistics, and how stable the decision became while they grew, if that is known.

    The job that is returned knows the experts that are protected. Nothing is measured where nothing depends
    on it. Of several processes (torchrun) all take part. Raises `MoneError` for saved statistics of another
    model or text, and for a protected text of fewer rows than processes.
    """
    if not (job.needs_statistics or job.protected_texts):
        return job, None, None
    _check_shares(job)
    workdir = job.request.workdir
    alone = alone_in(Path(workdir) / f"rank-{ranks.rank()}") if workdir else nullcontext()
    with alone, ranks.joined():
        model_sha256 = ranks.from_first(
            job.source.fingerprint(progress=progress) if ranks.rank() == 0 else ""
        )
        job, folder = _opened(job, model_sha256) if job.request.workdir else (job, None)
        engine = cache(job.engine)
        calibration: Calibration | None = None
        stability: Stability | None = None
        if job.saved and job.needs_statistics:
            calibration = _saved(job, job.saved, model_sha256)
        elif job.needs_statistics:
            calibration, stability = _measured(job, model_sha256, folder, engine, progress)
        if folder is not None:
            folder.clear()
        if job.protected_texts:
            job = _with_protected(job, model_sha256, engine, progress)
    if calibration and job.saved:  # the first process does so alone: the others have left
        calibration = _completed(job, calibration, engine, progress)
    return job, calibration, stability


def known_protected(job: Job) -> Job | None:
    """Return the job with its protected experts where saved statistics of all their texts know them."""
    found = []
    for text, n in job.protected_texts:
        file = _beside(job, text)
        if file is None or not file.exists():
            return None
        found.append(most_needed(Calibration.load(file), n))
    return replace(job, protected=tuple(found))


def _check_shares(job: Job) -> None:
    """Refuse protected texts that are too short to be shared out, before the calibration."""
    for text, _ in job.protected_texts:
        file, n_row = _beside(job, text), len(text.tokens)
        if n_row < ranks.n_rank() and not (file and file.exists()):
            raise MoneError(
                f"--protect {text.name} is {n_row} rows of text for {ranks.n_rank()} processes: a longer "
                "text, a smaller --ctx-size, or fewer processes"
            )


def _with_protected(
    job: Job, model_sha256: str, engine: Callable[[], "Engine"], progress: Progress | None
) -> Job:
    """Return the job with its protected experts: their texts run like the calibration's, unless saved."""
    found = []
    for text, n in job.protected_texts:
        file = _beside(job, text)
        if ranks.from_first(file is not None and file.exists()):
            assert file is not None
            calibration = Calibration.load(file)
            check_origin(job, calibration, model_sha256, text, stats=file)
        else:
            calibration = engine().calibrate(text, model_sha256=model_sha256, progress=progress)
            if file is not None and ranks.rank() == 0:
                calibration.save(file)
        if ranks.rank() == 0:  # no other has the sums of all
            found.append(most_needed(calibration, n))
        ranks.wait()
    return replace(job, protected=tuple(found))


def _beside(job: Job, text: Corpus) -> Path | None:
    """Return where the statistics of a protected text are kept: beside the others, named by its rows."""
    stats = job.request.stats_file
    return stats and stats.with_name(f"{stats.name}.protect-{text.sha256[:12]}")


def _opened(job: Job, model_sha256: str) -> tuple[Job, WorkFolder]:
    """Open the work folder; what the job leaves to `auto` stays as it was when the folder was begun."""
    from mone_export.calibration.engines import pinned

    request = job.request
    assert request.workdir is not None
    folder = Path(request.workdir) / f"rank-{ranks.rank()}"
    before: Mapping[str, Any] = begun(folder)
    dtype: Dtype = before.get("--dtype", "auto") if request.dtype == "auto" else request.dtype
    stream: Stream = before.get("--stream", "auto") if request.stream == "auto" else request.stream
    options = pinned(job.source, replace(job.setup, dtype=dtype, stream=stream))
    text = job.corpus or job.saved
    work: dict[str, Any] = {
        "model": model_sha256,
        "config": hashlib.sha256(json.dumps(job.source.computing_config).encode()).hexdigest(),
        "mone-export": __version__,
        "inputs": "of all matrices",  # which steps of before have not
        "text": text.sha256 if isinstance(text, Corpus) else text.corpus_sha256 if text else "",
        **options,
        "processes": ranks.n_rank(),
    }
    decided = replace(
        request, dtype=options.get("--dtype", request.dtype), stream=options.get("--stream", request.stream)
    )
    return replace(job, request=decided), WorkFolder(folder, work)


def _saved(job: Job, saved: Calibration, model_sha256: str) -> Calibration:
    """Return saved statistics that are of this model and text."""
    corpus, request = job.corpus, job.request
    if corpus and request.until_stable:  # it may have ended early
        corpus = head(corpus, saved.n_token // corpus.tokens.shape[1])
    check_origin(job, saved, model_sha256, corpus)
    return saved


def _completed(
    job: Job, saved: Calibration, engine: Callable[[], "Engine"], progress: Progress | None
) -> Calibration:
    """Return saved statistics with the sensitivities that a run which was ended has not measured."""
    if not job.lacks_sensitivity or job.corpus is None or ranks.rank() > 0:
        return saved
    corpus = head(job.corpus, saved.n_token // job.corpus.tokens.shape[1])
    found = with_sensitivity(engine(), corpus, saved, progress=progress)
    if found.sensitivity and job.request.stats_file is not None:
        found.save(job.request.stats_file)
    return found


def _measured(
    job: Job,
    model_sha256: str,
    folder: WorkFolder | None,
    engine: Callable[[], "Engine"],
    progress: Progress | None,
) -> tuple[Calibration, Stability | None]:
    """Calibrate; save the statistics at once, and again with the layers' sensitivities."""
    request = job.request
    assert job.corpus is not None
    if not (request.files or request.datasets):
        log.info(_BUILTIN_TEXT)
    _announce_passes(job)
    if request.until_stable and job.streamed:
        raise MoneError(NO_EARLY_END)
    watch = _watch(job, job.corpus)
    calibration = engine().calibrate(
        job.corpus,
        model_sha256=model_sha256,
        work=folder,
        progress=progress,
        watch=watch,
    )
    if ranks.rank() == 0:
        stats = request.stats_file
        if stats is not None:
            calibration.save(stats)
        if job.probed or stats is not None:
            corpus = head(job.corpus, calibration.n_token // job.corpus.tokens.shape[1])
            calibration = with_sensitivity(engine(), corpus, calibration, progress=progress)
            if stats is not None and calibration.sensitivity:
                calibration.save(stats)
    ranks.wait()
    return calibration, watch.stability() if watch else None


def _announce_passes(job: Job) -> None:
    """Say so where the text runs twice, of which the first pass shows half the time only."""
    assert job.corpus is not None
    if job.recipe.novice == "thin":
        log.info(
            "%d tokens run through the model twice, the second time for thin experts: expect about twice the "
            "time that calibrating shows as left; fewer --chunks take less, --novice least-squares half",
            job.corpus.tokens.numel(),
        )


def calibrate(
    model: "Model | Engine", corpus: Corpus, *, memory: int | None = None, progress: Progress | None = None
) -> Calibration:
    """Run a corpus through a model and return its experts' statistics and its layers' sensitivities.

    The same as `mone-export` measures. Raises `MoneError` when the model's outputs are not finite.
    """
    from mone_export.calibration.engines import engine_of

    sha256, engine = model.source.fingerprint(progress=progress), engine_of(model, memory=memory)
    found = engine.calibrate(corpus, model_sha256=sha256, progress=progress)
    return with_sensitivity(engine, corpus, found, progress=progress)


def with_sensitivity(
    model: "Model | Engine", corpus: Corpus, calibration: Calibration, *, progress: Progress | None = None
) -> Calibration:
    """Return the calibration with its layers' sensitivities: a little of its text runs once more.

    In each layer the worse half of the experts by score `mone` have novices for it. The quotient holds for
    other ratios, scores and novices. Where the model cannot be run so, the sensitivities stay unknown.
    """
    from mone_export.calibration.engines import engine_of

    halved = plan(score(calibration, "mone", guarded=False), ratio=0.5, min_kept=1, allocation="even")
    pruned = {layer.layer: layer.pruned for layer in halved.layers}
    means = {layer: novices(calibration.layers[layer], "mean") for layer in pruned}
    errors = {layer: relative_error(calibration.layers[layer], pruned[layer], "mean") for layer in pruned}
    try:
        damage = engine_of(model).damage_by_layer(corpus.tokens, pruned, means, progress=progress)
    except (RuntimeError, MoneError) as error:  # out of memory is one
        log.warning("how much the layers matter could not be measured (%s)", first_line(error))
        return calibration
    return replace(calibration, sensitivity=sensitivities(damage, errors))


def check_origin(
    job: Job, saved: Calibration, model_sha256: str, corpus: Corpus | None, *, stats: Path | None = None
) -> None:
    """Insist that saved statistics are of this model, and of this text if one is given; say of what they are.

    Raises `MoneError` with what differs: both fingerprints, or the precision. Other versions are warned of.
    """
    stats, text_sha256 = stats or job.request.stats_file, saved.corpus_sha256
    remedy = "choose another --stats file, or the same model, text, --chunks and --ctx-size"
    for what, found, wanted in (
        ("model", saved.model_sha256, model_sha256),
        ("calibration text", text_sha256, text_sha256 if corpus is None else corpus.sha256),
    ):
        if found != wanted:
            raise MoneError(
                f"{stats} was made from another {what} (SHA-256 {found[:16]}, this one is {wanted[:16]}): "
                f"{remedy}"
            )
    dtype = saved.made_with.get("dtype", job.request.dtype)
    if job.request.dtype not in ("auto", dtype):
        raise MoneError(
            f"{stats} was made in {dtype}, --dtype asks for {job.request.dtype}: choose another --stats "
            "file, or leave --dtype out"
        )
    now = {"mone-export": __version__, "torch": torch.__version__}
    then = {name: saved.made_with.get(name, version) for name, version in now.items()}
    if versions := differing(then, now):
        was = ", ".join(f"{name} {then[name]}" for name in versions)
        log.warning("%s was made by %s, which may have computed otherwise", stats, was)
    log.info("statistics of %d tokens of %s from %s", saved.n_token, saved.corpus_name, stats)


def _watch(job: Job, corpus: Corpus) -> Watch | None:
    """Return what follows the decision while text goes by; None where none changes it, or none is near."""
    recipe = job.recipe
    if not recipe.ratio or job.plan or job.candidates or recipe.score in ("aimer", "random"):
        return None
    n_token = corpus.tokens.numel() // ranks.n_rank()
    return Watch(_Decision(job), n_token=n_token, until=job.request.until_stable)


class _Decision:
    """From layers' statistics so far, the experts that a job's scores would prune in each.

    As many in each layer as the ratio says, whatever the layer's share of the plan will be.
    """

    def __init__(self, job: Job) -> None:
        self._spec = job.source.spec
        self._recipe = replace(job.recipe, allocation="even", novice=job.recipe.known_novice)

    def __call__(self, layers: Mapping[int, ExpertStats]) -> Mapping[int, frozenset[int]]:
        so_far = Calibration(
            spec=replace(self._spec, moe_layers=tuple(layers)),
            model_sha256="",
            corpus_sha256="",
            corpus_name="",
            n_token=0,
            layers=layers,
        )
        recipe = self._recipe
        scores = score(so_far, recipe.score, guarded=recipe.guarded, seed=recipe.seed)
        return {layer.layer: frozenset(layer.pruned) for layer in plan(scores, recipe=recipe).layers}
