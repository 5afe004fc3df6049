"""From statistics to a decision: which experts stay, and what stands in for the others.

Statistics are enough for most of it. The ways that ask the model itself load it here, again, and let it go:
calibrating layer after layer, searching the layers' counts, `joint` novices, the score `aimer`.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from mone_export.artifacts import Calibration, Corpus, Plan, Scores
from mone_export.calibration.corpus import head
from mone_export.errors import MoneError
from mone_export.fitting import judge
from mone_export.output.llamacpp import CONVERTER_TYPES
from mone_export.output.writing import measure
from mone_export.pruning.allocation import Counts, allocate, error_curves, search, sensitivities
from mone_export.pruning.damage import relative_error
from mone_export.pruning.guard import guard
from mone_export.pruning.novices import joint_novices, novices
from mone_export.pruning.planning import kept_per_layer, least_kept, plan
from mone_export.pruning.scoring import score as score_experts
from mone_export.pruning.scoring import score_weights
from mone_export.request import Job
from mone_export.runtime import Progress

if TYPE_CHECKING:
    from mone_export.calibration.loading import Model

# `calibration.loading`, `.passes` and `.masking` bring in most of transformers, which takes longer than all
# that saved statistics need: so they are imported where a model is at work.


def with_sensitivity(
    model: "Model", corpus: Corpus, calibration: Calibration, *, progress: Progress | None = None
) -> Calibration:
    """Return the calibration with its layers' sensitivities: a little of its text runs once more.

    In each layer the worse half of the experts by score `mone` have novices for it. The quotient holds for
    other ratios, scores and novices.
    """
    from mone_export.calibration.sensitivity import damage_by_layer

    halved = plan(score_experts(calibration), ratio=0.5, min_kept=1)
    pruned = {layer.layer: layer.pruned for layer in halved.layers}
    vectors = {layer: novices(calibration.layers[layer], "mean") for layer in pruned}
    errors = {layer: relative_error(calibration.layers[layer], pruned[layer], "mean") for layer in pruned}
    damage = damage_by_layer(model, corpus.tokens, pruned, vectors, progress=progress)
    return replace(calibration, sensitivity=sensitivities(damage, errors))


def settle(job: Job, calibration: Calibration) -> Job:
    """Choose among a job's candidates by their estimated errors, and fix ratio and type; the best first."""
    scores = _scores(job, calibration)
    judged = judge(
        job.candidates,
        job.path,
        calibration,
        lambda item: _plan(replace(job, ratio=item.ratio), calibration, scores),
        novice=job.request.novice,
    )
    best = judged[0]
    return replace(
        job,
        candidates=tuple(judged),
        ratio=best.ratio,
        outtype=best.outtype,
        size=best.size,
        size_unpruned=best.size_unpruned,
    )


def decide(
    job: Job, calibration: Calibration, *, counts: Counts | None = None, progress: Progress | None = None
) -> Plan:
    """Return the plan; `counts` says how many experts each layer keeps where that is decided already.

    Where the layers keep different numbers, their types may make the file larger than the same number
    everywhere would: for a size that was asked for, some experts more go.
    """
    scores = _scores(job, calibration)
    if job.spare is not None and counts is None:
        counts = search_counts(
            job.load_model(stream="off"),
            job.spare,
            calibration,
            scores,
            novice=job.request.novice,
            ratio=job.ratio,
            min_kept=job.request.min_kept,
            progress=progress,
        )
    n_less = 0
    while True:
        chosen = _plan(job, calibration, scores, counts=counts, n_less=n_less)
        size = file_size(job, chosen)
        if job.request.fit is None or size <= job.request.fit:
            return chosen
        per_expert = (job.size_unpruned - size) / sum(len(layer.pruned) for layer in chosen.layers)
        n_less += math.ceil((size - job.request.fit) / per_expert)


def file_size(job: Job, chosen: Plan) -> int:
    """Return the bytes of a plan's file."""
    if job.scope != "sensitivity" or job.outtype in CONVERTER_TYPES:  # whose types are the same in all layers
        return job.size
    size, _ = measure(job.path, chosen, novice=job.request.novice, outtype=job.outtype)
    return size


def behind_pruned(
    job: Job, calibration: Calibration, counts: Counts, *, progress: Progress | None = None
) -> Calibration:
    """Return the statistics of each layer behind the pruned layers before it (`--sequential`)."""
    from mone_export.calibration.masking import recalibrate

    known = _known(job.request.novice)
    return recalibrate(
        job.load_model(),
        _corpus(job, calibration),
        calibration,
        lambda so_far: _plan(job, so_far, _scores(job, so_far), counts=counts),
        lambda stats: novices(stats, known),
        memory=job.request.memory,
        progress=progress,
    )


