"""GGUF files with random weights in the shape of known models: what speed and memory are measured with.

All files of one shape and type hold the same weights, cut as the form says, so that two of them differ in
nothing else. The blocks of quantised types are made directly, as random bytes with fitting scales.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

Form = Literal["full", "novices", "thin", "tiers", "hard", "skipped", "half-used"]
_BLOCK = 256  # thin experts have whole blocks of K-quants


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's shape with part of its layers, and of its vocabulary, so that the proportions stay."""

    arch: str
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_expert: int
    top_k: int
    n_layer: int
    n_vocab: int
    norm_per_head: bool


SHAPES = {
    "OLMoE": Shape("olmoe", 2048, 16, 16, 128, 1024, 64, 8, 2, 6288, norm_per_head=False),  # 2 of 16 layers
    "Qwen3-30B": Shape("qwen3moe", 2048, 32, 4, 128, 768, 128, 8, 2, 6336, norm_per_head=True),  # 2 of 48
}


class BlockType(NamedTuple):
    """A quantised type: weights and bytes per block, its scales, its standard deviation for scale 1.

    `scales` are the float16 numbers at the start of a block, relative to the scale.
    """

    n_weight: int
    n_byte: int
    scales: tuple[float, ...]
    deviation: float


# deviations for random bits: nibbles about 8; six-bit scales times nibbles, less six-bit minima; bytes
BLOCK_TYPES = {
    "Q4_0": BlockType(32, 18, (1.0,), 4.6),
    "Q4_K": BlockType(256, 144, (1.0, 7.5), 258.0),
    "Q8_0": BlockType(32, 34, (1.0,), 73.9),
}
N_RANDOM_BLOCK = 2**17 - 1  # repeated; prime, so that no two experts are equal


def write_model(file: Path, shape: Shape, weights: str, form: Form, n_kept: int) -> Path:
    """Write a model of `n_kept` experts per layer with all its matrices of the type `weights`.

    `full` has all experts; `half-used` too, but uses half as many per token; `novices` replaces the others by
    novices; `thin` has half as many whole experts as that, and as many bytes in thin ones; `tiers` has all,
    whole, in three tiers; `hard` takes them out of the router as well; `skipped` is `novices` with a router
    that never chooses a kept expert.
    """
    import gguf

    novices = form in ("novices", "thin", "skipped")
    n_kept, tiers = _tiers(shape, form, n_kept)
    writer = gguf.GGUFWriter(file, shape.arch)
    add_dimensions(writer, shape)
    writer.add_tokenizer_model("no_vocab")
    writer.add_expert_count(n_kept if form == "hard" else shape.n_expert)
    writer.add_expert_used_count(shape.top_k // 2 if form == "half-used" else shape.top_k)
    rng = np.random.default_rng(0)
    orders = [_order(shape, n_kept) for _ in range(shape.n_layer)]
    if novices or tiers:
        _add_novice_keys(writer, shape, orders, n_kept, [n for n, _ in tiers])
    matrix = _Matrices(writer, rng, weights)
    matrix.add("token_embd.weight", shape.n_vocab, shape.n_embd)
    matrix.add("output.weight", shape.n_vocab, shape.n_embd)
    writer.add_tensor("output_norm.weight", np.ones(shape.n_embd, np.float32))
    for layer, order in enumerate(orders):
        _add_attention(writer, matrix, f"blk.{layer}", shape)
        _add_experts(writer, matrix, rng, f"blk.{layer}", shape, form, order, n_kept)
        first = n_kept
        for number, (n, width) in enumerate(tiers, start=1):
            _add_tier(matrix, f"blk.{layer}", shape, (number, width), order[first : first + n])
            first += n
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add_dimensions(writer: Any, shape: Shape) -> None:
    """Add the keys that say how large a model is, except its experts."""
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_expert_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.n_vocab)


