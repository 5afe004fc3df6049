"""DERN at the writing seam: a layer's new experts are made when the first of them is to be written."""

from collections.abc import Callable, Mapping
from functools import partial

from mone_export.artifacts import Plan
from mone_export.errors import MoneError
from mone_export.lazily import Tensor, torch
from mone_export.pruning.dern import recombine

Read = Callable[[int], Tensor]  # original expert id -> its matrix [out, in]; once for each expert


class Recombination:
    """Takes the readers of a layer's matrices as the converter comes by them, and gives the new matrices."""

    def __init__(self, plan: Plan, importance: Mapping[int, Tensor]) -> None:
        """Prepare the pruned layers of a plan; `importance` [n_expert] weighs each layer's experts."""
        self._layers = {layer.layer: layer for layer in plan.layers if layer.pruned}
        self._importance = importance
        self._readers: dict[int, dict[str, Read]] = {layer: {} for layer in self._layers}
        self._made: dict[int, list[dict[str, Tensor]]] = {}

    def rewrite(self, layer: int, matrix: str, read: Read) -> list[Callable[[], Tensor]]:
        """Return what makes each new expert's `matrix` (gate, up, down or gate_up), to be called once."""
        self._readers[layer][matrix] = read
        n_kept = len(self._layers[layer].kept)
        return [partial(self._take, layer, matrix, slot) for slot in range(n_kept)]

    def check(self) -> None:
        """Refuse layers whose experts are not three matrices, each read expert by expert."""
        for layer, readers in self._readers.items():
            if readers.keys() not in ({"gate", "up", "down"}, {"gate_up", "down"}):
                found = ", ".join(readers) or "no matrix"
                raise MoneError(
                    f"layer {layer}: --method dern needs the gate, up and down matrix of every expert, "
                    f"this model gives {found}: use --method drop"
                )

    def _take(self, layer: int, matrix: str, slot: int) -> Tensor:
        if layer not in self._made:
            plan, readers = self._layers[layer], self._readers[layer]
            new = recombine(partial(_segments, readers), plan.kept, plan.pruned, self._importance[layer])
            self._made[layer] = [_matrices(segments, readers) for segments in new]
        return self._made[layer][slot].pop(matrix)  # frees it


def _segments(readers: Mapping[str, Read], expert: int) -> Tensor:
    """Read an expert as segments, float32 [n_segment, 3, d]."""
    down = readers["down"](expert).float().T  # [n_segment, d]
    rows = [readers[matrix](expert).float() for matrix in ("gate", "up", "gate_up") if matrix in readers]
    gate_up = torch.cat(rows).unflatten(0, (2, len(down)))  # [2, n_segment, d]
    return torch.cat([gate_up.transpose(0, 1), down[:, None]], dim=1)


def _matrices(segments: Tensor, readers: Mapping[str, Read]) -> dict[str, Tensor]:
    """Return the matrices of an expert made of segments [n_segment, 3, d], each with memory of its own."""
    parts = {
        "gate": lambda: segments[:, 0],
        "up": lambda: segments[:, 1],
        "gate_up": lambda: segments[:, :2].transpose(0, 1).flatten(0, 1),
        "down": lambda: segments[:, 2].T,
    }
    return {matrix: parts[matrix]().clone(memory_format=torch.contiguous_format) for matrix in readers}
