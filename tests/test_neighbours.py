"""Checkpoints beside GGUFs: written, loaded by transformers, read again; what cannot be is refused in a line."""

import json
import shutil
from pathlib import Path

import gguf_file
import pytest
import torch
from command import Command, names
from families import ROWS
from family_models import calibrated, random_tokens, save_family, without_vocabulary
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import mone_export as mone
from mone_export.artifacts import Calibration, Plan
from mone_export.calibration.loading import load_module
from mone_export.calibration.masking import masked
from mone_export.output import checkpoints
from mone_export.output.checkpoints import checkpoint_size, write_checkpoint
from mone_export.output.writing import write
from mone_export.pruned_model import load_pruned
from mone_export.pruning.novices import novices
from mone_export.pruning.planning import plan
from mone_export.pruning.scoring import score
from mone_export.source import llamacpp, open_source
from mone_export.source.shape import expert_modules

TOKENS = torch.randint(3, 400, (2, 40), generator=torch.Generator().manual_seed(1))
CONSTANTS = ("--novice", "least-squares")


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory, small: Path) -> Path:
    """The small Mixtral in BF16, as published checkpoints are, with a model card."""
    folder = shutil.copytree(small, tmp_path_factory.mktemp("bf16") / "small")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# A model\n\nIt is the best.\n")
    (folder / "LICENSE").write_text("Do as you like.\n")
    return folder


