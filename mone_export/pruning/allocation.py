"""How many experts each layer keeps under one total: what the statistics know, and a search in the model.

A layer's relative output error as a function of the experts it keeps follows from the statistics. It compares
experts within a layer well, and layers badly: it does not know how much the model minds an error in one. That
the calibration measured, as the layer's sensitivity (`sensitivities`); weighted by it, the errors of all
layers are small together when `allocate` shares out the places. `search` takes that as its start and asks the
loaded model, with novices in place (`masking`), for the KL divergence on rows that calibration has not seen.
The runtime takes another count in every layer, which no ordinary file can.
"""

from collections.abc import Callable, Iterator, Mapping
from statistics import fmean

import torch
from torch import Tensor

from mone_export.artifacts import Calibration, Scores
from mone_export.pruning.damage import error_left
from mone_export.pruning.novices import novices

ALLOCATIONS = ("auto", "even", "sensitivity", "search")
Counts = dict[int, int]  # layer -> experts it keeps


def sensitivities(damage: Mapping[int, float], errors: Mapping[int, float]) -> dict[int, float]:
    """Return what a layer's error of 1 does to the model: measured damage by the error that did it.

    Damage and error are both squares, relative to what they disturb, so the quotient holds for other errors
    in the layer as far as the model is linear. Where hardly an error was made it cannot be told; such a layer
    counts as the mean of the others.
    """
    known = {
        layer: damage[layer] / error
        for layer, error in errors.items()
        if error > 1e-9 and 0 < damage[layer] < float("inf")
    }
    return dict.fromkeys(errors, fmean(known.values()) if known else 1.0) | known


def error_curves(calibration: Calibration, scores: Scores, novice: str) -> dict[int, Tensor]:
    """Return each layer's error when it keeps its best r experts, float64 [n_expert + 1], by r.

    The error is relative to the layer's output, times the layer's sensitivity where the calibration has it.
    """
    curves = {}
    for layer, values in zip(scores.spec.moe_layers, scores.values, strict=True):
        stats = calibration.layers[layer]
        left = error_left(stats, novices(stats, novice))[torch.argsort(values, descending=True, stable=True)]
        total = stats.gated2_norm_sq_sum.sum().clamp(min=torch.finfo(torch.float64).tiny)
        lost = torch.cat([left.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
        curves[layer] = lost / total * calibration.sensitivity.get(layer, 1.0)
    return curves


def allocate(curves: Mapping[int, Tensor], n_place: int, floors: Mapping[int, int]) -> Counts:
    """Share out `n_place` places so that the curves' sum is small: always the largest gain next.

    A gain is the best mean gain of one or more places together, so that a flat stretch hides nothing. Every
    layer has its floor first.
    """
    counts = dict(floors)
    free = n_place - sum(counts.values())
    while free > 0:
        gains = {layer: _gain(curve, counts[layer], free) for layer, curve in curves.items()}
        layer = max(gains, key=lambda layer: (gains[layer][0], -layer))
        counts[layer] += gains[layer][1]
        free -= gains[layer][1]
    return counts


def search(
    curves: Mapping[int, Tensor],
    n_kept: int,
    floors: Mapping[int, int],
    measure: Callable[[Mapping[int, int]], float],
    *,
    n_step: int = 8,
) -> Counts:
    """Return the counts of least measured damage found, `n_kept` in the mean: 2 + `n_step` measurements.

    `measure` gives the damage of any counts; the even allocation is among those compared.
    """
    n_expert = len(next(iter(curves.values()))) - 1
    candidates = [dict.fromkeys(curves, n_kept), allocate(curves, n_kept * len(curves), floors)]
    damage, best = min(((measure(counts), counts) for counts in candidates), key=lambda pair: pair[0])
    tried = {tuple(counts.items()) for counts in candidates}
    size, n_failed = max(1, n_expert // 16), 0
    for _ in range(n_step):
        moved = (
            counts for counts in _moves(curves, best, floors, size) if tuple(counts.items()) not in tried
        )
        if (counts := next(moved, None)) is None:
            break
        tried.add(tuple(counts.items()))
        found = measure(counts)
        if found < damage:
            damage, best, n_failed = found, counts, 0
        elif (n_failed := n_failed + 1) % 4 == 0:
            size = max(1, size // 2)
    return best


def _gain(curve: Tensor, count: int, free: int) -> tuple[float, int]:
    """Return the largest mean gain from further places, and how many places give it."""
    ahead = curve[count + 1 : count + 1 + free]
    if not len(ahead):
        return float("-inf"), 0
    means = (curve[count] - ahead) / torch.arange(1, len(ahead) + 1)
    best = int(means.argmax())
    return float(means[best]), best + 1


def _moves(
    curves: Mapping[int, Tensor], counts: Counts, floors: Mapping[int, int], size: int
) -> Iterator[Counts]:
    """Yield counts with `size` places moved from one layer to another, the most promising first."""
    gains = {
        layer: float(curve[counts[layer]] - curve[counts[layer] + size])
        for layer, curve in curves.items()
        if counts[layer] + size < len(curve)
    }
    losses = {
        layer: float(curve[counts[layer] - size] - curve[counts[layer]])
        for layer, curve in curves.items()
        if counts[layer] - size >= floors[layer]
    }
    pairs = [
        (losses[giver] - gains[taker], giver, taker) for giver in losses for taker in gains if giver != taker
    ]
    for _, giver, taker in sorted(pairs):
        yield counts | {giver: counts[giver] - size, taker: counts[taker] + size}
