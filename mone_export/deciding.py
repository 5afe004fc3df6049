"""From statistics to a plan: scores, a choice of type and ratio, counts, and the ways that ask the model.

Statistics are enough for most of it. The ways that ask the model itself load it here, again, and let it go:
searching the layers' counts, calibrating layer after layer, `joint` novices, the score `aimer`.
"""

import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mone_export.artifacts import Calibration, Candidate, ChannelStats, Corpus, Plan, Scores
from mone_export.calibration.corpus import head
from mone_export.calibration.work_folder import alone_in
from mone_export.errors import MoneError
from mone_export.fitting import judge
from mone_export.lazily import Tensor
from mone_export.output.checkpoints import checkpoint_size
from mone_export.output.thin_experts import Thinner
from mone_export.output.writing import measure, ordinary_widths, packed_together
from mone_export.paths import check_temporary
from mone_export.pruning.allocation import Counts, allocate, possible
from mone_export.pruning.fates import plan_fates, plan_narrow
from mone_export.pruning.novices import joint_novices, novices
from mone_export.pruning.planning import plan, plan_without_scores
from mone_export.pruning.protecting import protect, with_count
from mone_export.pruning.scoring import random_scores, score, score_weights
from mone_export.pruning.thinning import channel_bytes, down_projections, narrow_widths, thin, widths_of
from mone_export.recipe import Recipe
from mone_export.request import Job, check_thin
from mone_export.runtime import Progress
from mone_export.source import Source
from mone_export.spending import Spending, missing_without_channels

if TYPE_CHECKING:
    from mone_export.calibration.engines import Engine
    from mone_export.calibration.loading import Model

log = logging.getLogger(__name__)

_N_SIZE, _CLOSE = 8, 0.002  # tries to meet a size, and how close is close enough


Divergence = Callable[[Mapping[int, Sequence[int]], Mapping[int, Tensor]], float]
"""From pruned experts and novices by layer to what they do to the model, in nats per token."""


def scored(job: Job, calibration: Calibration | None) -> Scores:
    """Score the experts, from the statistics or the weights; protected ones above all others."""
    recipe = job.recipe
    if recipe.score == "aimer" and recipe.ratio and not job.plan:
        found = score_weights(job.source.spec, job.engine().experts())
        scores = replace(found, calibration=calibration)
    elif calibration is None:
        scores = random_scores(job.source.spec, seed=recipe.seed)
    else:
        scores = score(calibration, recipe.score, guarded=recipe.guarded, seed=recipe.seed)
    return protect(scores, job.protected)


def with_best_candidate(job: Job, scores: Scores) -> Job:
    """Choose among a job's candidates by their estimated errors, and fix ratio and type; the best first."""
    if len(job.candidates) < 2 or scores.calibration is None:
        return job

    def planned(item: Candidate) -> Plan:
        return plan(scores, recipe=replace(job.recipe, ratio=item.ratio))

    possible = [item for item in job.candidates if not scores.protected or _can(planned, item)]
    if not possible:
        planned(job.candidates[0])  # raises the reason
    judged = judge(possible, job.source, scores.calibration, planned)
    best = judged[0]
    return replace(
        job,
        candidates=tuple(judged),
        recipe=replace(job.recipe, ratio=best.ratio),
        outtype=best.outtype,
        size=best.size,
        size_unpruned=best.size_unpruned,
    )


def _can(planned: Callable[[Candidate], Plan], item: Candidate) -> bool:
    """Say whether a candidate keeps all experts that must stay."""
    try:
        planned(item)
    except MoneError:
        return False
    return True


def counted(job: Job, calibration: Calibration | None, chosen: Plan) -> Plan:
    """Return a plan that says how many of its protected experts the scores alone would have pruned.

    The layers keep as many as they do; of a budget that was counted already.
    """
    if not job.protected or chosen.recipe.allocation == "budget":
        return chosen
    unprotected = scored(replace(job, protected=()), calibration)
    return with_count(chosen, plan(unprotected, chosen.n_kept, recipe=chosen.recipe))


