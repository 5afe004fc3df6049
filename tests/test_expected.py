"""Checkpoints that do not fit their config are refused from their headers, in one line with all causes."""

import json
import re
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from families import ROWS, Row
from family_models import save_family
from safetensors.torch import load_file, save_file
from tiny import random_model
from torch import Tensor
from transformers import OlmoeForCausalLM

from mone_export.calibration.loading import load
from mone_export.errors import MoneError
from mone_export.source import open_source
from mone_export.source.expected import check_tensors
from mone_export.source.shape import read_config

EXPORTED = [row for row in ROWS if row.refused is None]
N_EXPERT, N_LAYER = 16, 3
Tensors = dict[str, Tensor]


def saved(folder: Path, family: str = "OlmoeForCausalLM") -> Path:
    random_model(family, 64).save_pretrained(folder)
    return folder


def rewrite(folder: Path, change: Callable[[Tensors], Tensors], form: str = "pt") -> Path:
    file = folder / "model.safetensors"
    tensors = change(load_file(file))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": form}
    )
    return folder


def amend(folder: Path, **keys: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(MoneError) as error:
        check_tensors(folder, read_config(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.slow
@pytest.mark.families
@pytest.mark.parametrize("row", EXPORTED, ids=lambda row: row.name)
def test_every_familys_checkpoint_fits(row: Row, tmp_path: Path) -> None:
    folder = save_family(row, tmp_path)
    check_tensors(folder, read_config(folder))


@pytest.mark.parametrize("family", ["OlmoeForCausalLM", "MixtralForCausalLM", "GptOssForCausalLM"])
def test_what_transformers_saves_fits(family: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, family)
    check_tensors(folder, read_config(folder))


def test_the_demo_takes_no_time() -> None:
    path = open_source("demo").view
    check_tensors(path, read_config(path))  # imports, and torch's first steps on the meta device
    start = time.process_time()
    check_tensors(path, read_config(path))
    assert time.process_time() - start < 0.5


def test_no_weight_is_read(tmp_path: Path) -> None:
    """A file of 48 layers with 128 experts each that holds nothing but its header."""
    folder = saved(tmp_path)
    amend(folder, num_hidden_layers=24, num_experts=64)
    shapes = {name: list(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    grown = dict(_grown(shapes))
    write_header(folder / "model.safetensors", grown)
    start = time.process_time()
    check_tensors(folder, read_config(folder))
    print(f"\n{len(grown)} tensors in {time.process_time() - start:.2f} s")
    grown.pop("model.layers.17.mlp.experts.33.up_proj.weight")
    write_header(folder / "model.safetensors", grown)
    assert "layers.17.mlp.experts.gate_up_proj" in refusal(folder)


def _grown(shapes: dict[str, list[int]]) -> Iterator[tuple[str, list[int]]]:
    for name, shape in shapes.items():
        if not name.startswith("model.layers.0."):
            if "layers" not in name:
                yield name, shape
            continue
        for layer in range(24):
            each = name.replace("layers.0", f"layers.{layer}")
            if ".experts.0." in name:
                yield from ((each.replace(".experts.0.", f".experts.{e}."), shape) for e in range(64))
            elif ".experts." not in name:
                yield each, [64, *shape[1:]] if name.endswith("gate.weight") else shape


def write_header(file: Path, shapes: dict[str, list[int]]) -> None:
    """Write the header of a file of float32 tensors, and no data: a hole of their size."""
    start, entries = 0, {}
    for name, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, start + size]}
        start += size
    header = json.dumps(entries).encode()
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        out.truncate(8 + len(header) + start)


def test_mlx_is_named(tmp_path: Path) -> None:
    assert "saved by MLX" in refusal(rewrite(saved(tmp_path), lambda tensors: tensors, form="mlx"))


def test_a_count_of_experts_that_is_not_the_files_is_named(tmp_path: Path) -> None:
    folder = amend(saved(tmp_path), num_experts=12)
    assert re.search(
        r"config.json says 12 experts, model.layers.0.mlp\S+ and 8 more hold 16$", refusal(folder)
    )


@pytest.mark.parametrize(
    ("told", "said"), [(2, "it has 3 layers, config.json says 2"), (5, "lacks 2 of 5 layers")]
)
def test_a_count_of_layers_that_is_not_the_files_is_named(told: int, said: str, tmp_path: Path) -> None:
    assert said in refusal(amend(saved(tmp_path), num_hidden_layers=told))


def test_all_causes_are_named_at_once(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        del tensors["model.norm.weight"]
        tensors["model.layers.1.mlp.gate.weight"] = torch.zeros(N_EXPERT, 8)
        return tensors | {"model.layers.0.mlp.extra": torch.zeros(4)}

    said = refusal(rewrite(saved(tmp_path), change))
    assert "lacks model.norm.weight: get all files again" in said
    assert "model.layers.1.mlp.gate.weight is [16, 8], by config.json [16, 64]" in said
    assert "nothing reads model.layers.0.mlp.extra" in said


def test_gpt_oss_with_a_matrix_for_each_expert_is_named(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        apart: Tensors = {}
        for name, tensor in tensors.items():
            if ".experts." in name and "bias" not in name:
                start, _, end = name.rpartition(".")
                apart |= {f"{start}.{expert}.{end}.weight": part for expert, part in enumerate(tensor)}
            else:
                apart[name] = tensor
        return apart

    said = refusal(rewrite(saved(tmp_path, "GptOssForCausalLM"), change))
    assert re.search(
        r"it holds experts apart, model.layers.0.mlp.experts.0.down_proj.weight and \d+ more", said
    )


def fused_fp8(folder: Path) -> Path:
    """Rewrite a Qwen3-MoE as FP8 with its experts' matrices stacked, and so their scales."""

    def change(tensors: Tensors) -> Tensors:
        packed: Tensors = {}
        for name, tensor in tensors.items():
            layer, found, rest = name.partition(".experts.")
            if not found:
                packed[name] = tensor
            elif rest == "0.gate_proj.weight":
                names = [f"{layer}.experts.{{}}.{part}_proj.weight" for part in ("gate", "up", "down")]
                gate, up, down = (
                    torch.stack([tensors[each.format(expert)] for expert in range(N_EXPERT)])
                    for each in names
                )
                for each, stack in (("gate_up_proj", torch.cat((gate, up), 1)), ("down_proj", down)):
                    packed[f"{layer}.experts.{each}"] = stack.to(torch.float8_e4m3fn)
                    rows, columns = (size // 16 for size in stack.shape[1:])
                    packed[f"{layer}.experts.{each}_scale_inv"] = torch.ones(N_EXPERT, rows, columns)
        return packed

    rewrite(folder, change)
    quantisation = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    return amend(folder, quantization_config=quantisation | {"fmt": "e4m3"})


def test_stacked_scales_of_fp8_are_refused(tmp_path: Path) -> None:
    said = refusal(fused_fp8(saved(tmp_path, "Qwen3MoeForCausalLM")))
    assert re.search(r"nothing reads model.layers.0.mlp.experts.down_proj_scale_inv and 5 more", said)
    assert "pass the model's BF16 checkpoint" in said


@pytest.mark.slow
@pytest.mark.families
def test_a_lost_scale_is_named(tmp_path: Path) -> None:
    """transformers would take the weight for one without."""
    folder = save_family(next(row for row in EXPORTED if row.packed == "fp8"), tmp_path)
    names = load_file(folder / "model.safetensors")
    lost = next(name for name in names if name.endswith("experts.3.up_proj.weight_scale_inv"))
    also = next(name for name in names if name.endswith("o_proj.weight_scale_inv"))
    rewrite(folder, lambda tensors: {name: tensors[name] for name in tensors if name not in (lost, also)})
    said = refusal(folder)
    assert f"it lacks {min(lost, also)} and 1 more" in said


def test_a_scale_is_not_excused_by_its_layers_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class leaves layers unread that are blocks of prediction in one of its models, by their number."""
    monkeypatch.setattr(OlmoeForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.1.*"])
    name = "model.layers.1.self_attn.q_proj.weight_scale_inv"
    folder = rewrite(saved(tmp_path), lambda tensors: tensors | {name: torch.ones(1)})
    assert f"nothing reads {name}, and" in refusal(folder)


@pytest.mark.parametrize("stream", ["on", "off"])
def test_loading_refuses_scales_that_nobody_reads(stream: str, tmp_path: Path) -> None:
    folder = fused_fp8(saved(tmp_path, "Qwen3MoeForCausalLM"))
    with pytest.raises(MoneError, match="nothing reads .*_scale_inv"):
        load(folder, device="cpu", dtype="float32", stream=stream)  # type: ignore[arg-type]


@pytest.mark.parametrize("stream", ["on", "off"])
def test_loading_names_what_does_not_fit(stream: str, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        return tensors | {"model.norm.weight": torch.ones(8)}

    folder = rewrite(saved(tmp_path), change)
    with pytest.raises(MoneError, match=r"model.norm.weight is \[8\], by config.json \[64\]"):
        load(folder, device="cpu", dtype="float32", stream=stream)  # type: ignore[arg-type]


def test_blocks_that_predict_and_parts_that_see_may_stay_unread(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        layer = f"model.layers.{N_LAYER}"
        names = (f"{layer}.enorm.weight", f"{layer}.input_layernorm.weight", "mtp.norm.weight")
        return tensors | {name: torch.ones(64) for name in (*names, "visual.blocks.0.norm1.weight")}

    folder = rewrite(saved(tmp_path), change)
    check_tensors(folder, read_config(folder))
