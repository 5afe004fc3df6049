"""How much memory llama.cpp's cache of keys and values takes, from a GGUF's head: an estimate.

A layer caches where it has the matrices that make keys; of a recurrent one the state, which does not grow
with the text, is left out.

Source: `llama_kv_cache` and `llama_kv_cache_iswa` in `llama-kv-cache*.cpp`: keys and values of each token in
F16; with latent attention (MLA) keys alone; keys of an indexer, too; of layers with a window no more than the
window and a batch.
"""

import re
from dataclasses import replace

from mone_export.inspection.anatomy import Memory
from mone_export.source.gguf_header import Header

_MAKES_KEYS = re.compile(r"blk\.(\d+)\.(attn_k|attn_kv_a_mqa|attn_qkv)\.weight")
_N_BYTE = 2  # F16
_BATCH, _PADDED = 512, 256  # llama.cpp's default -ub, and what sizes of windows are rounded up to


def memory(header: Header, arch: str, n_layer: int, n_ctx: int) -> Memory:
    """Return what a model's weights and its cache of `n_ctx` tokens take."""
    own = Memory(n_ctx, sum(info.size for info in header.tensors.values()), 0, 0)
    found = {int(match[1]) for name in header.tensors if (match := _MAKES_KEYS.fullmatch(name))}
    recurrent = {int(name.split(".")[1]) for name in header.tensors if re.match(r"blk\.\d+\.ssm_", name)}
    separate = {int(name.split(".")[1]) for name in header.tensors if name.endswith(".attn_k.weight")}
    caching = sorted(layer for layer in found - (recurrent - separate) if layer < n_layer)
    per_token = {layer: _per_token(header, arch, layer) for layer in caching}
    caching = [layer for layer in caching if per_token[layer]]
    window = header.integer(f"{arch}.attention.sliding_window")
    pattern = header.value(f"{arch}.attention.sliding_window_pattern")
    stated = isinstance(pattern, list) and len(pattern) >= n_layer
    windowed = [layer for layer in caching if window and stated and pattern[layer]]
    short = min(n_ctx, -(-(window + _BATCH) // _PADDED) * _PADDED)
    cache = sum(per_token[layer] * (short if layer in windowed else n_ctx) for layer in caching)
    return replace(
        own,
        cache=cache * _N_BYTE,
        n_layer=len(caching),
        n_window=len(windowed),
        is_upper=bool(window and not stated and window < n_ctx),
    )


def _per_token(header: Header, arch: str, layer: int) -> int:
    """Return how many numbers a layer caches of a token."""
    n_head = max(1, header.of_layer(f"{arch}.attention.head_count", layer, 1))
    n_head_kv = header.of_layer(f"{arch}.attention.head_count_kv", layer, n_head)
    usual = header.integer(f"{arch}.embedding_length") // n_head
    keys = header.integer(f"{arch}.attention.key_length", usual)
    values = header.integer(f"{arch}.attention.value_length", usual)
    latent = f"blk.{layer}.attn_k_b.weight" in header.tensors
    indexer = header.tensors.get(f"blk.{layer}.indexer.attn_k.weight")
    return n_head_kv * (keys + (0 if latent else values)) + (indexer.shape[1] if indexer else 0)
