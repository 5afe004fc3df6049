"""The share of routed slots that land on kept experts, seen through llama.cpp's evaluation callback."""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def routed_share(file: Path, runs: Sequence[tuple[np.ndarray, int]], n_kept: int) -> float:
    """Return the share of slots with an id below `n_kept` over all layers of a model.

    `runs` are token sequences, each from an empty context and in batches of the given size.
    """
    import llama_cpp

    from mone_export.calibration.eval_callback import Node

    slots: list[np.ndarray] = []

    @llama_cpp.ggml_backend_sched_eval_callback
    def see(address: int, ask: bool, _: Any) -> bool:
        tensor = Node.from_address(address)
        wanted = tensor.name.startswith(b"ffn_moe_topk")
        if wanted and not ask:
            slots.append(_selected_ids(tensor))
        return wanted if ask else True

    @llama_cpp.llama_log_callback
    def silent(*_: Any) -> None:
        pass

    llama_cpp.llama_log_set(silent, None)
    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = 0  # the ids are read where they lie
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), model_params)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = max(len(tokens) for tokens, _ in runs)
    params.n_batch, params.cb_eval = max(n_batch for _, n_batch in runs), see
    params.op_offload = params.offload_kqv = False
    params.n_threads = params.n_threads_batch = os.cpu_count() or 1
    context = llama_cpp.llama_init_from_model(model, params)
    for tokens, n_batch in runs:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        for part in np.split(tokens, len(tokens) // n_batch):
            ids = (llama_cpp.llama_token * n_batch)(*part.tolist())
            if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, n_batch)) != 0:
                raise SystemExit(f"{file.name}: llama_decode failed")
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return float((np.concatenate([ids.ravel() for ids in slots]) < n_kept).mean())


def _selected_ids(tensor: Any) -> np.ndarray:
    """Copy the expert ids [n_token, top_k] out of a tensor that is a view of a wider one."""
    top_k, n_token = tensor.ne[:2]
    raw = ctypes.string_at(tensor.data, (n_token - 1) * tensor.nb[1] + top_k * 4)
    return np.stack([np.frombuffer(raw, "<i4", top_k, row * tensor.nb[1]) for row in range(n_token)])
