"""How many experts each layer keeps under one total: first by a proxy, then by what the model really loses.

The proxy is a layer's relative output error as a function of the experts it keeps, from the statistics alone.
It compares experts within a layer well, and layers badly: it does not know how much the model minds an error
in one. So the loaded model is asked, with novices in place (`masking`), for the KL divergence on rows that
calibration has not seen: once for each layer pruned alone, which weighs the layers' errors, then for the
allocations that follow, and for steps from the best one. The runtime takes another count in every layer,
which no ordinary file can.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mone_export.artifacts import Calibration, Scores
from mone_export.pruning.damage import error_left
from mone_export.pruning.novices import novices

ALLOCATIONS = ("even", "search")
Counts = dict[int, int]  # layer -> experts it keeps


def error_curves(calibration: Calibration, scores: Scores, novice: str) -> dict[int, Tensor]:
    """Return each layer's relative error when it keeps its best r experts, float64 [n_expert + 1], by r."""
    curves = {}
    for layer, values in zip(scores.spec.moe_layers, scores.values, strict=True):
        stats = calibration.layers[layer]
        left = error_left(stats, novices(stats, novice))[torch.argsort(values, descending=True, stable=True)]
        total = stats.gated2_norm_sq_sum.sum().clamp(min=torch.finfo(torch.float64).tiny)
        lost = torch.cat([left.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
        curves[layer] = lost / total
    return curves


def allocate(curves: Mapping[int, Tensor], n_kept: int, floor: int) -> Counts:
    """Share out `n_kept` places per layer so that the curves' sum is small: always the largest gain next.

    A gain is the best mean gain of one or more places together, so that a flat stretch hides nothing.
    """
    counts = dict.fromkeys(curves, floor)
    free = len(curves) * (n_kept - floor)
    while free:
        gains = {layer: _gain(curve, counts[layer], free) for layer, curve in curves.items()}
        layer = max(gains, key=lambda layer: (gains[layer][0], -layer))
        counts[layer] += gains[layer][1]
        free -= gains[layer][1]
    return counts


def search(
    curves: Mapping[int, Tensor],
    n_kept: int,
    floor: int,
    measure: Callable[[Mapping[int, int]], float],
    *,
    n_step: int = 8,
) -> Counts:
    """Return the counts of least measured damage found: n_layer + 3 + `n_step` measurements at most.

    `measure` gives the damage of any counts; the even allocation is among those compared.
    """
    even = dict.fromkeys(curves, n_kept)
    n_expert = len(next(iter(curves.values()))) - 1
    alone = {layer: measure(dict.fromkeys(curves, n_expert) | {layer: n_kept}) for layer in curves}
    weighted = {
        layer: curve * alone[layer] / max(float(curve[n_kept]), 1e-12) for layer, curve in curves.items()
    }
    candidates = [even, allocate(curves, n_kept, floor), allocate(weighted, n_kept, floor)]
    damage, best = min(((measure(counts), counts) for counts in candidates), key=lambda pair: pair[0])
    size = max(1, n_expert // 16)
    tried = {tuple(counts.items()) for counts in candidates}
    for _ in range(n_step):
        counts = _step(weighted, best, floor, size)
        if counts is None or tuple(counts.items()) in tried:
            if size == 1:
                break
            size = max(1, size // 2)
            continue
        tried.add(tuple(counts.items()))
        found = measure(counts)
        if found < damage:
            damage, best = found, counts
        else:
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


def _step(curves: Mapping[int, Tensor], counts: Counts, floor: int, size: int) -> Counts | None:
    """Return the counts with `size` places moved from where they matter least to where they matter most."""
    gains = {
        layer: float(curve[counts[layer]] - curve[counts[layer] + size])
        for layer, curve in curves.items()
        if counts[layer] + size < len(curve)
    }
    losses = {
        layer: float(curve[counts[layer] - size] - curve[counts[layer]])
        for layer, curve in curves.items()
        if counts[layer] - size >= floor
    }
    pairs = [
        (losses[giver] - gains[taker], giver, taker) for giver in losses for taker in gains if giver != taker
    ]
    if not pairs:
        return None
    _, giver, taker = min(pairs)
    return counts | {giver: counts[giver] - size, taker: counts[taker] + size}
