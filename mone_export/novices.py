"""Novices: the constant vector that stands in for each pruned expert.

One pure function each from a layer's statistics to a vector per expert, [n_expert, d] float64; a novice is
the output the runtime still multiplies by the router's weight. Add one by writing its function and its line
in `NOVICES`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mone_export.artifacts import ExpertStats
from mone_export.errors import MoneError


class Novice(NamedTuple):
    """A function that gives every expert's stand-in, [n_expert, d] float64, and where it comes from."""

    function: Callable[[ExpertStats], Tensor]
    source: str


def novices(stats: ExpertStats, name: str = "mean") -> Tensor:
    """Return the stand-in of every expert of a layer, float64 [n_expert, d].

    An expert that calibration never saw has no mean: it gets the layer's gate-weighted mean over all experts.
    """
    if name not in NOVICES:
        raise MoneError(f"unknown novice {name}: choose from {', '.join(NOVICES)}")
    vectors = NOVICES[name].function(stats)
    if name == "zero":
        return vectors
    layer_mean = stats.gated_out_sum.sum(0) / stats.gate_sum.sum().clamp(min=_TINY)  # [d]
    return torch.where((stats.count > 0)[:, None], vectors, layer_mean)


_TINY = torch.finfo(torch.float64).tiny

NOVICES: dict[str, Novice] = {
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
