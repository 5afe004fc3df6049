"""What other ratios and types would make of a model: sizes, about, from the shapes of its tensors alone."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mone_export.inspection.anatomy import Saving
from mone_export.source.gguf_types import block_of, kind_for

RATIOS = (0.0, 0.25, 0.5, 0.75)
# by --outtype, the type that most of such a file's weights have
TYPES = {
    **{"bf16": "bf16", "q8_0": "q8_0", "q6_k": "q6_k"},
    **{"q5_k_s": "q5_k", "q4_k_s": "q4_k", "q3_k_s": "q3_k", "q2_k": "q2_k"},
}
OWN = "as it is"


@dataclass(frozen=True, slots=True)
class Matrix:
    """A tensor of `n_element` weights in rows of `n_column`, now `size` bytes.

    `is_expert`: it is part of the experts that could go; `stays`: no type but its own is used for it;
    `is_packed`: its numbers are not its weights, of which there may be more.
    """

    n_element: int
    n_column: int
    size: int
    is_expert: bool = False
    stays: bool = False
    is_packed: bool = False

    def packed(self, outtype: str) -> int:
        """Return its bytes in a type, or in the one that llama-quantize takes for rows of its length."""
        if self.stays or outtype == OWN:
            return self.size
        _, n_block, n_byte = block_of(kind_for(TYPES[outtype], self.n_column))
        return math.ceil(self.n_element / n_block) * n_byte


def savings(matrices: Sequence[Matrix], n_expert: int, n_width: int, *, pruned: bool) -> Iterator[Saving]:
    """Yield the sizes below the present one; `n_expert` of `n_width` numbers could be constants.

    Of a file that is `pruned` already, or has no experts, only other types are listed.
    """
    pruned = pruned or not any(matrix.is_expert for matrix in matrices)
    now = sum(matrix.size for matrix in matrices)
    types = [] if any(matrix.is_packed for matrix in matrices) else [*TYPES]
    for outtype in (OWN, *types):
        whole = _total(matrices, outtype, experts=False)
        experts = _total(matrices, outtype, experts=True)
        same = whole + experts == now
        for ratio in RATIOS[:1] if pruned else RATIOS:
            size = whole + round((1 - ratio) * experts) + round(ratio * n_expert) * n_width * 4
            if size < now and (ratio or whole + experts < 0.99 * now) and (outtype == OWN or not same):
                yield Saving(ratio, outtype, size)


def _total(matrices: Iterable[Matrix], outtype: str, *, experts: bool) -> int:
    return sum(matrix.packed(outtype) for matrix in matrices if matrix.is_expert is experts)
