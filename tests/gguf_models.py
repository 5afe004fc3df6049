"""Tiny random GGUFs of every architecture of llama.cpp with routed experts, and their quantised variants.

llama.cpp's own `test-llama-archs` writes a model of every architecture, with two experts of which both are
used. These are the same with more experts than are used (`N_EXPERT`, `TOP_K`) and matrices that quantise by
256 where the model's width lets them; `VARIANTS` adds what none of them has. Their tokenizer, `test`, lets
llama.cpp read any text.
"""

import re
import struct
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf_parts import Parts, Stored, put_together, taken_apart, text_of

from mone_export.runtime import path as bin_folder

N_EXPERT, TOP_K, N_FF = 8, 3, 256
TYPES = ("Q8_0", "Q4_K_M", "Q4_0", "IQ4_XS", "MXFP4_MOE")

# every architecture for which `test-llama-archs` writes experts
ARCHS = (
    *("afmoe", "arctic", "bailingmoe", "bailingmoe2", "bailingmoe3", "cohere2moe", "dbrx", "deepseek"),
    *("deepseek2", "deepseek32", "deepseek4", "dots1", "dots3note", "ernie4_5-moe", "exaone-moe", "glm-dsa"),
    *("glm4moe", "glm5-next", "gpt-oss", "granite", "granitemoe", "grok", "grovemoe", "hunyuan-moe", "hy_v3"),
    *("hy_v4", "kimi-k3", "kimi-linear", "laguna", "lfm2moe", "llada-moe", "llama", "llama4", "maple"),
    *(
        "mellum",
        "mimo2",
        "minicpm",
        "minimax-01",
        "minimax-m2",
        "minimax-m3",
        "mistral3",
        "mistral4",
        "olmoe",
    ),
    *("phimoe", "qwen2moe", "qwen35moe", "qwen3moe", "qwen3next", "qwen3vlmoe", "qwen4exp", "refact"),
    *("rnd1", "smallthinker"),
)

_EXPERTS = re.compile(r"blk\.\d+\.(ffn_(gate|up|down|gate_up)_exps\..*|ffn_gate_inp\..*|exp_probs_b.*)")
_FEED_FORWARD = re.compile(r"blk\.\d+\.ffn_(gate|up|down|gate_up)(_exps|_shexp)?\..*")


def _random(tensor_name: str, *shape: int) -> Stored:
    """Return random numbers, other ones for every name, of a shape in ggml's order."""
    seed = np.random.SeedSequence([*tensor_name.encode()])
    values = np.random.default_rng(seed).standard_normal(shape[::-1], np.float32) / 10
    if re.search(r"norm[^.]*\.weight|scale$", tensor_name):
        values += 1
    return Stored(GGMLQuantizationType.F32, shape, values.tobytes())


def _larger(parts: Parts) -> Parts:
    """Give a saved model more experts than it uses, other widths of them, norms and scales near 1."""
    arch = text_of(parts.keys["general.architecture"])
    down = next(tensor for name, tensor in parts.tensors.items() if "ffn_down_exps.weight" in name)
    n_ff = down.shape[0]
    own = f"{arch}.expert_feed_forward_length"
    has_own = struct.unpack("<I", parts.keys[own][-4:])[0] != 0
    width = {n_ff: N_FF, 2 * n_ff: 2 * N_FF} if n_ff > N_FF else {}
    tensors = {}
    for name, tensor in parts.tensors.items():
        shape = tensor.shape
        if _FEED_FORWARD.fullmatch(name) and (not has_own or "exp" in name):
            shape = tuple(width.get(size, size) for size in shape)
        if _EXPERTS.fullmatch(name):
            shape = (*shape[:-1], N_EXPERT)
        remade = shape != tensor.shape or re.search(r"norm[^.]*\.weight|scale$", name)
        tensors[name] = _random(name, *shape) if remade else tensor
    wide = replace(parts, tensors=tensors).having(expert_count=N_EXPERT, expert_used_count=TOP_K)
    if not width:
        return wide
    if has_own:
        wide = wide.having(expert_feed_forward_length=N_FF)
    dense = any(re.fullmatch(r"blk\.\d+\.ffn_up\.weight", name) for name in tensors)
    return wide if has_own and dense else wide.having(feed_forward_length=N_FF)


def _hashed(parts: Parts) -> Parts:
    """Make the first two layers choose experts by the token's number alone."""
    n_vocab = parts.tensors["token_embd.weight"].shape[1]
    rng = np.random.default_rng(0)
    table = np.stack([rng.permutation(N_EXPERT)[:TOP_K] for _ in range(n_vocab)]).astype(np.int32)
    tensors = {}
    for name, tensor in parts.tensors.items():
        if re.fullmatch(r"blk\.[01]\.exp_probs_b\.bias", name):
            name = name.replace("exp_probs_b.bias", "ffn_gate_tid2eid.weight")
            tensor = Stored(GGMLQuantizationType.I32, (TOP_K, n_vocab), table.tobytes())
        tensors[name] = tensor
    return replace(parts, tensors=tensors).having(hash_layer_count=2)


