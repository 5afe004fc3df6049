"""Checkpoints beside GGUFs: written, loaded by transformers, read again; refusals are one line."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf_file
import numpy as np
import pytest
import torch
from command import Command, names
from families import ROWS, Row
from family_models import calibrated, random_tokens, save_family, without_vocabulary
from hub_server import hub_server
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import mone_export as mone
from mone_export import cli
from mone_export.artifacts import Calibration, LayerPlan, Plan
from mone_export.calibration.loading import load_module
from mone_export.calibration.masking import masked
from mone_export.errors import MoneError
from mone_export.output import checkpoints
from mone_export.output.checkpoints import check_expressible, checkpoint_size, write_checkpoint
from mone_export.output.writing import write
from mone_export.pruned_model import load_pruned
from mone_export.pruning.dern import recombine
from mone_export.pruning.novices import novices
from mone_export.pruning.planning import plan, plan_without_scores
from mone_export.pruning.scoring import score
from mone_export.recipe import Recipe
from mone_export.source import llamacpp, open_source
from mone_export.source.shape import auto_class, expert_modules

pytestmark = pytest.mark.slow  # a whole command each

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
    (folder / "LICENSES").mkdir()  # as REUSE has it
    (folder / "LICENSES" / "MIT.txt").write_text("Do as you like.\n")
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


def test_what_is_no_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(MoneError, match="has no config.json"):
        load_pruned(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(MoneError, match="is a GGUF: llama_cpp loads it"):
        load_pruned(tmp_path / "a.gguf")


def test_a_loaded_model_is_not_saved_without_its_novices(half: Path, tmp_path: Path) -> None:
    with pytest.raises(MoneError, match=f"copy {re.escape(str(half))}, "):
        load_pruned(half).save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


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


AUTHORS = ("OlmoeForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV2ForCausalLM")
"""Families of which the MoNE authors have models; of Moonlight's, DeepSeek-V3, too."""
FAST = (*AUTHORS, "DeepseekV3ForCausalLM", "MixtralForCausalLM", "MiniMaxM2ForCausalLM", "Glm4MoeForCausalLM")
WRITTEN = [
    pytest.param(row, id=row.name, marks=() if row.name in FAST else (pytest.mark.slow,))
    for row in ROWS
    if not (row.packed or row.refused)
]


