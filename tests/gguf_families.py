"""Tiny models of transformers' families as quantised GGUFs, and the same numbers back in transformers' model.

Which number of a checkpoint goes where in the GGUF is found by converting a checkpoint whose numbers are
0, 1, 2, ...: no table of names, and no knowledge of how a converter turns, splits and merges matrices.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from families import COMMON, ROWS, Row
from family_models import save_family, without_vocabulary
from gguf import GGMLQuantizationType
from gguf_parts import Parts, plain_tokenizer, put_together, taken_apart
from gguf_reference import values_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from mone_export.calibration.loading import load_module
from mone_export.output.writing import write
from mone_export.pruning.planning import plan_without_scores
from mone_export.recipe import Recipe
from mone_export.source import inspect, llamacpp

WIDTH = 256  # matrices that the types with blocks of 256 can hold
NAMES = (
    *("OlmoeForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "MixtralForCausalLM"),
    *("GptOssForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM with groups"),
    *("Glm4MoeForCausalLM with an MTP block", "Qwen3NextForCausalLM", "Dots1ForCausalLM"),
)


def wide_row(name: str) -> Row:
    """Return a family's row with matrices that quantise by 256."""
    (row,) = (row for row in ROWS if row.name == name)
    experts = "moe_intermediate_size" if "moe_intermediate_size" in row.config else "intermediate_size"
    wide = {"hidden_size": WIDTH, experts: WIDTH}
    if "kv_lora_rank" not in row.config:
        wide["head_dim"] = WIDTH // COMMON["num_attention_heads"]
    return replace(row, config=row.config | wide)


def save_wide(name: str, folder: Path) -> tuple[Path, Path]:
    """Write a family's checkpoint and its F32 GGUF, an ordinary one whose tokenizer is llama.cpp's `test`."""
    checkpoint = save_family(wide_row(name), folder / "checkpoint")
    return checkpoint, _converted(checkpoint, folder / "model-f32.gguf")


def dequantised_model(checkpoint: Path, quantised: Path) -> PreTrainedModel:
    """Return transformers' model with the numbers of a quantised GGUF of all its experts."""
    numbered = checkpoint.with_name("numbered")
    state = load_file(checkpoint / "model.safetensors")
    places = _numbered(checkpoint, numbered, state)
    flat = torch.cat([tensor.flatten() for tensor in state.values()])
    for name, tensor in taken_apart(quantised).tensors.items():
        if tensor.kind != GGMLQuantizationType.F32:
            values = torch.from_numpy(values_of(tensor).flatten().copy())
            flat[places[name]] = values
    parts = flat.split([tensor.numel() for tensor in state.values()])
    shaped = zip(state.items(), parts, strict=True)
    filled = numbered.with_name("dequantised")
    _like(checkpoint, filled, {name: part.view_as(tensor) for (name, tensor), part in shaped})
    return load_module(filled, device="cpu", dtype=torch.float32)


def _numbered(checkpoint: Path, folder: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return, for each tensor of the GGUF, the places of its numbers in the checkpoint, all in a row."""
    total = sum(tensor.numel() for tensor in state.values())
    assert total < 2**24, "float32 holds no larger whole numbers"
    numbers = torch.arange(total, dtype=torch.float32).split([tensor.numel() for tensor in state.values()])
    shaped = zip(state.items(), numbers, strict=True)
    _like(checkpoint, folder, {name: part.view_as(tensor).contiguous() for (name, tensor), part in shaped})
    stored = taken_apart(_converted(folder, folder.with_suffix(".gguf"))).tensors
    places = {}
    for name, tensor in stored.items():
        values = values_of(tensor).flatten().astype(np.float64)
        if (values == np.floor(values)).all() and values.min() >= 0:
            places[name] = torch.from_numpy(values.astype(np.int64))
    return places


def _like(checkpoint: Path, folder: Path, state: dict[str, Tensor]) -> None:
    """Write a checkpoint with other numbers."""
    shutil.rmtree(folder, ignore_errors=True)  # of another type
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _converted(folder: Path, outfile: Path) -> Path:
    """Write the F32 GGUF of a checkpoint with all experts, without what says how it was made."""
    with _token_ids_only():
        everything = plan_without_scores(inspect(folder), Recipe.of(0))
        write(folder, None, everything, outfile, outtype="f32")
    parts = taken_apart(outfile)
    keys = {name: stored for name, stored in parts.keys.items() if not name.startswith("mone.")}
    n_vocab = parts.tensors["token_embd.weight"].shape[1]
    outfile.write_bytes(put_together(Parts(keys | plain_tokenizer(n_vocab), parts.tensors)))
    return outfile


@contextmanager
def _token_ids_only() -> Iterator[None]:
    find = llamacpp.converter_class
    llamacpp.converter_class = without_vocabulary(find)
    try:
        yield
    finally:
        llamacpp.converter_class = find
