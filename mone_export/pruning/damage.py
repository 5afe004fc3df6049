"""What a decision costs, estimated from the statistics alone: no model, no second pass over the text."""

from collections.abc import Sequence

from mone_export.artifacts import Calibration, ExpertStats, Plan
from mone_export.lazily import Tensor
from mone_export.pruning.novices import novices
from mone_export.recipe import NoviceName


def error_left(stats: ExpertStats, vectors: Tensor) -> Tensor:
    """Return each expert's squared error as the layer sees it with `vectors` [M, d] as novices, float64 [M].

    That is sum_t g^2 ||f - N||^2 = sum g^2 ||f||^2 - 2 N . sum g^2 f + ||N||^2 sum g^2.
    """
    cross = (stats.gated2_out_sum * vectors).sum(1)
    error = stats.gated2_norm_sq_sum - 2 * cross + vectors.square().sum(1) * stats.gate_sq_sum
    return error.clamp(min=0)


def relative_error(stats: ExpertStats, pruned: Sequence[int], novice: NoviceName) -> float:
    """Return the error that pruning leaves in a layer's output, relative to the sum of g^2 ||f||^2.

    Experts count one by one: the statistics do not hold the products of two experts' outputs for one token.
    With novice `zero` it is the share of the output that is lost.
    """
    lost = error_left(stats, novices(stats, novice))[list(pruned)].sum()
    return float(lost / stats.gated2_norm_sq_sum.sum().clamp(min=1e-300))


def spread(calibration: Calibration) -> dict[int, float]:
    """Return by layer half the log2 of the arithmetic over the geometric mean of experts' errors, in bits.

    The errors are those of constants, of experts that were seen. As many bits per weight are gained where
    bits go to the experts by their errors rather than evenly: rate-distortion's reverse water-filling (Cover
    and Thomas, Elements of Information Theory, 10.3.3).
    """
    found = {}
    for layer, stats in calibration.layers.items():
        errors = error_left(stats, novices(stats))
        errors = errors[errors > 0]
        if len(errors):
            found[layer] = 0.5 * float(errors.mean().log2() - errors.log2().mean())
    return found


def mean_relative_error(calibration: Calibration, plan: Plan, novice: NoviceName) -> float:
    """Return the mean of `relative_error` over the plan's layers."""
    errors = [relative_error(calibration.layers[layer.layer], layer.pruned, novice) for layer in plan.layers]
    return sum(errors) / len(errors)
