"""How much of the text each expert saw: the evidence that a decision rests on."""

import math

from mone_export.artifacts import ExpertStats

RARELY = 32  # tokens; a mean or a variance of fewer says little


def rarely_seen(stats: ExpertStats) -> tuple[int, ...]:
    """Return the experts of a layer that fewer than `RARELY` tokens were routed to, ascending."""
    return tuple((stats.count < RARELY).nonzero().flatten().tolist())


def entropy(stats: ExpertStats) -> float:
    """Return the entropy of a layer's routing in bits: log2 M when all M experts are used alike."""
    shares = stats.weight / stats.weight.sum().clamp(min=1)
    return float(-(shares * shares.clamp(min=math.ulp(0)).log2()).sum()) + 0.0