def decided(job: Job, scores: Scores, *, progress: Progress | None = None) -> Plan:
    """Return the plan of a job's recipe.

    Where the layers keep different numbers, their types may make the file larger than the same number
    everywhere would: for a size that was asked for, some experts more go. A plan made before is taken as
    it is.
    """
    if job.plan:
        return job.plan
    recipe, limit = possible(job.recipe, scores.calibration), job.limit
    if recipe.allocation == "search" and recipe.ratio:
        return plan(scores, _searched(job, scores, progress), recipe=recipe)
    chosen = plan(scores, recipe=recipe)
    n_less = 0
    while limit is not None and recipe.ratio and (size := file_size(job, chosen)) > limit:
        per_expert = (job.size_unpruned - size) / sum(len(layer.pruned) for layer in chosen.layers)
        n_less += math.ceil((size - limit) / per_expert)
        chosen = plan(scores, allocate(scores, recipe, n_less=n_less), recipe=recipe)
    return chosen


def budgeted(
    job: Job, calibration: Calibration, scores: Scores, *, progress: Progress | None = None
) -> tuple[Job, Plan, Thinner | None]:
    """Return the plan that spends a budget on all experts, and what makes the thin ones of it.

    The budget is one of channels, or where the job has `candidates`, of bytes: then the best of them is
    chosen, and fixed in the job. A plan made before is taken as it is.
    """
    if job.plan and not job.plan.has_thin:
        return job, job.plan, None
    mixed = job.plan.mixes_types if job.plan else job.mixed
    block = packed_together(job.source, job.outtype, mixed=mixed)
    widths: tuple[int, ...] = (0, job.source.spec.expert_size)
    thinner = None
    narrow = job.recipe.method == "narrow"
    if job.recipe.novice == "thin":
        possible_widths = _widths(job.source, block, job.recipe)
        asked = {tier.width for layer in job.plan.layers for tier in layer.tiers} if job.plan else set[int]()
        asked |= {job.plan.width} if job.plan else set()
        widths = tuple(sorted({*possible_widths, *asked}))
        thinner = fitted(
            job.engine(),
            _corpus(job, calibration),
            widths,
            folder=job.request.channels,
            centred=not narrow,
            progress=progress,
        )
    missing = thinner.errors if thinner else missing_without_channels(scores)
    if job.plan:
        return job, job.plan, thinner
    if narrow:
        return job, plan_narrow(scores, missing, widths, job.recipe), thinner
    spending = Spending(job.source, scores, job.recipe, widths, missing)
    if job.candidates:
        job, chosen = spent(job, spending, progress=progress)
    else:
        chosen = plan_fates(scores, missing, widths, job.recipe)
    if job.protected:
        spending = replace(spending, scores=scored(replace(job, protected=()), calibration))
        chosen = with_count(chosen, _unprotected(job, spending))
    return job, chosen, thinner


def _unprotected(job: Job, spending: Spending) -> Plan:
    """Return what would become of the experts if none were protected, of the type that was chosen."""
    if not job.candidates:
        return plan_fates(spending.scores, spending.missing, spending.widths, job.recipe)
    best, limit = job.candidates[0], job.limit
    assert limit is not None
    return spending.plan(best, limit, mixed=job.mixes(best))[0]


def spent(job: Job, spending: Spending, *, progress: Progress | None = None) -> tuple[Job, Plan]:
    """Return the job with its candidates judged, the best first and fixed, and its plan, to the byte."""
    limit, found = job.limit, []
    assert limit is not None
    _ = spending.rounding  # which raises where llama.cpp is missing: that is no reason to leave a type out
    for number, item in enumerate(job.candidates, start=1):
        if progress:
            progress(number, len(job.candidates), "sharing out bytes (types)")
        with suppress(MoneError):  # what must stay does not fit in this type
            chosen, error = spending.plan(item, limit, mixed=job.mixes(item))
            found.append((replace(item, error=error), chosen))
    found.sort(key=lambda each: each[0].error or 0.0)
    for place, (item, chosen) in enumerate(found):
        if fits := _to_the_byte(job, spending, item, chosen):
            others = [
                replace(other, ratio=plan.share_pruned, size=limit, mixed=job.mixes(other))
                for other, plan in found[place + 1 :]
            ]
            return replace(fits[0], candidates=(*fits[0].candidates, *others)), fits[1]
    raise MoneError(f"the experts that must stay do not fit {limit} bytes: pass a larger --fit")


