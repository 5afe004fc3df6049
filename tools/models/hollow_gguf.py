"""GGUF files of full size with holes in place of weights: for what reads their heads only.

They take no room on a disk. The vocabulary is made up, as large as the model's: byte-level BPE, each token an
earlier one and a letter more, with the merge that makes it.
"""

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from models.random_gguf import SHAPES, Shape, add_dimensions

WEIGHTS = "Q2_K"
MODELS = {
    "OLMoE-1B-7B": replace(SHAPES["OLMoE"], n_layer=16, n_vocab=50304),
    "Qwen3-30B-A3B": replace(SHAPES["Qwen3-30B"], n_layer=48, n_vocab=151936),
}
_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}"
)


def write_hollow(file: Path, shape: Shape) -> Path:
    """Write the head of a model of a shape in `WEIGHTS`; make the file as long as the model's would be."""
    import gguf

    writer = gguf.GGUFWriter(file, shape.arch)
    add_dimensions(writer, shape)
    writer.add_expert_count(shape.n_expert)
    writer.add_expert_used_count(shape.top_k)
    _add_vocabulary(writer, shape.n_vocab)
    length = 0
    for name, *dims in _tensors(shape):
        kind = gguf.GGMLQuantizationType[WEIGHTS if len(dims) > 1 and "gate_inp" not in name else "F32"]
        n_block, n_byte = gguf.GGML_QUANT_SIZES[kind]
        size = math.prod(dims) // n_block * n_byte
        packed = [*dims[:-1], dims[-1] // n_block * n_byte] if n_block > 1 else dims
        dtype = np.dtype(np.uint8 if n_block > 1 else np.float32)
        writer.add_tensor_info(name, packed, dtype, size, raw_dtype=kind)
        length += gguf.GGUFWriter.ggml_pad(size, gguf.GGUF_DEFAULT_ALIGNMENT)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(file, gguf.GGUFWriter.ggml_pad(file.stat().st_size, gguf.GGUF_DEFAULT_ALIGNMENT) + length)
    return file


def _tensors(shape: Shape) -> Iterator[tuple[str | int, ...]]:
    """Yield each tensor's name and dimensions, the outermost first."""
    embd, experts, heads = shape.n_embd, shape.n_expert, shape.n_head * shape.head_dim
    yield "token_embd.weight", shape.n_vocab, embd
    yield "output.weight", shape.n_vocab, embd
    yield "output_norm.weight", embd
    normed = (shape.head_dim, shape.head_dim) if shape.norm_per_head else (heads, embd)
    for block in (f"blk.{layer}" for layer in range(shape.n_layer)):
        yield f"{block}.attn_norm.weight", embd
        yield f"{block}.ffn_norm.weight", embd
        yield f"{block}.attn_q_norm.weight", normed[0]
        yield f"{block}.attn_k_norm.weight", normed[1]
        yield f"{block}.attn_q.weight", heads, embd
        yield f"{block}.attn_k.weight", shape.n_head_kv * shape.head_dim, embd
        yield f"{block}.attn_v.weight", shape.n_head_kv * shape.head_dim, embd
        yield f"{block}.attn_output.weight", embd, heads
        yield f"{block}.ffn_gate_inp.weight", experts, embd
        yield f"{block}.ffn_gate_exps.weight", experts, shape.n_ff, embd
        yield f"{block}.ffn_up_exps.weight", experts, shape.n_ff, embd
        yield f"{block}.ffn_down_exps.weight", experts, embd, shape.n_ff


def _add_vocabulary(writer: Any, n_vocab: int) -> None:
    import gguf

    letters = _letters()
    tokens, merges = [*letters], list[str]()
    known = set(tokens)
    pairs = ((tokens[number], letter) for number in itertools.count() for letter in letters)
    for left, right in pairs:
        if len(tokens) == n_vocab - len(_CONTROL):
            break
        if left + right not in known:
            known.add(left + right)
            tokens.append(left + right)
            merges.append(f"{left} {right}")
    kinds = [gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.CONTROL] * len(_CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*tokens, *_CONTROL])
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(n_vocab - len(_CONTROL))
    writer.add_eos_token_id(n_vocab - 1)
    writer.add_chat_template(_TEMPLATE)


def _letters() -> list[str]:
    """Return what stands for each byte in byte-level BPE: itself where printable, else from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = itertools.count(256)
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
