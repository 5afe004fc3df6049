"""restore_check(): is every expert that a pruned GGUF keeps the original's, byte for byte?"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from mone_export.errors import MoneError
from mone_export.runtime import Progress
from mone_export.source import GgufFile
from mone_export.source.gguf_format import part_of
from mone_export.source.gguf_header import TensorInfo


def restore_check(pruned: Path, original: Path, *, progress: Progress | None = None) -> tuple[int, int]:
    """Return how many experts in how many layers of `pruned` have the bytes that `original` has for them.

    Which expert is which says the file's own provenance; an ordinary file has none, and its experts are
    looked for among the original's. Raises `MoneError` naming the first that differs.
    """
    new, old = GgufFile(pruned), GgufFile(original)
    n_expert, layers = 0, new.spec.moe_layers
    if layers != old.spec.moe_layers or new.spec.arch != old.spec.arch:
        raise MoneError(f"{pruned} and {original} are of different models")
    for done, layer in enumerate(layers, start=1):
        ids = _order(new, old, layer)
        n_kept = new.spec.present[layer]
        for name, info in _stacks(new, layer):
            before = old.header.tensors.get(name)
            if before is None or (before.kind, before.shape[:2]) != (info.kind, info.shape[:2]):
                raise MoneError(
                    f"{name} is {_form(info)}, in {original} {_form(before)}: it was quantised since"
                )
            for slot, expert in enumerate(ids[:n_kept]):
                if _digest(info, slot, n_kept) != _digest(before, expert, _count(before)):
                    raise MoneError(f"{name}: expert {expert} (now {slot}) differs from that of {original}")
        n_expert += n_kept
        if progress:
            progress(done, len(layers), "comparing experts (layers)")
    return n_expert, len(layers)


def _order(new: GgufFile, old: GgufFile, layer: int) -> list[int]:
    """Return the original's number of each expert of a layer."""
    if new.before:
        return list(new.before.order.get(layer, range(new.spec.n_expert)))
    if new.spec.n_expert == old.spec.n_expert:
        return list(range(new.spec.n_expert))
    name, info = next(_stacks(new, layer))
    before = old.header.tensors.get(name)
    if before is None:
        raise MoneError(f"{old.path} has no {name}: it is another model")
    found = {_digest(before, expert, _count(before)): expert for expert in range(_count(before))}
    ids = [found.get(_digest(info, slot, _count(info))) for slot in range(_count(info))]
    if None in ids:
        raise MoneError(f"{name}: expert {ids.index(None)} is none of those of {old.path}")
    return [expert for expert in ids if expert is not None]


def _stacks(source: GgufFile, layer: int) -> Iterator[tuple[str, TensorInfo]]:
    tensors: Mapping[str, TensorInfo] = source.header.tensors
    return ((name, info) for name, info in tensors.items() if part_of(name) == (layer, "experts"))


def _count(info: TensorInfo) -> int:
    return (*info.shape, 1)[2]


def _digest(info: TensorInfo, expert: int, n_expert: int) -> bytes:
    size = info.size // n_expert
    with info.file.open("rb") as file:
        file.seek(info.offset + expert * size)
        return hashlib.sha256(file.read(size)).digest()


def _form(info: TensorInfo | None) -> str:
    return f"{info.kind} {list(info.shape)}" if info else "missing"