@pytest.fixture
def export(bf16: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command on that model."""
    return Command(bf16, text, capsys)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's files."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def logits(model: PreTrainedModel, tokens: Tensor = TOKENS) -> Tensor:
    with torch.inference_mode():
        return model(tokens).logits


def assert_same_file(one: Path, other: Path, *, but: str) -> set[str]:
    """Assert that two GGUFs have the same tensors, and the same keys except some; returns those."""
    first, second = gguf_file.read(one), gguf_file.read(other)
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert (tensor.kind, tensor.shape) == second.tensors[name][:2], name
        assert tensor.data.tobytes() == second.tensors[name].data.tobytes(), name
    different = {key for key in first.keys | second.keys if first.keys.get(key) != second.keys.get(key)}
    assert all(key.startswith(but) for key in different), different
    return different


# with novices: the form


def test_novices_have_the_authors_form(export: Command, tmp_path: Path) -> None:
    done = export("--hf-out", tmp_path / "half", "--stats", tmp_path / "stats", quiet=False)
    done.is_fine()
    assert f"wrote {tmp_path / 'half'}\n" in done.out and ".gguf" not in done.out
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    own = json.loads((export.model / "config.json").read_text())
    assert {key: config[key] for key in own} == own, "the architecture is the original one"
    source, found = load_file(export.model / "model.safetensors"), tensors_of(tmp_path / "half")
    calibration = mone.Calibration.load(tmp_path / "stats")
    chosen = mone.plan(mone.score(calibration), ratio=0.5)
    assert config["approximate_experts"] == {str(at.layer): list(at.pruned) for at in chosen.layers}
    constants = {}
    for layer in chosen.layers:
        vectors = novices(calibration.layers[layer.layer], "least-squares")
        prefix = f"model.layers.{layer.layer}.block_sparse_moe.experts."
        constants |= {f"{prefix}{e}.approx_value": vectors[e].float() for e in layer.pruned}
    assert {name for name in found if name.endswith("approx_value")} == constants.keys()
    assert all(torch.equal(found[name], vector) for name, vector in constants.items())
    gone = tuple(name.removesuffix("approx_value") for name in constants)
    kept = {name: tensor for name, tensor in source.items() if not name.startswith(gone)}
    assert found.keys() == kept.keys() | constants.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}


def test_what_belongs_to_a_model_comes_along(export: Command, tmp_path: Path) -> None:
    export("--hf-out", tmp_path / "half").is_fine()
    beside = {"LICENSE", "README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert set(names(tmp_path / "half")) == beside | {"tokenizer.model", "tokenizer_config.json"}
    card = (tmp_path / "half" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n---\n") and "best" not in card and "50%" in card
    wanted = AutoTokenizer.from_pretrained(export.model)("a few words").input_ids
    assert AutoTokenizer.from_pretrained(tmp_path / "half")("a few words").input_ids == wanted


def test_large_weights_lie_in_several_files(
    export: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export("--hf-out", tmp_path / "one", "--stats", tmp_path / "stats").is_fine()
    monkeypatch.setattr(checkpoints, "LARGEST_FILE", 300_000)
    export("--hf-out", tmp_path / "many", "--stats", tmp_path / "stats").is_fine()
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 400_000 for file in files)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())["weight_map"]
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert set(opened.keys()) == {name for name, owner in index.items() if owner == file.name}
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    assert torch.equal(logits(load_pruned(tmp_path / "one")), logits(load_pruned(tmp_path / "many")))


# with novices: loaded by transformers


def test_a_loaded_model_is_the_original_with_novices(export: Command, tmp_path: Path) -> None:
    export("--hf-out", tmp_path / "half", "--stats", tmp_path / "stats", *CONSTANTS).is_fine()
    calibration = mone.Calibration.load(tmp_path / "stats")
    chosen = plan(score(calibration), ratio=0.5)
    model = load_pruned(tmp_path / "half", dtype=torch.float32)
    whole = load_module(export.model, device="cpu", dtype=torch.float32)
    for implementation in ("grouped_mm", "batched_mm", "eager"):
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(logits(model), with_novices(whole, calibration, chosen), rtol=0, atol=1e-4)
    assert (logits(whole) - logits(model)).abs().max() > 0.1
    experts = dict(expert_modules(model))
    assert [len(experts[at.layer].down_proj) for at in chosen.layers] == [
        len(at.kept) for at in chosen.layers
    ]
    assert mone.load_pruned(str(tmp_path / "half")).dtype == torch.bfloat16, "the checkpoint's own"


def with_novices(
    whole: PreTrainedModel, calibration: Calibration, chosen: Plan, tokens: Tensor = TOKENS
) -> Tensor:
    """What the observer's model computes with novices in place of the plan's pruned experts."""
    vectors = {layer: novices(stats, "least-squares") for layer, stats in calibration.layers.items()}
    with masked(whole, {layer.layer: layer.pruned for layer in chosen.layers}, vectors):
        return logits(whole, tokens)


APART = ("OlmoeForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV2ForCausalLM")
"""Families of which the MoNE authors have models; Moonlight is of the next one."""
AUTHORS = (
    *APART,
    "DeepseekV3ForCausalLM",
    "MixtralForCausalLM",
    "MiniMaxM2ForCausalLM",
    "Glm4MoeForCausalLM",
)


@pytest.mark.parametrize("name", AUTHORS)
def test_families_pruned_loaded_and_converted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written in BF16, loaded by transformers, and converted: the GGUF is the direct one."""
    row = next(row for row in ROWS if row.hf_class == name and not row.packed and not row.variant)
    folder = to_bf16(save_family(row, tmp_path / "from" / "model"))
    monkeypatch.setattr(llamacpp, "converter_class", without_vocabulary(llamacpp.converter_class))
    source = open_source(folder)
    whole, calibration = calibrated(folder, source.spec)
    chosen = plan(score(calibration), ratio=0.5, score="error")
    write(source, calibration, chosen, tmp_path / "direct.gguf")
    there = tmp_path / "to" / "model"
    there.parent.mkdir()
    size = write_checkpoint(source, calibration, chosen, there)
    assert size == checkpoint_size(source, chosen) == sum(t.nbytes for t in tensors_of(there).values())

    tokens = random_tokens(2, 40)
    found = logits(load_pruned(there, dtype=torch.float32), tokens)
    torch.testing.assert_close(found, with_novices(whole, calibration, chosen, tokens), rtol=0, atol=1e-4)

    as_the_authors_have_it(there)
    again = open_source(there)
    assert again.spec == source.spec and again.substituted
    write(again, None, again.substituted.plan(again.spec), tmp_path / "again.gguf")
    assert_same_file(tmp_path / "direct.gguf", tmp_path / "again.gguf", but="mone.")
    torch.testing.assert_close(logits(load_pruned(there, dtype=torch.float32), tokens), found)


def to_bf16(folder: Path) -> Path:
    """Round a checkpoint's weights."""
    file = folder / "model.safetensors"
    rounded = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(rounded, file, metadata={"format": "pt"})
    return folder


def as_the_authors_have_it(folder: Path) -> None:
    """Give a checkpoint the names of the classes that come with the MoNE authors' code."""
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] += "_compressed"
    config["architectures"] = [name.replace("Olmoe", "Olmone") for name in config["architectures"]]
    config["flap_intermediate_sizes"] = None
    del config["mone_export"]
    (folder / "config.json").write_text(json.dumps(config))
