"""Scores: one pure function each from a layer's statistics to one number per expert; larger means keep.

Add one by writing its function, its line in `SCORES` and its name in `recipe.ScoreName`; the command line and
the tests follow.
Formulas: MoNE (arXiv 2507.00390), REAP (arXiv 2510.13999), MAN/MSAN (arXiv 2606.15716).
An expert never seen (`count` 0) scores minus infinity: it is pruned first, as nothing shows that it is used.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from mone_export.artifacts import Calibration, ExpertStats, MoeSpec, Scores
from mone_export.errors import MoneError
from mone_export.lazily import Tensor, torch
from mone_export.pruning.guard import guard
from mone_export.pruning.uncertainty import possible_use
from mone_export.recipe import SCORE_NAMES, ScoreName

_CHUNK = 2**20  # weights that are taken at once, 8 MB in float64


class Score(NamedTuple):
    """A scoring function, [n_expert] float64 from one layer's statistics, and where it comes from."""

    function: Callable[[ExpertStats], Tensor]
    source: str


def score(
    calibration: Calibration, name: ScoreName = "error", *, guarded: bool = True, seed: int = 0
) -> Scores:
    """Score every expert of every layer; `seed` serves `random` only.

    With `guarded`, super experts stand above all others (`guard`). Raises `MoneError` for an unknown name.
    """
    if name == "aimer" or name not in SCORE_NAMES:
        raise MoneError(f"unknown score {name}: choose from {', '.join((*SCORES, 'random'))}")
    layers = [calibration.layers[layer] for layer in calibration.spec.moe_layers]
    if name == "random":
        values = random_scores(calibration.spec, seed=seed).values
    else:
        function = SCORES[name].function
        values = torch.stack([torch.where(stats.count > 0, function(stats), -torch.inf) for stats in layers])
    scores = Scores(spec=calibration.spec, score=name, values=values, calibration=calibration)
    return _without_constants(guard(scores, calibration) if guarded else scores)


def random_scores(spec: MoeSpec, *, seed: int = 0) -> Scores:
    """Score every expert at random: a control that needs no calibration."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(len(spec.moe_layers), spec.n_expert, generator=generator, dtype=torch.float64)
    return _without_constants(Scores(spec=spec, score="random", values=values))


def _without_constants(scores: Scores) -> Scores:
    """Return the scores with what is a constant already below all experts: it cannot be kept."""
    for row, n_expert in enumerate(scores.spec.present.values()):
        scores.values[row, n_expert:] = -torch.inf
    return scores


def score_weights(spec: MoeSpec, layers: Iterable[tuple[int, Any]]) -> Scores:
    """Score every expert by its weights alone, `aimer`: minus mean|w| / rms(w) over all its matrices.

    `layers` gives the experts modules with their weights, as `loaded_experts` does, in ascending order.
    The ratio is large for weights spread evenly and small for concentrated ones; experts with a large one are
    the ones to prune. Source: AIMER, arXiv 2603.18492.
    """
    values = []
    for _, experts in layers:
        stacks = [
            getattr(experts, name).detach().flatten(1)  # [n_expert, weights of one]
            for name in ("gate_up_proj", "up_proj", "down_proj")
            if isinstance(getattr(experts, name, None), torch.Tensor)
        ]
        n = sum(stack.shape[1] for stack in stacks)
        total, squares = torch.stack([_absolute_sums(stack) for stack in stacks]).sum(0).cpu()
        values.append(-(total / n / (squares / n).sqrt().clamp(min=torch.finfo(torch.float64).tiny)))
    return _without_constants(Scores(spec=spec, score="aimer", values=torch.stack(values)))


def _absolute_sums(stack: Tensor) -> Tensor:
    """Return the sums of |w| and of w^2 along each row, float64 [2, n_row], `_CHUNK` weights at a time."""
    sums = stack.new_zeros(2, len(stack), dtype=torch.float64)
    width = max(1, _CHUNK // len(stack))
    for part in stack.split(width, dim=1):
        chunk = part.to(torch.float64, copy=True)
        sums[0] += chunk.abs_().sum(1)
        sums[1] += chunk.square_().sum(1)
    return sums


def standard_deviation(stats: ExpertStats) -> Tensor:
    """Return the square root of the trace of each expert's output covariance, [n_expert].

    With one token the variance is unknown: such an expert gets the median of the layer's known ones.
    """
    known = stats.count > 1
    freedom = stats.weight * (stats.count - 1) / stats.count  # n - 1, for tokens that count once
    deviation = torch.where(known, stats.out_m2 / freedom, 0.0).sqrt()
    if known.any():
        deviation = torch.where(known, deviation, deviation[known].quantile(0.5))
    return deviation


def _per_token(total: Tensor, stats: ExpertStats) -> Tensor:
    return total / torch.where(stats.count > 0, stats.weight, 1.0)


def _mone(stats: ExpertStats) -> Tensor:
    """(gate_sum / T) * standard deviation, the frequency term as in the reference code of MoNE."""
    return stats.gate_sum / max(stats.n_token, 1) * standard_deviation(stats)


def _mone_paper(stats: ExpertStats) -> Tensor:
    """(gate_sum / n) * standard deviation: mean gate given selection, as MoNE's text has it."""
    return _per_token(stats.gate_sum, stats) * standard_deviation(stats)


def _error(stats: ExpertStats) -> Tensor:
    """Squared error per token that the `least-squares` novice may leave, sum g^2 ||f - N||^2 / T.

    Times what `possible_use` says: an expert seen in few tokens may be used more often elsewhere.
    """
    explained = stats.gated2_out_sum.square().sum(1) / stats.gate_sq_sum.clamp(
        min=torch.finfo(torch.float64).tiny
    )
    error = (stats.gated2_norm_sq_sum - explained).clamp(min=0) / max(stats.n_token, 1)
    return error * possible_use(stats)


SCORES: dict[ScoreName, Score] = {
    "mone": Score(_mone, "MoNE, reference code"),
    "mone-paper": Score(_mone_paper, "MoNE, text"),
    "frequency": Score(lambda stats: stats.weight, "baseline"),
    "gate": Score(lambda stats: stats.gate_sum, "baseline RS of MoNE"),
    "variance": Score(standard_deviation, "ablation of MoNE"),
    "ean": Score(lambda stats: stats.norm_sum, "baseline of REAP"),
    "reap": Score(lambda stats: _per_token(stats.gated_norm_sum, stats), "REAP"),
    "man": Score(lambda stats: _per_token(stats.norm_sum, stats), "arXiv 2606.15716"),
    "msan": Score(lambda stats: _per_token(stats.norm_sq_sum, stats), "arXiv 2606.15716"),
    "error": Score(_error, "this project"),
}