class _Matrices:
    """Adds random matrices of one quantised type, variance 1 / (input width)."""

    def __init__(self, writer: Any, rng: np.random.Generator, weights: str) -> None:
        import gguf

        self._writer, self._type = writer, BLOCK_TYPES[weights]
        self._raw = gguf.GGMLQuantizationType[weights]
        size = (N_RANDOM_BLOCK, self._type.n_byte)
        self._blocks = rng.integers(0, 256, size, np.uint8)
        self._signs = rng.choice([-1.0, 1.0], N_RANDOM_BLOCK)

    def add(self, name: str, *shape: int, rows: np.ndarray | None = None) -> None:
        """Add a matrix, or the ones numbered `rows` of a stack of them."""
        kind = self._type
        *outer, n_in = shape
        blocks = self._blocks.copy()
        scale = self._signs / (kind.deviation * n_in**0.5)
        for position, factor in enumerate(kind.scales):
            raw = (scale * factor).astype("<f2").view(np.uint8).reshape(-1, 2)
            blocks[:, 2 * position : 2 * position + 2] = raw
        n_block = int(np.prod(shape)) // kind.n_weight
        data = np.resize(blocks, (n_block, kind.n_byte)).reshape(*outer, n_in // kind.n_weight * kind.n_byte)
        self._writer.add_tensor(name, data if rows is None else data[rows], raw_dtype=self._raw)


def _order(shape: Shape, n_kept: int) -> np.ndarray:
    """Return experts in the file's order: a random choice of kept ones first, both groups ascending."""
    shuffled = np.random.default_rng(1).permutation(shape.n_expert)
    return np.concatenate([np.sort(shuffled[:n_kept]), np.sort(shuffled[n_kept:])])


def _width(shape: Shape) -> int:
    """Return the channels of a thin expert: about half of them, in whole blocks."""
    return -(-shape.n_ff // 2 // _BLOCK) * _BLOCK


def _tiers(shape: Shape, form: Form, n_kept: int) -> tuple[int, Sequence[tuple[int, int]]]:
    """Return how many experts a form keeps, and the others' tiers, each (experts, channels)."""
    if form == "thin":  # with as many bytes as half of `n_kept` whole ones
        n_thin = round((n_kept - n_kept // 2) * shape.n_ff / _width(shape))
        return n_kept // 2, [(n_thin, _width(shape))]
    if form == "tiers":
        third = shape.n_expert // 3
        return shape.n_expert - 2 * third, [(third, shape.n_ff)] * 2
    return (shape.n_expert if form in ("full", "half-used") else n_kept), []


def _add_tier(
    matrix: "_Matrices", block: str, shape: Shape, tier: tuple[int, int], experts: np.ndarray
) -> None:
    """Add the experts of one layer's tier, (number, channels)."""
    number, width = tier
    for part in ("gate", "up"):
        name = f"{block}.ffn_{part}_exps.t{number}.weight"
        matrix.add(name, shape.n_expert, width, shape.n_embd, rows=experts)
    name = f"{block}.ffn_down_exps.t{number}.weight"
    matrix.add(name, shape.n_expert, shape.n_embd, width, rows=experts)


def _add_novice_keys(
    writer: Any, shape: Shape, orders: Sequence[np.ndarray], n_kept: int, tiers: Sequence[int]
) -> None:
    """Add the keys of the MoNE format: version 2 where there are tiers, of so many experts."""
    from gguf import GGUFValueType

    kept = [n_kept] * shape.n_layer
    writer.add_key_value(
        f"{shape.arch}.expert_kept_count", kept, GGUFValueType.ARRAY, sub_type=GGUFValueType.UINT32
    )
    writer.add_uint32("mone.format_version", 2 if tiers else 1)
    if tiers:
        writer.add_uint32(f"{shape.arch}.expert_tier_count", len(tiers))
        sizes = [*tiers] * shape.n_layer
        writer.add_key_value(
            f"{shape.arch}.expert_tier_sizes", sizes, GGUFValueType.ARRAY, sub_type=GGUFValueType.UINT32
        )
    order = np.concatenate(orders).tolist()
    writer.add_key_value("mone.expert_order", order, GGUFValueType.ARRAY, sub_type=GGUFValueType.INT32)


def _add_attention(writer: Any, matrix: _Matrices, block: str, shape: Shape) -> None:
    """Add one layer's attention and norms."""
    width, width_kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    norms = (shape.head_dim, shape.head_dim) if shape.norm_per_head else (width, width_kv)
    for part, size in (("attn_norm", shape.n_embd), ("ffn_norm", shape.n_embd)):
        writer.add_tensor(f"{block}.{part}.weight", np.ones(size, np.float32))
    for part, size in zip(("attn_q_norm", "attn_k_norm"), norms, strict=True):
        writer.add_tensor(f"{block}.{part}.weight", np.ones(size, np.float32))
    matrix.add(f"{block}.attn_q.weight", width, shape.n_embd)
    matrix.add(f"{block}.attn_k.weight", width_kv, shape.n_embd)
    matrix.add(f"{block}.attn_v.weight", width_kv, shape.n_embd)
    matrix.add(f"{block}.attn_output.weight", shape.n_embd, width)


def _add_experts(
    writer: Any,
    matrix: _Matrices,
    rng: np.random.Generator,
    block: str,
    shape: Shape,
    form: Form,
    order: np.ndarray,
    n_kept: int,
) -> None:
    """Add one layer's router, experts and novices."""
    router = rng.standard_normal((shape.n_expert, shape.n_embd), np.float32)[order]
    if form == "hard":
        router = router[:n_kept]
    elif form == "skipped":
        router[:n_kept] = 0  # some of the others always have a positive logit
    writer.add_tensor(f"{block}.ffn_gate_inp.weight", router)
    kept = order[:n_kept]
    for part in ("gate", "up"):
        matrix.add(f"{block}.ffn_{part}_exps.weight", shape.n_expert, shape.n_ff, shape.n_embd, rows=kept)
    matrix.add(f"{block}.ffn_down_exps.weight", shape.n_expert, shape.n_embd, shape.n_ff, rows=kept)
    vectors = rng.standard_normal((shape.n_expert, shape.n_embd), np.float32)
    if form in ("novices", "thin", "skipped"):
        vectors[:n_kept] = 0
        writer.add_tensor(f"{block}.ffn_down_exps.bias", vectors)
