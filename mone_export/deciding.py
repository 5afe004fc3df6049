"""From statistics to a plan: scores, a choice of type and ratio, counts, and the ways that ask the model.

Statistics are enough for most of it. The ways that ask the model itself load it here, again, and let it go:
searching the layers' counts, calibrating layer after layer, `joint` novices, the score `aimer`.
"""

import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mone_export.artifacts import Calibration, ChannelStats, Corpus, Plan, Scores
from mone_export.calibration.corpus import head
from mone_export.fitting import judge
from mone_export.lazily import Tensor
from mone_export.output.thin_experts import Thinner
from mone_export.output.writing import measure, packed_together
from mone_export.paths import check_temporary
from mone_export.pruning.allocation import Counts, allocate, possible
from mone_export.pruning.fates import plan_fates
from mone_export.pruning.novices import joint_novices, novices
from mone_export.pruning.planning import plan
from mone_export.pruning.scoring import random_scores, score, score_weights
from mone_export.pruning.thinning import channel_bytes, down_projections, thin, widths_of
from mone_export.recipe import Recipe
from mone_export.request import Job, check_thin
from mone_export.runtime import Progress

if TYPE_CHECKING:
    from mone_export.calibration.engines import Engine
    from mone_export.calibration.loading import Model

log = logging.getLogger(__name__)


Divergence = Callable[[Mapping[int, Sequence[int]], Mapping[int, Tensor]], float]
"""From pruned experts and novices by layer to what they do to the model, in nats per token."""


def scored(job: Job, calibration: Calibration | None) -> Scores:
    """Score the experts, from the statistics or the weights."""
    recipe = job.recipe
    if recipe.score == "aimer" and recipe.ratio and not job.plan:
        scores = score_weights(job.source.spec, job.engine().experts())
        return replace(scores, calibration=calibration)
    if calibration is None:
        return random_scores(job.source.spec, seed=recipe.seed)
    return score(calibration, recipe.score, guarded=recipe.guarded, seed=recipe.seed)


def with_best_candidate(job: Job, scores: Scores) -> Job:
    """Choose among a job's candidates by their estimated errors, and fix ratio and type; the best first."""
    if len(job.candidates) < 2 or scores.calibration is None:
        return job
    judged = judge(
        job.candidates,
        job.source,
        scores.calibration,
        lambda item: plan(scores, recipe=replace(job.recipe, ratio=item.ratio)),
    )
    best = judged[0]
    return replace(
        job,
        candidates=tuple(judged),
        recipe=replace(job.recipe, ratio=best.ratio),
        outtype=best.outtype,
        size=best.size,
        size_between=best.size_between,
        size_unpruned=best.size_unpruned,
    )


def decided(job: Job, scores: Scores, *, progress: Progress | None = None) -> Plan:
    """Return the plan of a job's recipe.

    Where the layers keep different numbers, their types may make the file larger than the same number
    everywhere would: for a size that was asked for, some experts more go. A plan made before is taken as
    it is.
    """
    if job.plan:
        return job.plan
    recipe, limit = possible(job.recipe, scores.calibration), job.request.fit
    if recipe.allocation == "search" and recipe.ratio:
        return plan(scores, _searched(job, scores, progress), recipe=recipe)
    chosen = plan(scores, recipe=recipe)
    n_less = 0
    while limit is not None and recipe.ratio and (size := file_size(job, chosen)) > limit:
        per_expert = (job.size_unpruned - size) / sum(len(layer.pruned) for layer in chosen.layers)
        n_less += math.ceil((size - limit) / per_expert)
        chosen = plan(scores, allocate(scores, recipe, n_less=n_less), recipe=recipe)
    return chosen


def thinned(
    job: Job, calibration: Calibration, scores: Scores, *, progress: Progress | None = None
) -> tuple[Plan, Thinner]:
    """Return the plan that spends the budget on whole and thin experts, and what makes the thin ones."""
    block = packed_together(job.source, job.outtype)
    corpus = _corpus(job, calibration)
    return fitted_plan(job.engine(), corpus, scores, job.recipe, block=block, progress=progress)


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
    `Recipe.of`. Raises `MoneError` for a model that cannot have thin experts.
    """
    from mone_export.calibration.engines import engine_of

    engine = engine_of(model)
    check_thin(engine.source)
    recipe = Recipe.of(ratio, novice="thin", score=scores.score, **choices)
    block = packed_together(engine.source, outtype)
    return fitted_plan(engine, corpus, scores, recipe, block=block, progress=progress)


def fitted_plan(
    engine: "Engine",
    corpus: Corpus,
    scores: Scores,
    recipe: Recipe,
    *,
    block: int,
    progress: Progress | None = None,
) -> tuple[Plan, Thinner]:
    """Run the text once more, fit thin experts, and spend a recipe's budget; `block` is that of `widths_of`.

    What the text showed is in a temporary folder as long as there is what makes thin experts of it.
    """
    spec = scores.spec
    check_temporary(channel_bytes(spec))
    temporary = tempfile.TemporaryDirectory(prefix="mone-export-")
    folder = Path(temporary.name)
    engine.measure_channels(corpus, folder, progress=progress)
    widths, found = widths_of(spec, block), {}
    if len(widths) == 2:
        log.warning(
            "experts of %d channels cannot be thinner in a type that packs %d together: each stays whole or "
            "becomes a constant",
            *(spec.expert_size, block),
        )
    for number, (layer, experts) in enumerate(engine.experts(), start=1):
        stats, bias = ChannelStats.load(folder, layer), getattr(experts, "down_proj_bias", None)
        found[layer] = thin(stats, down_projections(experts), widths, bias)
        if progress:
            progress(number, len(spec.moe_layers), "fitting thin experts (layers)")
    errors = {layer: each.errors.numpy() for layer, each in found.items()}
    return plan_fates(scores, errors, widths, recipe), Thinner(found, temporary)


def file_size(job: Job, chosen: Plan) -> int:
    """Return the bytes of a plan's file."""
    if len(set(chosen.n_kept.values())) == 1 and chosen.recipe.allocation == job.recipe.allocation:
        return job.size  # what was measured before
    size, _ = measure(job.source, chosen, outtype=job.rounding)
    return size


def after_pruned(
    job: Job, calibration: Calibration, counts: Counts, *, progress: Progress | None = None
) -> Calibration:
    """Return the statistics of each layer after the pruned layers before it (`--sequential`)."""
    recipe = job.recipe
    return job.engine().recalibrate(
        _corpus(job, calibration),
        calibration,
        partial(_planned, recipe, counts),
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


def _planned(recipe: Recipe, counts: Counts, calibration: Calibration) -> Plan:
    return plan(score(calibration, recipe.score, guarded=recipe.guarded), counts, recipe=recipe)


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
