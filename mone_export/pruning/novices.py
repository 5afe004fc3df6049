"""Novices: the constant vectors that answer in place of pruned experts.

One pure function each from a layer's statistics to a vector per expert, [n_expert, d] float64; a novice is
the output the runtime still multiplies by the router's weight. Add one by writing its function, its line in
`NOVICES` and its name in `recipe.NoviceName`. `joint` novices need a second pass over the text, once the plan
is known (`joint_novices`).
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

from mone_export.artifacts import ExpertStats, Residual
from mone_export.errors import MoneError
from mone_export.lazily import Tensor, torch
from mone_export.recipe import NoviceName


class Novice(NamedTuple):
    """A function that gives every expert's novice, [n_expert, d] float64, and where it comes from."""

    function: Callable[[ExpertStats], Tensor]
    source: str


def novices(stats: ExpertStats, name: NoviceName = "least-squares") -> Tensor:
    """Return the novice of every expert of a layer, float64 [n_expert, d].

    An expert that calibration never saw has no mean: it gets the layer's gate-weighted mean over all experts.
    """
    if name not in NOVICES:
        raise MoneError(f"unknown novice {name}: choose from {', '.join(NOVICES)}")
    vectors = NOVICES[name].function(stats)
    if name == "zero":
        return vectors
    layer_mean = stats.gated_out_sum.sum(0) / stats.gate_sum.sum().clamp(min=_TINY)  # [d]
    return torch.where((stats.count > 0)[:, None], vectors, layer_mean)


def joint_novices(stats: ExpertStats, residual: Residual) -> Tensor:
    """Return the novices that minimise a layer's squared error all together, float64 [n_expert, d].

    With gates g_te (0 where e is not selected) and r_t what the pruned experts add to token t, the error is
    sum_t ||r_t - sum_e g_te N_e||^2, quadratic in N. Its derivative with respect to N_e vanishes where
    sum_e' (sum_t g_te g_te') N_e' = sum_t g_te r_t, that is `gram N = cross`. One expert at a time (an empty
    off-diagonal, r_t = g_te f_te) that is the `least-squares` novice; together they can make up for one
    another. Experts that are always chosen together make `gram` singular, and so does one never chosen: a
    ridge, `_RIDGE` times the diagonal, draws every novice towards its least-squares one. The error never
    exceeds that of the least-squares novices, since they bear no penalty.
    """
    start = novices(stats, "least-squares")
    diagonal = residual.gram.diagonal()
    ridge = torch.where(diagonal > 0, _RIDGE * diagonal, torch.ones_like(diagonal))[:, None]  # [M, 1]
    solution: Tensor = torch.linalg.solve(
        residual.gram + torch.diag(ridge[:, 0]), residual.cross + ridge * start
    )
    return solution


_RIDGE = 1e-3
_TINY = sys.float_info.min

NOVICES: dict[NoviceName, Novice] = {
    "mean": Novice(
        lambda stats: stats.out_mean, "MoNE, arXiv 2507.00390: least error over its routed tokens"
    ),
    "gate-weighted": Novice(
        lambda stats: stats.gated_out_sum / stats.gate_sum.clamp(min=_TINY)[:, None],
        "keeps the mean of the layer's output",
    ),
    "least-squares": Novice(
        lambda stats: stats.gated2_out_sum / stats.gate_sq_sum.clamp(min=_TINY)[:, None],
        "least error of the layer's output, one expert at a time",
    ),
    "zero": Novice(lambda stats: torch.zeros_like(stats.out_mean), "ablation: removal in place"),
}
