"""How large a file will be, to the byte, before a weight is read.

A file is its head and its tensors. The converter knows the names and shapes of both; what type llama-quantize
gives to each tensor it says itself, when it is shown a file with our head and holes in place of the data. How
many experts a layer keeps changes only the last dimension of its expert tensors: one layout gives the sizes
for all counts.
"""

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mone_export.artifacts import Plan
from mone_export.output.gguf_format import part_of
from mone_export.output.llamacpp import padded_bytes
from mone_export.output.quantizing import quantized_types
from mone_export.output.writing import base_type, head_of


@dataclass(frozen=True, slots=True)
class Layout:
    """What a file will hold: bytes before the data; shape (numpy's order) and type of every tensor.

    `base` is the layout of the intermediate file that llama-quantize needs, None where there is none.
    """

    head: int
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, str]
    base: "Layout | None" = None

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        return self.head + sum(padded_bytes(shape, self.types[name]) for name, shape in self.shapes.items())

    @property
    def base_size(self) -> int:
        """The size of the intermediate file in bytes, 0 where there is none."""
        return self.base.size if self.base else 0

    def with_kept(self, counts: Mapping[int, int]) -> "Layout":
        """Return the layout with other numbers of experts in layers that are pruned here and there."""
        now = {}
        for name, shape in self.shapes.items():
            layer, part = part_of(name) or (-1, None)
            if part == "experts":
                now[layer] = shape[0]
        shapes = dict(self.shapes)
        for name, shape in self.shapes.items():
            layer, part = part_of(name) or (-1, None)
            if part and layer in counts:  # the router has as many rows only where it loses experts, too
                axis = 1 if shape[0] == 1 else 0
                if shape[axis] == now[layer]:
                    shapes[name] = (*shape[:axis], counts[layer], *shape[axis + 1 :])
        return replace(self, shapes=shapes, base=self.base and self.base.with_kept(counts))


def layouts(path: Path, plan: Plan, outtypes: Iterable[str], *, novice: str = "mean") -> dict[str, Layout]:
    """Return the layout of the file that `write` would make, for each type."""
    found: dict[str, Layout] = {}
    bases: dict[str, Layout] = {}
    with tempfile.TemporaryDirectory(prefix="mone-export-") as folder:
        for outtype in outtypes:
            base = base_type(outtype)
            head = Path(folder) / f"{base}.gguf"
            if base not in bases:
                size, conversion = head_of(path, plan, novice=novice, base_type=base, head=head)
                bases[base] = Layout(size, conversion.shapes, conversion.types)
                with head.open("r+b") as file:
                    file.truncate(bases[base].size)
            layout = bases[base]
            if base != outtype:
                layout = replace(layout, types=quantized_types(head, outtype), base=layout)
            found[outtype] = layout
    return found


def measure(path: Path, plan: Plan, *, novice: str = "mean", outtype: str = "auto") -> tuple[int, int]:
    """Return (size of the file, size of the intermediate file or 0) in bytes, without reading a weight."""
    layout = layouts(path, plan, [outtype], novice=novice)[outtype]
    return layout.size, layout.base_size