@pytest.mark.parametrize("row", WRITTEN)
@pytest.mark.by_day(16)
def test_families_pruned_loaded_and_converted(
    row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written in BF16, loaded by transformers, and converted: the GGUF is the direct one."""
    folder = to_bf16(save_family(row, tmp_path / "from" / "model"))
    monkeypatch.setattr(llamacpp, "converter_class", without_vocabulary(llamacpp.converter_class))
    source = open_source(folder)
    whole, calibration = calibrated(folder, source.spec)
    chosen = plan(score(calibration), ratio=0.5, score="error")
    there = tmp_path / "to" / "model"
    there.parent.mkdir()
    try:
        size = write_checkpoint(source, calibration, chosen, there)
    except MoneError as error:
        assert "stacks the experts" in str(error) and row.name not in FAST
        pytest.skip(str(error))
    assert size == checkpoint_size(source, chosen) == sum(t.nbytes for t in tensors_of(there).values())

    tokens = random_tokens(2, 40)
    found = logits(load_pruned(there, dtype=torch.float32), tokens)
    torch.testing.assert_close(found, with_novices(whole, calibration, chosen, tokens), rtol=0, atol=1e-4)

    write(source, calibration, chosen, tmp_path / "direct.gguf")
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


# without novices


@pytest.mark.parametrize("method", ["drop", "dern"])
def test_ordinary_checkpoints_convert_to_the_direct_file(
    export: Command, tmp_path: Path, method: str
) -> None:
    """Of a plain one, too, the GGUF is the direct one; both come from one run."""
    done = export("--method", method, "--hf-out", tmp_path / "small", "-o", tmp_path / "a.gguf", quiet=False)
    done.is_fine()
    assert f"wrote {tmp_path / 'a.gguf'}\nwrote {tmp_path / 'small'}\n" in done.out
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    own = json.loads((export.model / "config.json").read_text())
    changed = {key for key in config if config[key] != own.get(key)}
    assert changed == {"num_local_experts", "mone_export"} and config["num_local_experts"] == 8
    assert not open_source(tmp_path / "small").substituted
    export("--ratio", "0", "-o", tmp_path / "b.gguf", model=tmp_path / "small", text="").is_fine()
    one, other = gguf_file.read(tmp_path / "a.gguf"), gguf_file.read(tmp_path / "b.gguf")
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert tensor.data.tobytes() == other.tensors[name].data.tobytes(), name


DROPPED = ("DeepseekV3ForCausalLM", "GptOssForCausalLM", "GraniteMoeForCausalLM", "Ernie4_5_MoeForCausalLM")


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.name, marks=() if row.name in DROPPED else (pytest.mark.slow,))
        for row in ROWS
        if not (row.packed or row.refused or row.config.get("n_group", 1) > 1)
    ],
)
@pytest.mark.by_day(12)
def test_transformers_loads_what_is_left(row: Row, tmp_path: Path) -> None:
    """Routers with biases, stacks in the files, and names of their own: the logits are of fewer rows."""
    source = open_source(save_family(row, tmp_path / "model"))
    whole, calibration = calibrated(source.folder, source.spec)
    chosen = plan(score(calibration, "reap"), ratio=0.5, method="drop")
    write_checkpoint(source, calibration, chosen, tmp_path / "half")
    found = auto_class(source.config).from_pretrained(tmp_path / "half", dtype=torch.float32).eval()
    kept = {layer.layer: list(layer.kept) for layer in chosen.layers}
    direct = type(whole)(found.config).eval()
    assert {len(experts.down_proj) for _, experts in expert_modules(direct)} == {8}
    state, shapes = whole.state_dict(), direct.state_dict()
    for key, tensor in state.items():
        for axis, (n_own, n_wanted) in enumerate(zip(tensor.shape, shapes[key].shape, strict=True)):
            if n_own != n_wanted:
                number = int(key.split("layers.")[1].split(".")[0])
                state[key] = tensor.index_select(axis, torch.tensor(kept[number]))
    direct.load_state_dict(state)
    tokens = random_tokens(2, 40)
    assert torch.equal(logits(found, tokens), logits(direct, tokens))
    assert (logits(found, tokens) - logits(whole, tokens)).abs().max() > 1e-3


def test_kept_experts_take_up_parts_of_others(export: Command, tmp_path: Path) -> None:
    export("--method", "dern", "--hf-out", tmp_path / "half", "--stats", tmp_path / "stats").is_fine()
    calibration = mone.Calibration.load(tmp_path / "stats")
    chosen = plan(score(calibration, "gate"), ratio=0.5, method="dern")
    whole = dict(expert_modules(load_module(export.model, device="cpu", dtype=torch.float32)))
    found = dict(expert_modules(AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)))
    for layer in chosen.layers:
        experts, stats = whole[layer.layer], calibration.layers[layer.layer]

        def segments(expert: int, experts: Any = experts) -> Tensor:
            gate, up = experts.gate_up_proj[expert].chunk(2)
            return torch.stack([gate, up, experts.down_proj[expert].T], 1).detach()

        made = recombine(segments, layer.kept, layer.pruned, stats.gate_sum / stats.n_token)
        for slot, new in enumerate(made):
            rounded = new.bfloat16().float()
            gate_up = torch.cat([rounded[:, 0], rounded[:, 1]])
            assert torch.equal(found[layer.layer].gate_up_proj[slot], gate_up)
            assert torch.equal(found[layer.layer].down_proj[slot], rounded[:, 2].T)


# read again


@pytest.fixture(scope="module")
def half(bf16: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the small model's experts as constants, and the direct file beside it; not to be changed."""
    folder = tmp_path_factory.mktemp("half")
    options = ["--ratio", "0.5", "-f", str(text), "--chunks", "2", "-c", "32", "-q", *CONSTANTS]
    outputs = ["--hf-out", str(folder / "small"), "-o", str(folder / "direct.gguf")]
    outputs += ["--stats", str(folder / "stats")]
    assert cli.main([str(bf16), *options, *outputs]) == 0
    return folder / "small"


@pytest.mark.parametrize("ratio", [(), ("--ratio", "0")], ids=["", "ratio 0"])
def test_a_pruned_checkpoint_is_the_direct_file(half: Path, tmp_path: Path, ratio: tuple[str, ...]) -> None:
    assert cli.main([str(half), *ratio, "-o", str(tmp_path / "again.gguf"), "-q"]) == 0
    different = assert_same_file(half.with_name("direct.gguf"), tmp_path / "again.gguf", but="mone.")
    measured = {f"mone.calibration.{name}" for name in ("sha256", "tokens", "measured")}
    assert different == {"mone.source.sha256", "mone.options", "mone.inputs", *measured}


def test_counts_may_differ_from_layer_to_layer(half: Path) -> None:
    """Else the files that are compared here would say little."""
    plan = mone.open_source(half).substituted
    assert plan and len({len(ids) for ids in plan.experts.values()}) > 1


def test_a_pruned_checkpoint_in_another_type(export: Command, half: Path, tmp_path: Path) -> None:
    stats = half.with_name("stats")
    export("--stats", stats, "--outtype", "q8_0", "-o", tmp_path / "a", *CONSTANTS, text="").is_fine()
    export("--ratio", "0", "--outtype", "q8_0", "-o", tmp_path / "b", model=half, text="").is_fine()
    assert_same_file(tmp_path / "a", tmp_path / "b", but="mone.")
    assert any(tensor.kind == "Q8_0" for tensor in gguf_file.read(tmp_path / "b").tensors.values())


def test_sizes_of_a_pruned_checkpoint_are_exact(
    half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([str(half), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert cli.main([str(half), "-o", str(tmp_path / "x.gguf"), "-q"]) == 0
    assert f"({(tmp_path / 'x.gguf').stat().st_size} bytes)" in said


EVIL = """import pathlib
pathlib.Path({mark!r}).touch()
class Config: pass
class Model: pass
"""


def with_code(half: Path, folder: Path, mark: Path) -> Path:
    """The checkpoint with code that leaves a mark, named wherever a config can name it."""
    shutil.copytree(half, folder)
    (folder / "evil.py").write_text(EVIL.format(mark=str(mark)))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config["model_type"] += "_compressed"
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["evil.Model", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("option", [(), ("--trust-remote-code",)], ids=["", "trusted"])
def test_code_that_comes_along_does_not_run(half: Path, tmp_path: Path, option: tuple[str, ...]) -> None:
    folder, mark = with_code(half, tmp_path / "small", tmp_path / "mark"), tmp_path / "mark"
    assert cli.main([str(folder), *option, "-o", str(tmp_path / "x.gguf"), "-q"]) == 0
    assert_same_file(half.with_name("direct.gguf"), tmp_path / "x.gguf", but="mone.")
    assert torch.equal(logits(load_pruned(folder)), logits(load_pruned(half)))
    assert not mark.exists()
    exec((folder / "evil.py").read_text(), {})
    assert mark.exists(), "it would have left one"


@pytest.mark.slow
def test_a_pruned_checkpoint_by_id(half: Path, tmp_path: Path) -> None:
    with hub_server() as server:
        server.add("someone/half-MoE", half)
        environment = os.environ | server.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "mone_export", "someone/half-MoE", "--ratio", "0", "-q"]
        command += ["-o", str(tmp_path / "x.gguf")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    one, other = gguf_file.read(half.with_name("direct.gguf")), gguf_file.read(tmp_path / "x.gguf")
    assert one.tensors.keys() == other.tensors.keys()
    assert all(np.array_equal(tensor.data, other.tensors[name].data) for name, tensor in one.tensors.items())


# what cannot be


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (("--novice", "thin"), "has no place for thin experts.*--novice least-squares"),
        (("--fit", "1M"), "--fit counts a GGUF's bytes.*--ratio"),
        (("--method", "drop", "--allocate", "sensitivity"), "same number of experts in every layer"),
        (("--outtype", "q8_0"), "--outtype is about a GGUF.*-o FILE"),
        (("--split-max-size", "1G"), "--split-max-size is about a GGUF"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_a_checkpoint_cannot_be(
    export: Command, tmp_path: Path, options: tuple[str, ...], pattern: str
) -> None:
    export("--hf-out", tmp_path / "x", *options).is_one_line(pattern)
    assert not list(tmp_path.iterdir())


def test_uneven_plans_name_the_remedy(
    export: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plan of another method, whose counts differ."""
    export("-o", tmp_path / "x.gguf", "--plan-out", tmp_path / "plan.json", *CONSTANTS).is_fine()
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert len({len(layer["kept"]) for layer in saved["layers"].values()}) > 1
    arguments = [str(export.model), "--plan", str(tmp_path / "plan.json"), "--method", "drop", "-q"]
    assert cli.main([*arguments, "--hf-out", str(tmp_path / "x")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--allocate even" in line


def test_a_router_needs_as_many_as_it_chooses(bf16: Path) -> None:
    source = open_source(bf16)
    few = tuple(LayerPlan(layer, (0, 1), tuple(range(2, 16))) for layer in source.spec.moe_layers)
    uneven = (LayerPlan(0, tuple(range(8)), tuple(range(8, 16))), *few[1:])
    for layers, pattern in ((few, "a token uses 4 experts"), (uneven, "2 to 8: pass --allocate even")):
        with pytest.raises(MoneError, match=pattern):
            check_expressible(source, Plan(source.spec, Recipe.of(0.5, method="drop"), layers))


def test_thin_experts_are_left_out_by_default_with_a_line(export: Command, tmp_path: Path) -> None:
    done = export("--hf-out", tmp_path / "x", "-o", tmp_path / "x.gguf", quiet=False)
    done.is_fine()
    (line,) = [line for line in done.err.splitlines() if "become constants" in line]
    assert "--hf-out" in line
    assert "channels" not in done.out


def test_a_plan_with_thin_experts_is_refused(export: Command, tmp_path: Path) -> None:
    export("-o", tmp_path / "x.gguf", "--plan-out", tmp_path / "plan.json").is_fine()
    status = cli.main(
        [str(export.model), "--plan", str(tmp_path / "plan.json"), "--hf-out", str(tmp_path / "x"), "-q"]
    )
    assert status == 1 and not (tmp_path / "x").exists()


def test_a_gguf_gives_no_checkpoint(export: Command, half: Path, tmp_path: Path) -> None:
    model = half.with_name("direct.gguf")
    export("--ratio", "0", "--hf-out", tmp_path / "x", model=model, text="").is_one_line("is a GGUF")


@pytest.mark.parametrize(
    "options", [("--ratio", "0.5"), ("--ratio", "0", "--method", "drop"), ("--fit", "1G")], ids=" ".join
)
def test_constants_are_not_chosen_again(
    export: Command, half: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    done = export(*options, "-o", tmp_path / "x.gguf", model=half, text="")
    done.is_one_line("has constants in the place of experts already.*prune the model it was made from")
    export("--ratio", "0", "--hf-out", tmp_path / "x", model=half, text="").is_one_line(
        "pruned checkpoint already"
    )


def test_each_loader_names_the_other(export: Command, half: Path) -> None:
    with pytest.raises(MoneError, match="from_pretrained"):
        load_pruned(export.model)
    with pytest.raises(MoneError, match="load_pruned"):
        mone.load(half)


def test_stacks_and_packed_experts_are_refused(tmp_path: Path) -> None:
    rows = {
        "stacks the experts": ("GptOssForCausalLM", ""),
        "quantised by fp8": ("Qwen3MoeForCausalLM", "fp8"),
    }
    for pattern, (name, packed) in rows.items():
        row = next(row for row in ROWS if row.hf_class == name and row.packed == packed)
        source = open_source(save_family(row, tmp_path / name))
        chosen = plan_without_scores(source.spec, Recipe.of(0.5))
        with pytest.raises(MoneError, match=pattern):
            checkpoint_size(source, chosen)


# whose folder


def test_a_strangers_folder_stays(export: Command, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    export("--hf-out", tmp_path / "mine", "--overwrite").is_one_line("is no checkpoint of mone-export alone")
    export("--hf-out", export.model).is_one_line("holds what is given as MODEL")
    export("--hf-out", tmp_path / "no" / "x").is_one_line("does not exist")
    assert names(tmp_path / "mine") == ["config.json"]


def test_a_folder_of_ours_is_replaced_as_a_whole(
    export: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").mkdir()
    monkeypatch.setattr(checkpoints, "LARGEST_FILE", 300_000)
    export("--hf-out", tmp_path / "x", "--stats", tmp_path / "stats").is_fine()
    first = tensors_of(tmp_path / "x")
    monkeypatch.undo()
    export("--hf-out", tmp_path / "x", "--stats", tmp_path / "stats", "--ratio", "0.25", *CONSTANTS).is_fine()
    assert [name for name in names(tmp_path / "x") if "model-" in name or "index" in name] == []
    assert tensors_of(tmp_path / "x").keys() != first.keys()
    assert names(tmp_path) == ["stats", "x"], "nothing is left beside it"
    (tmp_path / "x" / ".git").mkdir()
    export("--hf-out", tmp_path / "x").is_one_line("is no checkpoint of mone-export alone")


@pytest.mark.parametrize("option", [(), ("--overwrite",)], ids=["", "overwrite"])
def test_what_was_put_into_a_folder_of_ours_stays(
    export: Command, half: Path, tmp_path: Path, option: tuple[str, ...]
) -> None:
    for name, of_the_checkpoint in (
        ("notes.txt", False),
        ("my-lora.safetensors", False),
        ("README.md", True),
    ):
        folder = shutil.copytree(half, tmp_path / name)
        assert (folder / name).exists() == of_the_checkpoint
        (folder / name).write_text("of great value")
        export("--hf-out", folder, *option).is_one_line(rf"mone-export alone \(not ours: {name}\)")
        assert (folder / name).read_text() == "of great value"
    folder = shutil.copytree(half, tmp_path / "edited")
    with (folder / "config.json").open("a") as config:
        config.write("\n")
    export("--hf-out", folder, *option).is_one_line(r"mone-export alone \(not ours: config.json\)")


def test_a_fine_tune_of_ours_is_not_ours(export: Command, tmp_path: Path) -> None:
    """Of the same shapes and type, with all of our config."""
    export("--method", "drop", "--hf-out", tmp_path / "ours").is_fine()
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    tuned.lm_head.weight.data.zero_()
    tuned.save_pretrained(tmp_path / "tuned")
    assert "mone_export" in json.loads((tmp_path / "tuned" / "config.json").read_text())
    export("--hf-out", tmp_path / "tuned").is_one_line("not ours: model.safetensors")
    tuned.save_pretrained(tmp_path / "ours")
    export("--hf-out", tmp_path / "ours").is_one_line("not ours: model.safetensors")
    assert not tensors_of(tmp_path / "ours")["lm_head.weight"].any()


@pytest.mark.parametrize(
    "options",
    [("--workdir", "x"), ("--card", "x", "-o", "x.gguf"), ("--workdir", "x/work"), ("--stats", "x/stats")],
    ids=" ".join,
)
def test_a_checkpoint_takes_no_other_outputs_place(
    export: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    if options[0] == "--stats":
        Path("x").mkdir()
    export("--hf-out", "x", *options).is_one_line(f"--hf-out x holds what is given as {options[0]}: ")
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_room_is_needed_for_both_outputs(
    export: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = ("--hf-out", tmp_path / "x", "-o", tmp_path / "x.gguf", "--stats", tmp_path / "stats")
    export(*outputs).is_fine()
    sizes = (tmp_path / "x.gguf").stat().st_size, (tmp_path / "x" / "model.safetensors").stat().st_size
    assert max(sizes) < 0.6 * sum(sizes), "there is room for each"
    for share, fine in ((0.8, False), (1.2, True)):
        free = SimpleNamespace(free=int(share * sum(sizes)))
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: free)
        done = export(*outputs)
        done.is_fine() if fine else done.is_one_line("the export needs .* [kMG]B: .*another --hf-out")


def test_a_failure_leaves_nothing(export: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_hollow", full)
    export("--hf-out", tmp_path / "x").is_one_line("No space left on device.*another --hf-out")
    assert not list(tmp_path.iterdir())


# what is broken


def dropped(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del tensors[min(name for name in tensors if name.endswith("approx_value"))]


def unlisted(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["approximate_experts"]["0"].pop()


def all_gone(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["approximate_experts"]["0"] = list(range(16))


def short(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    name = min(name for name in tensors if name.endswith("approx_value"))
    tensors[name] = tensors[name][:-1].clone()


def moving(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["approximate_expert_init_tokens"]["0"][0] = 100


def not_a_map(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["approximate_experts"] = [1, 2]


def twice(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["approximate_experts"]["0"].append(config["approximate_experts"]["0"][0])


def other_layer(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["approximate_experts"]["9"] = [0]
    tensors["model.layers.9.block_sparse_moe.experts.0.approx_value"] = torch.zeros(64)


def other_way(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["mod_type"] = "staged"


def of_no_expert(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.approx_value"] = torch.zeros(64)


BROKEN: dict[Callable[..., None], str] = {
    dropped: "lacks the constant of expert",
    unlisted: "holds an unlisted constant",
    all_gone: "lacks the constant of|has no expert left",
    short: r"is \[63\], not \[64\]",
    moving: "follow the text",
    not_a_map: "does not map layers",
    twice: "names an expert twice",
    other_layer: "layer 9 has no",
    other_way: "mod_type changes the model",
    of_no_expert: "model.norm.approx_value is no expert's constant",
}


@pytest.mark.parametrize("spoil", BROKEN, ids=lambda spoil: spoil.__name__)
def test_a_broken_checkpoint_is_one_line(
    export: Command, half: Path, tmp_path: Path, spoil: Callable[..., None]
) -> None:
    folder = shutil.copytree(half, tmp_path / "broken")
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    spoil(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    done = export("--ratio", "0", "-o", tmp_path / "x.gguf", model=folder, text="")
    done.is_one_line(BROKEN[spoil])
    assert not (tmp_path / "x.gguf").exists()
