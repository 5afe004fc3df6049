"""Tensors inside llama.cpp's graph by their names, run in a process of its own.

`{name}` is the tensor, `{name}.input` the second source of the operation that gives it.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from forked import Arrays, in_a_process


class _Tensor(ctypes.Structure):
    """The head of ggml's struct of a tensor, up to its sources."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
    )


def inside(model: Path, tokens: list[int], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return tensors, F32 or I32 in numpy's order of dimensions, for one batch of tokens."""
    return in_a_process(_inside, str(model), tokens, names)


def _inside(model: str, tokens: list[int], names: Sequence[str]) -> Arrays:
    from llama_cpp import llama_cpp as bindings

    library = ctypes.CDLL(str(Path(bindings.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_get_name.restype = ctypes.c_char_p
    wanted, found = set(names), {}

    def read(address: int) -> np.ndarray:
        tensor = _Tensor.from_address(address)
        shape = tuple(tensor.ne)
        data = (ctypes.c_char * (4 * int(np.prod(shape))))()
        assert library.ggml_is_contiguous(ctypes.c_void_p(address)) and tensor.type in (0, 26)
        library.ggml_backend_tensor_get(ctypes.c_void_p(address), data, ctypes.c_size_t(0), len(data))
        kind = np.float32 if tensor.type == 0 else np.int32
        return np.frombuffer(bytes(data), kind).reshape(shape[::-1]).squeeze()

    @bindings.ggml_backend_sched_eval_callback
    def callback(address: int, ask: bool, _user: Any) -> bool:
        name = library.ggml_get_name(ctypes.c_void_p(address)).decode()
        if name in wanted and not ask:
            found[name] = read(address)
            found[f"{name}.input"] = read(_Tensor.from_address(address).src[1])
        return name in wanted if ask else True

    bindings.llama_backend_init()
    model_settings = bindings.llama_model_default_params()
    model_settings.use_extra_bufts = False  # weights as they are in the file
    handle = bindings.llama_model_load_from_file(model.encode(), model_settings)
    settings = bindings.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = len(tokens)
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = bindings.GGML_TYPE_F32
    settings.flash_attn_type = bindings.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cb_eval = callback
    context = bindings.llama_init_from_model(handle, settings)
    ids = (bindings.llama_token * len(tokens))(*tokens)
    batch = bindings.llama_batch_get_one(ids, len(tokens))
    batch.logits = (ctypes.c_int8 * len(tokens))(*[1] * len(tokens))  # or the last layer has one token only
    assert bindings.llama_decode(context, batch) == 0
    return found