def _predicting(parts: Parts) -> Parts:
    """Add a block that predicts the token after the next: the last layer again, and what joins it on."""
    n_embd = parts.tensors["token_embd.weight"].shape[0]
    added = {
        name.replace("blk.1.", "blk.2."): _random(name.replace("blk.1.", "blk.2."), *tensor.shape)
        for name, tensor in parts.tensors.items()
        if name.startswith("blk.1.") and not name.endswith("scale")
    }
    added["blk.2.nextn.eh_proj.weight"] = _random("blk.2.nextn.eh_proj.weight", 2 * n_embd, n_embd)
    for norm in ("enorm", "hnorm", "shared_head_norm"):
        added[f"blk.2.nextn.{norm}.weight"] = _random(f"blk.2.nextn.{norm}.weight", n_embd)
    longer = replace(parts, tensors=parts.tensors | added)
    return longer.having(block_count=3, nextn_predict_layers=1)


def _in_chunks(parts: Parts) -> Parts:
    """Let two experts share each of the experts for chunks."""
    tensors = {
        name: _random(name, *tensor.shape[:-1], N_EXPERT // 2) if "_chexps." in name else tensor
        for name, tensor in parts.tensors.items()
    }
    return replace(parts, tensors=tensors).having(experts_per_group=2)


def _grouped(parts: Parts) -> Parts:
    """Choose two of four groups of experts first."""
    return parts.having(expert_group_count=4, expert_group_used_count=2)


def _weighted(parts: Parts) -> Parts:
    """Let the weights of the chosen experts add up to a number that is not 1."""
    return parts.having(expert_weights_norm=True, expert_weights_scale=2.5)


def _unscaled(parts: Parts) -> Parts:
    """Leave out the factors that only files of a 4-bit float type have."""
    tensors = {name: tensor for name, tensor in parts.tensors.items() if not name.endswith("scale")}
    return replace(parts, tensors=tensors)


# name -> (architecture, what is done to its model); the first of each group is asked for by name in tests
VARIANTS: Mapping[str, tuple[str, Callable[[Parts], Parts]]] = {
    "deepseek2 in groups": ("deepseek2", lambda parts: _weighted(_grouped(parts))),
    "glm4moe in groups": ("glm4moe", lambda parts: _weighted(_grouped(parts))),
    "glm4moe predicting": ("glm4moe", _predicting),
    "deepseek4 hashed": ("deepseek4", _hashed),
    "qwen3moe unscaled": ("qwen3moe", _unscaled),
    "gpt-oss unscaled": ("gpt-oss", _unscaled),
}
# published names -> llama.cpp's
KNOWN_AS = {
    "Qwen3.8-Flash-Next": "qwen4exp",
    "DeepSeek-V4": "deepseek4",
    "GLM-5.3-Flash": "glm5-next",
    "MiniMax-M3": "minimax-m3",
}


def tiny_gguf(name: str, folder: Path) -> Path:
    """Return the F32 file of an architecture or a variant in a folder, made where it is not there yet."""
    outfile = folder / f"{name.replace(' ', '-')}-f32.gguf"
    if not outfile.exists():
        arch, change = VARIANTS.get(name, (name, lambda parts: parts))
        saved = folder / "saved"
        saved.mkdir(exist_ok=True)
        _run("test-llama-archs", "-a", arch, "-s", "1", "-o", saved)
        parts = _larger(taken_apart(saved / f"{arch}-moe.gguf"))
        if arch == "grovemoe":
            parts = _in_chunks(parts)
        outfile.write_bytes(put_together(change(parts)))
        for file in saved.iterdir():
            file.unlink()
    return outfile


def tiny_ggufs(folder: Path) -> dict[str, Path]:
    """Return the F32 files of all architectures and variants, by name."""
    return {name: tiny_gguf(name, folder) for name in (*ARCHS, *VARIANTS)}


def dense_gguf(folder: Path) -> Path:
    """Return the F32 file of a model without experts, made in a folder."""
    _run("test-llama-archs", "-a", "llama", "-s", "1", "-o", folder)
    return folder / "llama-dense.gguf"


def quantised(file: Path, outtype: str, *options: str) -> Path:
    """Return a file in another type beside it, made by llama-quantize where it is not there yet."""
    stem = file.stem.removesuffix("-f32")
    outfile = file.with_name("-".join([stem, outtype, *(option.strip("-") for option in options)]) + ".gguf")
    if not outfile.exists():
        _run("llama-quantize", *options, file, outfile, outtype, "1")
    return outfile


def _run(program: str, *arguments: Any) -> None:
    command = [str(part) for part in (bin_folder() / program, *arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-2000:]