def joint_vectors(
    job: Job, calibration: Calibration, chosen: Plan, *, progress: Progress | None = None
) -> dict[int, Tensor]:
    """Return novices [n_expert, d] per layer that make up for a plan's pruned experts together."""
    from mone_export.calibration.masking import measure_residuals

    residuals = measure_residuals(
        job.load_model(), _corpus(job, calibration), chosen, memory=job.request.memory, progress=progress
    )
    return {
        layer: joint_novices(calibration.layers[layer], residual) for layer, residual in residuals.items()
    }


def _plan(
    job: Job, calibration: Calibration, scores: Scores, *, counts: Counts | None = None, n_less: int = 0
) -> Plan:
    """Return the plan of a job's ratio and scope, with `n_less` experts less than that is."""
    request = job.request
    if job.scope == "sensitivity" and counts is None:
        counts = shared_out(
            calibration,
            scores,
            novice=request.novice,
            ratio=job.ratio,
            min_kept=request.min_kept,
            n_less=n_less,
        )
    return plan(
        scores,
        ratio=job.ratio,
        min_kept=request.min_kept,
        method=request.method,
        scope=job.scope,
        counts=counts,
    )


def _scores(job: Job, calibration: Calibration) -> Scores:
    """Score the experts, from the statistics or the weights; guarded super experts stand above all others."""
    if job.score == "aimer":
        from mone_export.calibration.loading import loaded_experts

        model = job.load_model()
        scores = score_weights(model.spec, loaded_experts(model))
    else:
        scores = score_experts(calibration, job.score, seed=job.request.seed)
    return guard(scores, calibration) if job.request.guarded else scores


def _corpus(job: Job, calibration: Calibration) -> Corpus:
    """Return the text that was calibrated on: the calibration may have ended early."""
    assert job.corpus is not None
    return head(job.corpus, calibration.n_token // job.request.seq_len)


def _known(novice: str) -> str:
    """Return the novice to reckon with while there is no plan, which `joint` novices belong to."""
    return "least-squares" if novice == "joint" else novice


def shared_out(
    calibration: Calibration,
    scores: Scores,
    *,
    novice: str,
    ratio: float,
    min_kept: int | None = None,
    n_less: int = 0,
) -> Counts:
    """Return how many experts each layer keeps, by the layers' sensitivities: `ratio` is that of them all."""
    spec = calibration.spec
    if not calibration.sensitivity:
        raise MoneError("these statistics lack the layers' sensitivities: calibrate anew, or --allocate even")
    n_kept = kept_per_layer(spec, ratio, min_kept=min_kept)
    curves = error_curves(calibration, scores, _known(novice))
    return allocate(
        curves, n_kept * len(curves) - n_less, _floors(scores, least_kept(spec, min_kept), n_kept)
    )


def search_counts(
    model: "Model",
    rows: Tensor,
    calibration: Calibration,
    scores: Scores,
    *,
    novice: str,
    ratio: float,
    min_kept: int | None = None,
    progress: Progress | None = None,
) -> Counts:
    """Return the counts per layer that do a model the least harm found on `rows` [n_row, seq_len]."""
    from mone_export.calibration.masking import Divergence

    spec = calibration.spec
    known = _known(novice)
    vectors = {layer: novices(stats, known) for layer, stats in calibration.layers.items()}
    divergence = Divergence(model, rows)
    done = 0

    def measure_counts(counts: Mapping[int, int]) -> float:
        nonlocal done
        done += 1
        if progress:
            progress(done, 0, "searching the counts of the layers")
        chosen = plan(scores, ratio=ratio, min_kept=min_kept, scope="search", counts=counts)
        return divergence({layer.layer: layer.pruned for layer in chosen.layers}, vectors)

    n_kept = kept_per_layer(spec, ratio, min_kept=min_kept)
    floors = _floors(scores, least_kept(spec, min_kept), n_kept)
    return search(error_curves(calibration, scores, known), n_kept, floors, measure_counts)


def _floors(scores: Scores, least: int, n_kept: int) -> dict[int, int]:
    """Return how many experts each layer keeps at least: guarded ones are not given away."""
    guarded = scores.values.isposinf().sum(1).tolist()
    return {
        layer: min(n_kept, max(least, n)) for layer, n in zip(scores.spec.moe_layers, guarded, strict=True)
    }
