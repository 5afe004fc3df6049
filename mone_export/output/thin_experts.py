"""Tiers at the writing seam: thin experts, and whole ones of another type, made when they are written."""

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

    def __init__(
        self, layers: Mapping[int, Thinning], folder: Path | TemporaryDirectory[str], *, centred: bool = True
    ) -> None:
        """Take each layer's costs, and the folder of its `ChannelStats`; a temporary one lasts so long."""
        self._layers, self._kept, self._centred = layers, folder, centred
        self._folder = folder if isinstance(folder, Path) else Path(folder.name)
        self._loaded: tuple[int, ChannelStats] | None = None

    @property
    def errors(self) -> Mapping[int, np.ndarray]:
        """What each layer's experts cost at each width, `Thinning.errors`."""
        return {layer: found.errors.numpy() for layer, found in self._layers.items()}

    def constant(self, layer: int, expert: int, width: int) -> Tensor:
        """Return what an expert of a width adds to its channels' output, float32 [d]; of a whole one 0."""
        return self._layers[layer].constant(expert, width)

    def channels(self, layer: int, expert: int, width: int) -> Tensor:
        """Return the channels that a thin expert keeps, int64 [width], ascending."""
        return self._layers[layer].channels(expert, width)

    def down(self, layer: int, expert: int, width: int, whole: Tensor) -> Tensor:
        """Return the down projection float64 [d, width] of a thin expert from the whole one's, [d, I]."""
        if self._loaded is None or self._loaded[0] != layer:
            self._loaded = layer, ChannelStats.load(self._folder, layer)
        channels = self.channels(layer, expert, width)
        share = refit(self._loaded[1], expert, channels, centred=self._centred)
        fitted: Tensor = whole.double() @ share
        return fitted


def constants(
    layer: LayerPlan, size: int, novices: np.ndarray, given: Mapping[int, Tensor] | Thinner | None
) -> np.ndarray:
    """Return `novices` [n_expert, d] with what experts of tiers add: whole ones, of `size`, nothing."""
    found = novices.copy()
    for tier in layer.tiers:
        for expert in tier.experts:
            if tier.width == size:
                found[expert] = 0
            elif isinstance(given, Thinner):
                found[expert] = given.constant(layer.layer, expert, tier.width).numpy()
    return found


def own_channels(layer: LayerPlan, thinner: Thinner | None, size: int) -> list[tuple[int, np.ndarray]]:
    """Return the experts of a layer's tiers in the order of the file, each with its channels of `size`."""
    return [
        (expert, _channels(layer.layer, expert, tier, thinner, size))
        for tier in layer.tiers
        if thinner or tier.width == size
        for expert in tier.experts
    ]


def own_outputs(layer: LayerPlan, size: int, n_out: int) -> list[tuple[int, np.ndarray]]:
    """Return the same experts, each with the outputs whose bias is its own: all of whole ones, else none."""
    return [
        (expert, np.arange(n_out if tier.width == size else 0))
        for tier in layer.tiers
        for expert in tier.experts
    ]


def tier_of(
    name: str, shape: Sequence[int], place: tuple[int, int, Tier], thinner: Thinner | None, scale: Scale
) -> Derived:
    """Return the tensor of a tier's experts that is made of the tensor `name` of a shape.

    `place` is the layer, the tier's number from 1 (0: the tensor itself), the tier; `scale` gives what the
    runtime multiplies an expert's output by, which one of a tier contains. Without a `thinner` name and shape
    of thin ones are known, and no more.
    """
    layer, number, tier = place
    matrix, (_, n_out, n_in) = matrix_of(name), shape
    size = {"down": n_in, "gate_up": n_out // 2}.get(matrix, n_out)
    n_row = {"down": n_out, "gate_up": 2 * tier.width}.get(matrix, tier.width)
    n_column = tier.width if matrix == "down" else n_in

    def rows(expert: int) -> np.ndarray:
        own = _channels(layer, expert, tier, thinner, size)
        return np.concatenate([own, own + n_out // 2]) if matrix == "gate_up" else own

    def make(expert: int, whole: Tensor) -> Tensor:
        if matrix != "down":
            return whole[torch.from_numpy(rows(expert))]
        if tier.width == size:
            return whole * scale(expert)
        assert thinner is not None
        return (thinner.down(layer, expert, tier.width, whole) * scale(expert)).to(whole.dtype)

    return Derived(
        tier_tensor(name, number) if number else name,
        tier.experts,
        (n_row, n_column),
        rows=None if matrix == "down" else rows,
        make=make,
    )


def _channels(layer: int, expert: int, tier: Tier, thinner: Thinner | None, size: int) -> np.ndarray:
    if tier.width == size:
        return np.arange(size)
    assert thinner is not None
    found: np.ndarray = thinner.channels(layer, expert, tier.width).numpy()
    return found
