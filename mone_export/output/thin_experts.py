"""Thin experts at the writing seam: made of an expert's matrices when they are to be written."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from mone_export.artifacts import ChannelStats, LayerPlan, Tier
from mone_export.lazily import Tensor, torch
from mone_export.pruning.thinning import Thinning, refit
from mone_export.source.gguf_format import matrix_of, tier_tensor
from mone_export.source.opened import Derived

Scale = Callable[[int], float]


class Thinner:
    """Makes thin experts of what a second pass has found: channels, constants, a refit.

    The sums of one layer are in memory at a time.
    """

    def __init__(self, layers: Mapping[int, Thinning], folder: TemporaryDirectory[str]) -> None:
        """Take each layer's costs, and the folder of its `ChannelStats`, which lasts as long as this does."""
        self._layers, self._folder = layers, folder
        self._loaded: tuple[int, ChannelStats] | None = None

    def errors(self, layer: int) -> Tensor:
        """Return what a layer's experts cost at each width, `Thinning.errors`."""
        return self._layers[layer].errors

    def constants(self, layer: LayerPlan, novices: np.ndarray) -> np.ndarray:
        """Return `novices` [n_expert, d] with what thin experts add to their channels' output."""
        found = novices.copy()
        thinning = self._layers[layer.layer]
        for tier in layer.tiers:
            for expert in tier.experts:
                found[expert] = thinning.constant(expert, tier.width).numpy()
        return found

    def all_channels(self, layer: LayerPlan) -> list[tuple[int, np.ndarray]]:
        """Return a layer's thin experts in the order of the file, each with its channels."""
        return [
            (expert, self.channels(layer.layer, expert, tier.width).numpy())
            for tier in layer.tiers
            for expert in tier.experts
        ]

    def channels(self, layer: int, expert: int, width: int) -> Tensor:
        """Return the channels that a thin expert keeps, int64 [width], ascending."""
        return self._layers[layer].channels(expert, width)

    def down(self, layer: int, expert: int, width: int, whole: Tensor) -> Tensor:
        """Return the down projection float64 [d, width] of a thin expert from the whole one's, [d, I]."""
        if self._loaded is None or self._loaded[0] != layer:
            self._loaded = layer, ChannelStats.load(Path(self._folder.name), layer)
        share = refit(self._loaded[1], expert, self.channels(layer, expert, width))
        fitted: Tensor = whole.double() @ share
        return fitted


def thin_tensor(
    name: str, shape: Sequence[int], place: tuple[int, int, Tier], thinner: Thinner | None, scale: Scale
) -> Derived:
    """Return the tensor of thin experts that is made of the tensor `name` of a shape.

    `place` is the layer, the tier's number from 1, the tier; `scale` gives what the runtime multiplies an
    expert's output by, which a thin one contains. Without a `thinner` name and shape are known, and no more.
    """
    layer, number, tier = place
    matrix, (_, n_out, n_in) = matrix_of(name), shape
    n_row = {"down": n_out, "gate_up": 2 * tier.width}.get(matrix, tier.width)
    n_column = tier.width if matrix == "down" else n_in

    def rows(expert: int) -> np.ndarray:
        assert thinner is not None
        own = thinner.channels(layer, expert, tier.width)
        return (torch.cat([own, own + n_out // 2]) if matrix == "gate_up" else own).numpy()

    def make(expert: int, whole: Tensor) -> Tensor:
        assert thinner is not None
        if matrix == "down":
            return (thinner.down(layer, expert, tier.width, whole) * scale(expert)).to(whole.dtype)
        return whole[torch.from_numpy(rows(expert))]

    return Derived(
        tier_tensor(name, number),
        tier.experts,
        (n_row, n_column),
        rows=None if matrix == "down" else rows,
        make=make,
    )
