"""From hidden activations to the sums that thin experts are made of: what any second pass ends in.

A layer's sums are M matrices of [I, I] in float64, more than the layer's weights. So they go to disk, a file
for each layer, and no more layers than there is room for are measured in one pass.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from mone_export.artifacts import ChannelStats, MoeSpec
from mone_export.memory import free_memory

_COPIES = 3  # of a layer's sums while a batch is added: so far, the batch's, both together


class ChannelSums:
    """One batch's sums in the making."""

    def __init__(self, n_expert: int, size: int) -> None:
        """Begin with nothing."""
        self._stats = ChannelStats.empty(n_expert, size)

    def add(self, expert: int, channels: Tensor, gates: Tensor) -> None:
        """Add one expert's activations [n, I] and the weights [n] of its output; once for each expert."""
        if channels.device.type == "mps":  # which has no float64
            channels, gates = channels.cpu(), gates.cpu()
        own, h, g = self._stats, channels.double(), gates.double()
        scaled = h * g.unsqueeze(-1)
        own.count[expert] = len(g)
        own.weight[expert] = g.square().sum()
        own.first[expert] = (g @ scaled).cpu()
        own.second[expert] = (scaled.T @ scaled).cpu()

    def stats(self) -> ChannelStats:
        """Return the sums."""
        return self._stats


def groups(spec: MoeSpec, layers: Sequence[int], memory: int | None) -> Iterator[Sequence[int]]:
    """Share out layers so that half of `memory` bytes (default: what is free) holds each group's sums."""
    one = 8 * spec.n_expert * spec.expert_size * (spec.expert_size + 1)
    room = (free_memory() if memory is None else memory) // 2
    n = max(1, room // one - _COPIES)
    for first in range(0, len(layers), n):
        yield layers[first : first + n]


def pass_name(group: Sequence[int], layers: Sequence[int]) -> str:
    """Return what to call a pass for a group of all layers."""
    return "second pass" if len(group) == len(layers) else f"second pass, layers {group[0]} to {group[-1]}"
