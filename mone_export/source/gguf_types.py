"""ggml's types: their numbers, blocks and sizes, as llama.cpp's own gguf package knows them.

Nothing here needs PyTorch.
"""

import math
import sys
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from mone_export.errors import MoneError
from mone_export.runtime import tree


@cache
def gguf_library() -> Any:
    """Return the module `gguf` of the pinned tree."""
    folder = str(tree() / "gguf-py")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import gguf

    _check_origin(gguf)
    return gguf


def padded_bytes(shape: Sequence[int], type_name: str) -> int:
    """Return how many bytes of a file a tensor takes, of a shape in elements and a type such as `q4_k`."""
    gguf = gguf_library()
    _, n_block, n_byte = block_of(type_name)
    return int(gguf.GGUFWriter.ggml_pad(math.prod(shape) // n_block * n_byte, gguf.GGUF_DEFAULT_ALIGNMENT))


def block_of(type_name: str) -> tuple[int, int, int]:
    """Return (ggml's number of a type such as `q4_k`, weights in a block of it, bytes of a block)."""
    gguf = gguf_library()
    number = gguf.GGMLQuantizationType[type_name.upper()]
    return int(number), *gguf.GGML_QUANT_SIZES[number]


def dequantize(packed: np.ndarray, type_name: str) -> np.ndarray:
    """Return the float32 weights that rows of blocks of a type stand for."""
    gguf = gguf_library()
    weights: np.ndarray = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[type_name.upper()])
    return weights


def _check_origin(gguf: ModuleType) -> None:
    if not hasattr(gguf, "LazyChunkedTensor"):
        raise MoneError(
            f"the installed gguf package ({gguf.__file__}) is older than the pinned llama.cpp: "
            "run `mone-llama build`, which installs the right one"
        )
