"""From statistics to a decision: which experts stay, and what stands in for the others.

Statistics are enough for most of it. The ways that ask the model itself load it here, again, and let it go:
calibrating layer after layer, searching the layers' counts, `joint` novices, the score `aimer`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mone_export.artifacts import Calibration, Corpus, Plan, Scores
from mone_export.calibration.corpus import head
from mone_export.fitting import judge
from mone_export.output.writing import measure
from mone_export.pruning.allocation import error_curves, search
from mone_export.pruning.guard import guard
from mone_export.pruning.novices import joint_novices, novices
from mone_export.pruning.planning import kept_per_layer, least_kept, plan, plan_without_scores
from mone_export.pruning.scoring import score as score_experts
from mone_export.pruning.scoring import score_weights
from mone_export.request import Job
from mone_export.runtime import Progress

if TYPE_CHECKING:
    from mone_export.calibration.loading import Model

# `calibration.loading`, `.passes` and `.masking` bring in most of transformers, which takes longer than all
# that saved statistics need: so they are imported where a model is at work.


def settle(job: Job, calibration: Calibration) -> Job:
    """Choose among a job's candidates by their estimated errors, and fix ratio and type; the best first."""
    request = job.request
    options: dict[str, Any] = {"min_kept": request.min_kept, "method": request.method}
    scores = _scores(job, calibration)
    judged = judge(
        job.candidates,
        job.path,
        calibration,
        lambda ratio: plan(scores, ratio=ratio, **options),
        novice=request.novice,
    )
    best = judged[0]
    size_unpruned, _ = measure(job.path, plan_without_scores(job.spec, ratio=0), outtype=best.outtype)
    return replace(
        job,
        candidates=tuple(judged),
        ratio=best.ratio,
        outtype=best.outtype,
        size=best.size,
        size_unpruned=size_unpruned,
    )


def decide(job: Job, calibration: Calibration, *, progress: Progress | None = None) -> Plan:
    """Return the plan, with the counts per layer searched in the model where the job says so."""
    request = job.request
    scores = _scores(job, calibration)
    if job.spare is None:
        return plan(
            scores, ratio=job.ratio, min_kept=request.min_kept, method=request.method, scope=request.scope
        )
    return search_counts(
        job.load_model(stream="off"),
        job.spare,
        calibration,
        scores,
        novice=request.novice,
        ratio=job.ratio,
        min_kept=request.min_kept,
        progress=progress,
    )


def behind_pruned(job: Job, calibration: Calibration, *, progress: Progress | None = None) -> Calibration:
    """Return the statistics of each layer behind the pruned layers before it (`--sequential`)."""
    from mone_export.calibration.masking import recalibrate

    request = job.request
    known = _known(request.novice)
    return recalibrate(
        job.load_model(),
        _corpus(job, calibration),
        calibration,
        lambda so_far: plan(_scores(job, so_far), ratio=job.ratio, min_kept=request.min_kept),
        lambda stats: novices(stats, known),
        memory=request.memory,
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
) -> Plan:
    """Return the plan whose counts per layer do a model the least harm found on `rows` [n_row, seq_len]."""
    from mone_export.calibration.masking import Divergence

    spec = calibration.spec
    known = _known(novice)
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
