"""What an earlier pruning has left in a GGUF: which experts are constants now, and which numbers all had."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mone_export.artifacts import MoeSpec
from mone_export.errors import MoneError
from mone_export.source.gguf_format import KEPT_COUNT_KEY, novice_tensor, slot_tensor
from mone_export.source.gguf_header import Header, TensorInfo

_ORDER = "mone.expert_order"


@dataclass(frozen=True, slots=True)
class PrunedBefore:
    """By layer: the original ids in the file's order, and the two tensors that only a pruned layer has."""

    order: Mapping[int, tuple[int, ...]]
    biases: Mapping[int, TensorInfo]
    slot_tables: Mapping[int, TensorInfo]

    def novices(self, layer: int) -> np.ndarray:
        """Return the rows of a layer's bias, float32 [n_expert, d]: an expert's own, or a novice."""
        return self.biases[layer].values(np.float32)

    def slots(self, layer: int) -> np.ndarray | None:
        """Return the slot of each number, int32 [n_expert]; None where experts are numbered by slot."""
        return self.slot_tables[layer].values(np.int32).flatten() if layer in self.slot_tables else None


def kept_counts(header: Header, n_block: int) -> list[int]:
    """Return how many experts each block keeps, 0: all; empty for a file that was not pruned.

    Raises `MoneError` for counts of another form.
    """
    name = KEPT_COUNT_KEY.format(arch=header.value("general.architecture"))
    found = header.value(name)
    if found is None:
        return []
    if not isinstance(found, list) or len(found) != n_block or not all(isinstance(n, int) for n in found):
        raise MoneError(f"{header.files[0]} is broken: {name} is not one number for each of {n_block} blocks")
    return found


def pruned_before(header: Header, spec: MoeSpec) -> PrunedBefore | None:
    """Return what an earlier pruning has left, None where there was none."""
    if not spec.kept_before:
        return None
    layers = [layer for layer, n in spec.present.items() if n < spec.n_expert]
    own = tuple(range(spec.n_expert))
    found = header.value(_ORDER)
    if found is None:  # another tool's file: its numbers are the original ones for all that anybody knows
        found = [*own] * len(layers)
    rows = (
        [found[at : at + len(own)] for at in range(0, len(found), len(own))]
        if isinstance(found, list)
        else []
    )
    if len(rows) != len(layers) or any(sorted(row) != list(own) for row in rows):
        raise MoneError(
            f"{header.files[0]} is broken: {_ORDER} does not number the experts of {len(layers)} layers"
        )
    order = {layer: tuple(row) for layer, row in zip(layers, rows, strict=True)}
    biases = {layer: header.tensors.get(novice_tensor(layer)) for layer in layers}
    for layer, info in biases.items():
        if info is None or info.kind != "f32" or info.shape != (spec.hidden_size, spec.n_expert):
            raise MoneError(
                f"{header.files[0]} is broken: layer {layer} lacks the novices of its pruned experts"
            )
    tables = {layer: header.tensors.get(slot_tensor(layer)) for layer in layers}
    return PrunedBefore(
        order,
        {layer: info for layer, info in biases.items() if info},
        {layer: info for layer, info in tables.items() if info and info.kind == "i32"},
    )