def _to_the_byte(job: Job, spending: Spending, item: Candidate, chosen: Plan) -> tuple[Job, Plan] | None:
    """Return the job with a candidate alone and fixed, and its plan for a file that is just small enough.

    What a plan takes is known but for alignment and the head; from `chosen` on, what is over or left is
    corrected. None where no plan fits.
    """
    limit, fits = job.limit, None
    assert limit is not None
    room, step = limit, spending.least_step(item)
    for _ in range(_N_SIZE):
        recipe = replace(job.recipe, ratio=chosen.share_pruned)  # the file states it
        chosen = replace(chosen, recipe=recipe)
        job = replace(job, recipe=recipe, outtype=item.outtype, size_unpruned=item.size_unpruned)
        size = measure(job.source, chosen, outtype=job.rounding)
        if size <= limit and (fits is None or size > fits[0].size):
            fits = replace(job, size=size), chosen
        if 0 <= limit - size < _CLOSE * limit:
            break
        before, room = chosen.layers, room + limit - size
        try:
            chosen, _ = spending.plan(item, room, mixed=job.mixes(item))
            if chosen.layers == before and size > limit:  # an expert is a larger step than what is over
                room, step = room - step, 2 * step
                chosen, _ = spending.plan(item, room, mixed=job.mixes(item))
        except MoneError:
            break
    if fits is None:
        return None
    job, chosen = fits
    best = replace(
        item,
        ratio=chosen.share_pruned,
        size=job.size,
        mixed=job.mixes(item),
    )
    return replace(job, candidates=(best,)), chosen


def plan_thin(
    model: "Model | Engine",
    corpus: Corpus,
    scores: Scores,
    *,
    ratio: float,
    outtype: str = "auto",
    progress: Progress | None = None,
    **choices: Any,
) -> tuple[Plan, Thinner]:
    """Return a plan with thin experts for a file of a type, and what `write` makes them of (its `novices`).

    The corpus, which the scores' calibration is of, runs through the model once more. `choices` are those of
    `Recipe.of`, such as the method `narrow`. Raises `MoneError` for a model that cannot have thin experts.
    """
    from mone_export.calibration.engines import engine_of

    engine = engine_of(model)
    check_thin(engine.source)
    narrow = choices.get("method") == "narrow"
    recipe = Recipe.of(ratio, novice=None if narrow else "thin", score=scores.score, **choices)
    block = packed_together(engine.source, outtype)
    widths = _widths(engine.source, block, recipe)
    thinner = fitted(engine, corpus, widths, centred=not narrow, progress=progress)
    return (plan_narrow if narrow else plan_fates)(scores, thinner.errors, widths, recipe), thinner


def _widths(source: Source, block: int, recipe: Recipe) -> tuple[int, ...]:
    """Return the widths that experts may have, from 0 to their own."""
    if recipe.method != "narrow":
        return widths_of(source.spec, block)
    none, *inner, whole = narrow_widths(source.spec, block)
    return (none, *ordinary_widths(source, plan_without_scores(source.spec, recipe), inner), whole)


