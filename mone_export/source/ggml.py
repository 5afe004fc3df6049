"""ggml's own packing and unpacking of weights, called in the library that llama.cpp's programs use.

Its functions let other threads run meanwhile. Nothing here needs PyTorch.
"""

import ctypes
from functools import cache

import numpy as np

from mone_export.errors import MoneError
from mone_export.runtime import library
from mone_export.runtime import path as runtime_path
from mone_export.source.gguf_types import block_of


class _Traits(ctypes.Structure):
    """What ggml knows of a type: `ggml_type_traits` in ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, ctypes.c_int64)),
    )


def available() -> bool:
    """Say whether there is a build of llama.cpp whose library can be loaded."""
    try:
        _ggml()
    except (MoneError, OSError):
        return False
    return True


def unpacked(packed: np.ndarray, type_name: str) -> np.ndarray:
    """Return the float32 weights [n, n_column] that rows packed in a type stand for, uint8 [n, bytes]."""
    number, n_block, n_byte = block_of(type_name)
    packed = np.ascontiguousarray(packed)
    if type_name == "f32":
        return packed.view(np.float32)
    values = np.empty((len(packed), packed.shape[1] // n_byte * n_block), np.float32)
    convert = _ggml().ggml_get_type_traits(number).contents.to_float
    if not convert:
        raise MoneError(f"ggml cannot unpack weights of type {type_name}")
    convert(packed.ctypes.data, values.ctypes.data, values.size)
    return values


def packed(values: np.ndarray, type_name: str, importance: np.ndarray | None = None) -> np.ndarray:
    """Return float32 rows [n, n_column] packed in a type, uint8 [n, bytes of a row].

    `importance` float32 [n_column] weighs the columns. Raises `MoneError` for a type that cannot do without.
    """
    number, n_block, n_byte = block_of(type_name)
    n_row, n_column = values.shape
    assert n_column % n_block == 0, (type_name, n_column)  # it would write past the end
    rows = np.ascontiguousarray(values, np.float32)
    found = np.empty((n_row, n_column // n_block * n_byte), np.uint8)
    weights = None
    if importance is not None:
        weights = np.ascontiguousarray(importance, np.float32)
        assert weights.shape == (n_column,), (weights.shape, n_column)
    elif _ggml().ggml_quantize_requires_imatrix(number):
        raise MoneError(f"{type_name} needs an importance matrix")
    pointer = None if weights is None else weights.ctypes.data
    written = _ggml().ggml_quantize_chunk(
        number, rows.ctypes.data, found.ctypes.data, 0, n_row, n_column, pointer
    )
    assert written == found.nbytes, (type_name, written)
    return found


def all_finite(packed: np.ndarray, type_name: str) -> bool:
    """Say whether packed rows, uint8, stand for finite weights; ggml names others on stderr."""
    number, _, _ = block_of(type_name)
    return bool(_ggml().ggml_validate_row_data(number, packed.ctypes.data, packed.nbytes))


@cache
def _ggml() -> ctypes.CDLL:
    ggml = ctypes.CDLL(str(runtime_path() / library("ggml-base")))
    pointer, many = ctypes.c_void_p, ctypes.c_int64
    ggml.ggml_get_type_traits.argtypes = (ctypes.c_int,)
    ggml.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    ggml.ggml_quantize_chunk.argtypes = (ctypes.c_int, pointer, pointer, many, many, many, pointer)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_requires_imatrix.argtypes = (ctypes.c_int,)
    ggml.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    ggml.ggml_validate_row_data.argtypes = (ctypes.c_int, pointer, ctypes.c_size_t)
    ggml.ggml_validate_row_data.restype = ctypes.c_bool
    return ggml
