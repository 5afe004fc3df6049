"""The reference for GGUFs against llama.cpp, calibration against the reference, and what its check finds."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import ARCHS, N_EXPERT, VARIANTS, quantised, tiny_gguf
from gguf_parts import Parts, key, put_together, taken_apart
from gguf_reference import MoeLayer, Orders, assert_pruned_copy, keys_of, prune_by_hand
from llama_tensors import inside
from torch import Tensor

import mone_export as mone
from mone_export.artifacts import Corpus
from mone_export.calibration.engines import load

pytestmark = [pytest.mark.slow, pytest.mark.upstream]

TOKENS = np.random.default_rng(0).integers(0, 128, 40).tolist()
LAYERS = (
    *(("olmoe", 1), ("qwen2moe", 1), ("qwen3moe", 0), ("llama", 0), ("gpt-oss", 1), ("deepseek2", 1)),
    *(("deepseek2 in groups", 1), ("glm4moe in groups", 1), ("deepseek4 hashed", 0), ("deepseek4 hashed", 2)),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reference")


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_a_layer_is_what_llama_cpp_computes(name: str, layer: int, folder: Path) -> None:
    file = tiny_gguf(name, folder)
    x, out = input_and_output(file, layer)
    assert error(MoeLayer.of(file, layer).forward(x, torch.tensor(TOKENS)), out) < 1e-11


def input_and_output(file: Path, layer: int) -> tuple[Tensor, Tensor]:
    """Return what llama.cpp's graph gives a layer's router, and what its routed experts add, [n_token, d]."""
    logits, out = f"ffn_moe_logits-{layer}", f"ffn_moe_out-{layer}"
    found = inside(file, TOKENS, [logits, out])
    return torch.from_numpy(found[f"{logits}.input"]), torch.from_numpy(found[out])


# llama.cpp rounds what goes into a quantised product, hence the bound
@pytest.mark.parametrize(("outtype", "bound"), [("f32", 1e-10), ("Q8_0", 1e-3), ("Q4_K_M", 3e-3)])
@pytest.mark.parametrize(("name", "layer"), LAYERS)
@pytest.mark.by_day(10)
def test_statistics_are_the_definitions(
    name: str, layer: int, outtype: str, bound: float, folder: Path
) -> None:
    file = tiny_gguf(name, folder)
    file = file if outtype == "f32" else quantised(file, outtype)
    tokens = torch.tensor(TOKENS)
    engine: Any = load(file, n_threads=1, exact=True)
    try:
        stats = mone.calibrate(engine, Corpus(tokens[None], "random", "")).layers[layer]
    finally:
        engine.close()
    x, _ = input_and_output(file, layer)
    reference = MoeLayer.of(file, layer)
    ids, weights = reference.route(x, tokens)
    for expert in range(N_EXPERT):
        token, place = torch.where(ids == expert)
        f, g = reference.expert(expert, x[token]).double(), weights[token, place].double()
        assert stats.count[expert] == len(token)
        if len(token):
            assert error(stats.out_mean[expert], f.mean(0)) < bound
            assert error(stats.gated_out_sum[expert], (g[:, None] * f).sum(0)) < bound
            assert stats.gate_sum[expert] == pytest.approx(float(g.sum()), rel=max(1e-5, bound))
            assert stats.norm_sum[expert] == pytest.approx(float(f.norm(dim=-1).sum()), rel=bound**0.5)
            if len(token) > 1:
                m2 = float((f - f.mean(0)).square().sum())
                assert stats.out_m2[expert] == pytest.approx(m2, rel=bound**0.5)


def orders_for(file: Path, n_kept: int = 5) -> Orders:
    """Return a random choice of kept experts for every layer that has experts and predicts the next token."""
    keys, rng = keys_of(file), np.random.default_rng(0)
    arch = keys["general.architecture"]
    n_layer = keys[f"{arch}.block_count"] - keys.get(f"{arch}.nextn_predict_layers", 0)
    found: Orders = {}
    for layer in range(n_layer):
        if f"blk.{layer}.ffn_down_exps.weight" in taken_apart(file).tensors:
            ids = rng.permutation(N_EXPERT).tolist()
            found[layer] = (n_kept, sorted(ids[:n_kept]) + sorted(ids[n_kept:]))
    return found


def silenced(file: Path, orders: Orders, outfile: Path) -> dict[int, bytes]:
    """Write a file whose pruned experts give a constant, by matrices of 0; return the constants.

    That is their own bias where the architecture has one, and 0 where not.
    """
    parts, novices = taken_apart(file), {}
    for layer, (n_kept, order) in orders.items():
        matrix, bias = (f"blk.{layer}.ffn_down_exps.{kind}" for kind in ("weight", "bias"))
        stored = parts.tensors[matrix]
        values = np.frombuffer(stored.data, np.float32).reshape(stored.shape[::-1]).copy()
        values[order[n_kept:]] = 0
        parts.tensors[matrix] = stored._replace(data=values.tobytes())
        own = np.zeros((len(order), stored.shape[1]), np.float32)
        if bias in parts.tensors:
            own = np.frombuffer(parts.tensors[bias].data, np.float32).reshape(own.shape)
        novices[layer] = own[order[n_kept:]].tobytes()
    outfile.write_bytes(put_together(parts))
    return novices


@pytest.mark.parametrize("name", [name for name in (*ARCHS, *VARIANTS) if name != "refact"])
@pytest.mark.by_day(16)
def test_runtime_takes_files_pruned_by_hand(name: str, folder: Path, tmp_path: Path) -> None:
    """They give the logits of the whole file whose pruned experts have matrices of 0."""
    file = tiny_gguf(name, folder)
    orders = orders_for(file)
    novices = silenced(file, orders, tmp_path / "silenced.gguf")
    pruned = prune_by_hand(file, tmp_path / "pruned.gguf", orders, novices)
    assert_pruned_copy(file, pruned)
    found, wanted, whole = (
        torch.from_numpy(inside(each, TOKENS, ["result_output"])["result_output"])
        for each in (pruned, tmp_path / "silenced.gguf", file)
    )
    assert error(found, wanted) < 1e-10
    assert error(whole, wanted) > 1e-5, "silent experts must be heard"


def _byte(name: str, place: int) -> Callable[[Parts], Parts]:
    def spoil(parts: Parts) -> Parts:
        data = bytearray(parts.tensors[name].data)
        data[place] ^= 1
        return replace(parts, tensors=parts.tensors | {name: parts.tensors[name]._replace(data=bytes(data))})

    return spoil


def _swapped(parts: Parts) -> Parts:
    first, *rest = parts.tensors.items()
    return replace(parts, tensors=dict([rest[0], first, *rest[1:]]))


def _keyed(name: str, value: int | str) -> Callable[[Parts], Parts]:
    return lambda parts: replace(parts, keys=parts.keys | {name: key(name, value)})


def _not_finite(parts: Parts) -> Parts:
    name = "blk.0.ffn_down_exps.bias"
    stored = parts.tensors[name]
    data = stored.data[:-4] + np.float32(np.nan).tobytes()
    return replace(parts, tensors=parts.tensors | {name: stored._replace(data=data)})


SPOILT: dict[str, tuple[Callable[[Parts], Parts], str]] = {
    "a kept expert": (
        _byte("blk.1.ffn_up_exps.weight", 7),
        "blk.1.ffn_up_exps.weight differs at byte 7, in row 0",
    ),
    "the router": (
        _byte("blk.0.ffn_gate_inp.weight", 3000),
        "blk.0.ffn_gate_inp.weight differs at byte 3000, in row 2",
    ),
    "another tensor": (_byte("output_norm.weight", 0), "output_norm.weight differs"),
    "a scale": (_byte("blk.0.ffn_up_exps.scale", 30), "ffn_up_exps.scale differs"),
    "the order": (_swapped, "tensors' order"),
    "a key's value": (_keyed("qwen3moe.context_length", 7), "key qwen3moe.context_length has another"),
    "a key's type": (_keyed("qwen3moe.attention.causal", 1), "key qwen3moe.attention.causal has another"),
    "a key more": (_keyed("general.author", "nobody"), "general.author"),
    "a novice": (_not_finite, "not finite"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_check_finds_what_is_wrong(case: str, folder: Path, tmp_path: Path) -> None:
    file = tiny_gguf("qwen3moe", folder)
    orders = orders_for(file)
    novices = silenced(file, orders, tmp_path / "silenced.gguf")
    pruned = prune_by_hand(file, tmp_path / "pruned.gguf", orders, novices)
    spoil, message = SPOILT[case]
    pruned.write_bytes(put_together(spoil(taken_apart(pruned))))
    with pytest.raises(AssertionError, match=message):
        assert_pruned_copy(file, pruned)


def test_check_finds_bytes_too_many(folder: Path, tmp_path: Path) -> None:
    file = tiny_gguf("qwen3moe", folder)
    longer = tmp_path / "longer.gguf"
    longer.write_bytes(file.read_bytes())
    assert_pruned_copy(file, longer)
    longer.write_bytes(file.read_bytes() + bytes(32))
    with pytest.raises(AssertionError, match="the file has"):
        assert_pruned_copy(file, longer)
