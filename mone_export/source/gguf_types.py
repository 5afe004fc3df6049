"""ggml's types: their numbers, blocks and sizes, as llama.cpp's own gguf package knows them.

Nothing here needs PyTorch.
"""

import math
import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any

import numpy as np

from mone_export.errors import MoneError
from mone_export.runtime import tree

# what ggml packs without an importance matrix
_PACKED: tuple[str, ...] = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "mxfp4", "iq4_nl")
_PACKED += ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "tq1_0", "tq2_0", "iq3_s", "iq3_xxs")
# in place of types that need an importance matrix
_WITHOUT = {name: "q2_k" for name in ("iq2_xxs", "iq2_xs", "iq2_s", "iq1_s", "iq1_m")}
# for rows that are too short for a type's blocks, as llama-quantize does
_INSTEAD = dict.fromkeys(_WITHOUT, "iq4_nl")
_INSTEAD |= {"q2_k": "q4_0", "q3_k": "q4_0", "iq3_s": "iq4_nl", "iq3_xxs": "iq4_nl", "iq4_xs": "iq4_nl"}
_INSTEAD |= {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


@cache
def gguf_library() -> Any:
    """Return the module `gguf` of the pinned tree."""
    folder = str(tree() / "gguf-py")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import gguf

    _check_origin(gguf)
    return gguf


@cache
def gguf_constants() -> Any:
    """Return the constants of that `gguf` alone, in a tenth of the time: names, blocks and sizes of types."""
    file = tree() / "gguf-py" / "gguf" / "constants.py"
    spec = spec_from_file_location("mone_gguf_constants", file)
    assert spec is not None and spec.loader is not None, file
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def n_bytes(shape: Sequence[int], type_name: str) -> int:
    """Return how many bytes a tensor has, of a shape in elements and a type such as `q4_k`."""
    _, n_block, n_byte = block_of(type_name)
    return math.prod(shape) // n_block * n_byte


def padded_bytes(shape: Sequence[int], type_name: str) -> int:
    """Return how many bytes of a file a tensor takes."""
    alignment = gguf_constants().GGUF_DEFAULT_ALIGNMENT
    return int(-(-n_bytes(shape, type_name) // alignment) * alignment)


def block_of(type_name: str) -> tuple[int, int, int]:
    """Return (ggml's number of a type such as `q4_k`, weights in a block of it, bytes of a block)."""
    gguf = gguf_constants()
    number = gguf.GGMLQuantizationType[type_name.upper()]
    return int(number), *gguf.GGML_QUANT_SIZES[number]


def dequantize(packed: np.ndarray, type_name: str) -> np.ndarray:
    """Return the float32 weights that rows of blocks of a type stand for."""
    gguf = gguf_library()
    weights: np.ndarray = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[type_name.upper()])
    return weights


def kind_for(type_name: str, n_column: int) -> str:
    """Return the type to pack rows of `n_column` weights in that were of a type: its own where it can be.

    Types that cannot do without an importance matrix, and rows of other lengths than their blocks, have the
    next better one.
    """
    if type_name not in _PACKED or n_column % block_of(type_name)[1]:
        candidates = [_INSTEAD.get(type_name, "q8_0"), "q8_0", "f16"]
        if type_name in _WITHOUT:
            candidates.insert(0, _WITHOUT[type_name])
        return next(kind for kind in candidates if n_column % block_of(kind)[1] == 0)
    return type_name


def _check_origin(gguf: ModuleType) -> None:
    if not hasattr(gguf, "LazyChunkedTensor"):
        raise MoneError(
            f"the installed gguf package ({gguf.__file__}) is older than the pinned llama.cpp: "
            "run `mone-llama build`, which installs the right one"
        )
