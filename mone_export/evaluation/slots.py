"""What stands behind each slot of a file's routers: an expert, a thinner one, a constant.

Source: `source.gguf_format`, whose layout is read here from the tensors' shapes.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from mone_export.artifacts import MoeSpec
from mone_export.source.gguf_format import METHOD_KEY, MOST_TIERS, tier_tensor
from mone_export.source.gguf_header import Header, TensorInfo


def fates_by_slot(header: Header, spec: MoeSpec) -> dict[int, list[str]]:
    """Return the fate of each of a layer's slots, by layer, in the words of `Plan.fates`.

    The type of their matrices is named where experts of one layer have several. Tilts, of which plans know
    nothing, are called `tilt of 32`, after their rank.
    """
    narrow = header.value(METHOD_KEY) == "narrow"  # then none has all its channels, whatever the file's width
    whole = f"{spec.expert_size} channels" if narrow else "whole"
    return {layer: _fates(header.tensors, layer, spec, whole) for layer in spec.moe_layers}


def shares(fates: Sequence[str], counts: np.ndarray) -> dict[str, float]:
    """Return how a layer's routed slots divide among fates, by how often each slot was chosen."""
    found = dict.fromkeys(fates, 0)
    for fate, count in zip(fates, counts.tolist(), strict=True):
        found[fate] += count
    return {fate: count / int(counts.sum()) for fate, count in found.items()}


def _fates(tensors: Mapping[str, TensorInfo], layer: int, spec: MoeSpec, whole: str) -> list[str]:
    places = ("", *(str(tier) for tier in range(1, MOST_TIERS + 1)))
    found = [
        (name, kind, n)
        for place in places
        for name, kind, n in _tier(tensors, layer, place, (spec.expert_size, whole))
    ]
    several = len({kind for _, kind, _ in found if kind}) > 1
    fates = [f"{name} {kind}".rstrip() if several else name for name, kind, n in found for _ in range(n)]
    return fates + ["constant"] * (spec.n_expert - len(fates))


def _tier(
    tensors: Mapping[str, TensorInfo], layer: int, tier: str, widest: tuple[int, str]
) -> list[tuple[str, str, int]]:
    """Return (fate, type, number) of the experts of a tier, "" being a layer's ordinary ones; or nothing.

    `widest` is the width of the widest experts of all, and what they are called.
    """

    def tensor(matrix: str) -> TensorInfo | None:
        name = f"blk.{layer}.{matrix}_exps.weight"
        return tensors.get(tier_tensor(name, int(tier)) if tier else name)

    if tilt := tensor("ffn_tilt_out"):
        return [(f"tilt of {tilt.shape[0]}", "", tilt.shape[-1])]
    down, up = tensor("ffn_down"), tensor("ffn_up") or tensor("ffn_gate_up")
    if not down or not up:
        return []
    width, n = down.shape[0], (*down.shape, 1)[2]
    return [(widest[1] if width == widest[0] else f"{width} channels", up.kind, n)]