def fitted(
    engine: "Engine",
    corpus: Corpus,
    widths: Sequence[int],
    *,
    folder: Path | None = None,
    centred: bool = True,
    progress: Progress | None = None,
) -> Thinner:
    """Run the text once more, and fit experts of each of `widths` channels, with a constant if `centred`.

    What the text showed is left in a folder, where a later call finds it and does not run the text, or in a
    temporary one, as long as there is what makes thin experts of it.
    """
    spec, temporary = engine.source.spec, None
    if folder is None:
        temporary = tempfile.TemporaryDirectory(prefix="mone-export-")
        folder = Path(temporary.name)
    if ChannelStats.are_in(folder, spec.moe_layers):
        log.info("the second pass is in %s", folder)
    else:
        check_temporary(channel_bytes(spec), folder)
        folder.mkdir(parents=True, exist_ok=True)
        with alone_in(folder):
            engine.measure_channels(corpus, folder, progress=progress)
    if len(widths) == 2:
        log.warning(
            "experts of %d channels cannot be thinner in a type that packs more together: each stays whole "
            "or becomes a constant",
            spec.expert_size,
        )
    found = {}
    for number, (layer, experts) in enumerate(engine.experts(), start=1):
        stats, bias = ChannelStats.load(folder, layer), getattr(experts, "down_proj_bias", None)
        found[layer] = thin(stats, down_projections(experts), widths, bias, centred=centred)
        if progress:
            progress(number, len(spec.moe_layers), "fitting thin experts (layers)")
    return Thinner(found, temporary or folder, centred=centred)


def file_size(job: Job, chosen: Plan) -> int:
    """Return the bytes of a plan's file; of the checkpoint's weights where that is all there will be."""
    if job.request.only_checkpoint:
        return checkpoint_size(job.source, chosen)
    uniform = len(set(chosen.n_kept.values())) == 1 and not chosen.n_tier and not chosen.mixes_types
    if uniform and chosen.recipe.allocation == job.recipe.allocation:
        return job.size  # what was measured before
    return measure(job.source, chosen, outtype=job.rounding)


def after_pruned(
    job: Job, calibration: Calibration, counts: Counts, *, progress: Progress | None = None
) -> Calibration:
    """Return the statistics of each layer after the pruned layers before it (`--sequential`)."""
    recipe = job.recipe
    return job.engine().recalibrate(
        _corpus(job, calibration),
        calibration,
        lambda so_far: plan(scored(job, so_far), counts, recipe=recipe),
        lambda stats: novices(stats, recipe.known_novice),
        progress=progress,
    )


def fitted_novices(
    job: Job, calibration: Calibration, chosen: Plan, *, progress: Progress | None = None
) -> dict[int, Tensor]:
    """Return novices [n_expert, d] per layer that make up for a plan's pruned experts together."""
    residuals = job.engine().measure_residuals(_corpus(job, calibration), chosen, progress=progress)
    return {
        layer: joint_novices(calibration.layers[layer], residual) for layer, residual in residuals.items()
    }


def _searched(job: Job, scores: Scores, progress: Progress | None) -> Counts:
    """Return the counts per layer that do the model the least harm found, on rows no calibration saw."""
    assert job.held_out is not None and scores.calibration is not None
    divergence = job.engine(stream="off").divergence(job.held_out)
    return allocate(scores, job.recipe, trial=Trial(divergence, scores, job.recipe, progress))


class Trial:
    """Counts in, the divergence out that they cause in the loaded model."""

    def __init__(
        self, divergence: Divergence, scores: Scores, recipe: Recipe, progress: Progress | None = None
    ) -> None:
        """Take the model's divergence on some rows, and what else the plans depend on."""
        assert scores.calibration is not None
        self._divergence, self._scores, self._recipe = divergence, scores, recipe
        self._novices: Mapping[int, Tensor] = {
            layer: novices(stats, recipe.known_novice) for layer, stats in scores.calibration.layers.items()
        }
        self._progress = progress
        self._n_done = 0

    def __call__(self, counts: Counts) -> float:
        """Return the mean KL divergence in nats per token."""
        self._n_done += 1
        if self._progress:
            self._progress(self._n_done, 0, "searching the counts of the layers")
        chosen = plan(self._scores, counts, recipe=self._recipe)
        return self._divergence({layer.layer: layer.pruned for layer in chosen.layers}, self._novices)


def _corpus(job: Job, calibration: Calibration) -> Corpus:
    """Return the text that was calibrated on: the calibration may have ended early."""
    assert job.corpus is not None
    return head(job.corpus, calibration.n_token // job.corpus.tokens.shape[1])
