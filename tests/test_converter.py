"""llama.cpp's converter as we open it: it runs no code of a model, says what is wrong, and knows its name."""

import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf_file
import numpy as np
import pytest
from families import N_EXPERT, N_LAYER, ROWS, Row
from family_models import save_family, without_vocabulary
from safetensors.torch import load_file, save_file
from tiny import save_small, save_tiny
from torch import Tensor

from mone_export import cli, files
from mone_export.artifacts import MoeSpec
from mone_export.errors import MoneError
from mone_export.output.writing import measure, write
from mone_export.pruning.planning import plan_without_scores
from mone_export.recipe import Recipe
from mone_export.source import inspect, llamacpp
from mone_export.source import opened as seam
from mone_export.source.llamacpp import Conversion
from mone_export.source.remote_code import needs_remote_code
from mone_export.source.weights import open_weights, prediction_tensors

HASH = "0123456789abcdef0123456789abcdef01234567"
CARD = """---
license: apache-2.0
tags:
- moe
- 2024
version: 1.5
model_creator: Somebody
base_model: org/Model-7B-Base
---
# A model
"""


@dataclass(frozen=True)
class Whole:
    """Edits nothing."""

    spec: MoeSpec
    rewrites: bool = False

    def select(self, name: str) -> Sequence[int] | None:
        return None

    def edit(self, name: str, tensor: Tensor) -> Tensor:
        return tensor

    def rewrite(self, name: str, read: Any) -> Sequence[Callable[[], Tensor]]:
        raise AssertionError(name)


def opened(folder: Path, spec: MoeSpec | None = None, **options: Any) -> Conversion:
    return Conversion(folder, Whole(spec or inspect(folder)), outtype="f32", **options)


def amend(folder: Path, file: str = "config.json", **keys: Any) -> Path:
    path = folder / file
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | keys))
    return folder


# --- code that comes with a model ---


@pytest.fixture
def with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A model whose tokenizer llama.cpp's converter does not know, and a file that its code would write."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = tmp_path / "marker"
    folder = save_tiny("DeepseekV2ForCausalLM", tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["3"], vocabulary["!"] = vocabulary["!"], vocabulary["3"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "evil.py").write_text(
        "from pathlib import Path\n"
        "from transformers import PreTrainedTokenizerFast\n"
        f"Path({str(marker)!r}).touch()\n"
        "class EvilTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    return amend(
        folder, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.EvilTokenizer"]}
    ), marker


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--dry-run"], []], ids=["dry-run", "export"])
def test_code_in_a_models_folder_never_runs(
    with_code: tuple[Path, Path], options: list[str], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, marker = with_code
    rest = ["-f", str(text), "--chunks", "2", "-c", "64", "-o", str(folder.parent / "model.gguf"), "-q"]
    status = cli.main([str(folder), "--ratio", "0.5", *rest, *options])
    assert not marker.exists(), "the model's code ran"
    assert status == 1 and capsys.readouterr().err.count("\n") == 1


def test_code_runs_where_it_is_allowed(with_code: tuple[Path, Path]) -> None:
    folder, marker = with_code
    spec = inspect(folder)
    with pytest.raises(MoneError, match="cannot convert the tokenizer"):
        opened(folder, spec).key("general.name")
    assert not marker.exists()
    with pytest.raises(MoneError):  # a tokenizer of its own does not help the converter to know it
        opened(folder, spec, trust_remote_code=True).key("general.name")
    assert marker.exists()


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({"auto_map": {"AutoConfig": "configuration_x.XConfig"}}, None),
        (
            {"model_type": "mystery", "auto_map": {"AutoConfig": "configuration_x.XConfig"}},
            "config.json (auto_map: configuration_x.XConfig)",
        ),
        (
            {"model_type": "mystery", "auto_map": {"AutoConfig": "org/other--configuration_x.XConfig"}},
            "config.json (auto_map: org/other--configuration_x.XConfig)",
        ),
        ({"model_type": "mystery"}, None),
    ],
)
def test_only_models_that_transformers_lacks_need_code(
    tmp_path: Path, keys: dict[str, Any], found: str | None
) -> None:
    assert needs_remote_code(amend(save_small(tmp_path / "model"), **keys)) == found


def test_tokenizer_that_transformers_lacks_needs_code(tmp_path: Path) -> None:
    classes = {
        "tokenizer_class": "XTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]},
    }
    folder = amend(save_small(tmp_path / "model"), "tokenizer_config.json", **classes)
    assert needs_remote_code(folder) is None, "transformers has a tokenizer for the model type"
    # a model type without one
    row = next(row for row in ROWS if row.model_type == "dots1")
    folder = amend(save_family(row, tmp_path / "other"), "tokenizer_config.json", **classes)
    assert needs_remote_code(folder) == "tokenizer_config.json (auto_map: tokenization_x.XTokenizer)"


def test_model_that_needs_code_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_small(tmp_path / "model")
    spec = inspect(folder)
    amend(folder, model_type="mystery", auto_map={"AutoConfig": "configuration_x.XConfig"})
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        MoneError, match=r"config.json \(auto_map: configuration_x.XConfig\).*--trust-remote-code"
    ):
        opened(folder, spec)


# --- blocks that predict further tokens ---

WITH_BLOCK = [row for row in ROWS if row.mtp and row.mtp_kept and row.refused is None]


@pytest.fixture
def token_ids_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "converter_class", without_vocabulary(llamacpp.converter_class))


def named(row: Row) -> str:
    return row.name


def holds_no_block(conversion: Conversion) -> bool:
    assert conversion.block_count == N_LAYER
    assert conversion.key("{arch}.block_count") == N_LAYER
    assert not conversion.key("{arch}.nextn_predict_layers")
    return not [name for name in conversion.shapes if name.startswith(f"blk.{N_LAYER}.")]


@pytest.mark.slow
@pytest.mark.usefixtures("token_ids_only")
@pytest.mark.parametrize("row", WITH_BLOCK, ids=named)
def test_ordinary_file_leaves_the_prediction_block_out(
    row: Row, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_family(row, tmp_path / "model")
    recipe = Recipe.of(ratio=0.5, method="drop", score="random")
    write(folder, None, plan_without_scores(inspect(folder), recipe), tmp_path / "model.gguf", outtype="f32")
    contents = gguf_file.read(tmp_path / "model.gguf")
    arch = contents.keys["general.architecture"][1]
    assert contents.keys[f"{arch}.expert_count"][1] == N_EXPERT // 2
    assert contents.keys[f"{arch}.block_count"][1] == N_LAYER
    assert f"{arch}.nextn_predict_layers" not in contents.keys
    assert not [name for name in contents.tensors if name.startswith(f"blk.{N_LAYER}.")]
    said = [record for record in caplog.records if "leaves out the blocks" in record.getMessage()]
    assert len(said) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("token_ids_only")
@pytest.mark.parametrize("row", WITH_BLOCK, ids=named)
def test_prediction_block_is_kept_or_dropped_as_asked(row: Row, tmp_path: Path) -> None:
    folder = save_family(row, tmp_path / "model")
    kept, dropped = opened(folder), opened(folder, mtp="drop")
    assert kept.remark is None and f"blk.{N_LAYER}.nextn.eh_proj.weight" in kept.shapes
    assert holds_no_block(dropped) and "leaves out" in str(dropped.remark)
    assert dropped.shapes.items() <= kept.shapes.items()


@pytest.mark.slow
@pytest.mark.usefixtures("token_ids_only")
@pytest.mark.parametrize(
    ("row", "stated"),
    # without the key, transformers states one block for GLM-4.5 and none for its small sibling
    [(row, 0) for row in WITH_BLOCK if row.mtp == "layer"]
    + [(row, None) for row in WITH_BLOCK if row.model_type == "glm4_moe_lite"],
    ids=lambda part: getattr(part, "name", str(part)),
)
def test_prediction_block_that_the_config_does_not_state_is_left_out(
    row: Row, tmp_path: Path, stated: int | None
) -> None:
    folder = save_family(row, tmp_path / "model")
    path = folder / "config.json"
    keys = json.loads(path.read_text())
    del keys["num_nextn_predict_layers"]
    path.write_text(json.dumps(keys if stated is None else keys | {"num_nextn_predict_layers": stated}))
    conversion = opened(folder)
    assert holds_no_block(conversion)
    assert "the config states no num_nextn_predict_layers" in str(conversion.remark)


@pytest.mark.slow
@pytest.mark.usefixtures("token_ids_only")
@pytest.mark.parametrize("row", WITH_BLOCK, ids=named)
def test_prediction_block_of_another_expert_count_is_left_out(row: Row, tmp_path: Path) -> None:
    """A checkpoint whose layers were pruned and whose block was not, or the other way round."""
    folder = save_family(row, tmp_path / "model")
    spec = inspect(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in prediction_tensors(open_weights(folder), spec.n_layer):
        if match := re.search(r"\.experts\.(\d+)\.", name):
            if int(match[1]) >= N_EXPERT - 3:
                del tensors[name]
        elif ".experts." in name:
            tensors[name] = tensors[name][: N_EXPERT - 3].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    conversion = opened(folder, spec)
    assert holds_no_block(conversion)
    assert f"have {N_EXPERT - 3} experts, the model's own layers {N_EXPERT}" in str(conversion.remark)


@pytest.mark.slow
@pytest.mark.usefixtures("token_ids_only")
def test_block_count_is_right_where_the_converter_always_counts_the_block(tmp_path: Path) -> None:
    row = next(row for row in ROWS if row.hf_class == "ExaoneMoeForCausalLM")
    row = replace(row, mtp="mtp", hub=row.hub | {"num_nextn_predict_layers": 1})
    assert holds_no_block(opened(save_family(row, tmp_path / "model"), mtp="drop"))


# --- what the converter and its libraries fail at ---


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", b"{", r"the tokenizer in .*: tokenizer.json cannot be read"),
        ("tokenizer.model", b"hello", r"the tokenizer in "),
        ("tokenizer_config.json", b"\xff", r"tokenizer_config.json cannot be read"),
        ("config.json", b"[", r"config.json cannot be read"),
        ("model.safetensors.index.json", b"{}", r"weight_map"),
    ],
)
def test_broken_file_is_named(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    folder = save_small(tmp_path / "model")
    spec = inspect(folder)
    (folder / file).write_bytes(content)
    assert_one_line(folder, spec, message)


@pytest.mark.slow
@pytest.mark.parametrize("content", ['{"model": 3}', '{"model": {"type": "BPE", "vocab": {}}}', "[]"])
def test_tokenizer_of_unexpected_form_is_one_line(tmp_path: Path, content: str) -> None:
    folder = save_tiny("OlmoeForCausalLM", tmp_path / "model")
    spec = inspect(folder)
    (folder / "tokenizer.json").write_text(content)
    assert_one_line(folder, spec, "the tokenizer in ")


@pytest.mark.parametrize(
    "keys",
    [
        {"hidden_size": None},
        {"num_attention_heads": "four"},
        {"rms_norm_eps": "small"},
        {"architectures": [3]},
        {"max_position_embeddings": [512]},
        {"eos_token_id": "end"},
        {"head_dim": -1},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_config_of_unexpected_form_is_one_line(tmp_path: Path, keys: dict[str, Any]) -> None:
    folder = save_small(tmp_path / "model")
    spec = inspect(folder)
    amend(folder, **keys)
    assert_one_line(folder, spec, "", may_work=True)


def assert_one_line(folder: Path, spec: MoeSpec, message: str, *, may_work: bool = False) -> None:
    """Open a model and write its head: an error is a MoneError of one line, which names the cause."""
    try:
        conversion = opened(folder, spec)
        conversion.write_head(folder / "head.gguf", {})
        conversion.close()
    except MoneError as error:
        assert re.search(message, str(error)) and "\n" not in str(error)
    else:
        assert may_work


# --- what a file says of its model ---


def snapshot(parent: Path, *, card: str | None = CARD) -> Path:
    """A model where the hub's client keeps it."""
    folder = parent / "models--org--Model-7B" / "snapshots" / HASH
    folder.parent.mkdir(parents=True)
    save_small(folder)
    if card:
        (folder / "README.md").write_text(card)
    return folder


def test_model_from_the_hub_is_called_by_its_id(tmp_path: Path) -> None:
    conversion = opened(snapshot(tmp_path))
    page = "https://huggingface.co/org/Model-7B"
    wanted = {
        "name": "Model 7B",
        "basename": "Model",
        "organization": "Org",
        "author": "Somebody",
        "version": "1.5",
        "license": "apache-2.0",
        "tags": ["moe", "2024"],
        "source.repo_url": page,
        "base_model.count": 2,
        "base_model.0.name": "Model 7B",
        "base_model.0.organization": "Org",
        "base_model.0.repo_url": page,
        "base_model.1.repo_url": f"{page}-Base",
    }
    assert {key: conversion.key(f"general.{key}") for key in wanted} == wanted


@pytest.mark.parametrize("name", ["org/Model-7B", "Model-7B"])
def test_name_that_is_given_comes_first(tmp_path: Path, name: str) -> None:
    folder = save_small(tmp_path / HASH)
    conversion = opened(folder, name=name)
    assert conversion.key("general.name") == "Model 7B"
    page = "https://huggingface.co/org/Model-7B" if "/" in name else None
    assert conversion.key("general.base_model.0.repo_url") == page
    assert opened(folder).key("general.name") == HASH, "an ordinary folder gives its own name"


def test_card_that_cannot_be_read_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    card = "---\ntitle: a: b\nlicense:\tapache-2.0\n---\n# model\n"
    folder = snapshot(tmp_path, card=card)
    with caplog.at_level(logging.WARNING):
        conversion = opened(folder)
        conversion.write_head(tmp_path / "head.gguf", {})
        conversion.close()
    assert conversion.key("general.name") == "Model 7B" and conversion.key("general.license") is None
    assert "README.md: the front matter cannot be read (mapping values are not allowed here)" in caplog.text
    assert (folder / "README.md").read_text() == card


@pytest.mark.parametrize(
    "line",
    [
        "tags: [1, two, null]",
        "license: [mit, 7]",
        "name: [a, b]",
        "version: 2024-01-31",
        "language: {en: yes}",
        "datasets: [3, {name: 4}]",
        "base_model: {name: x}",
    ],
)
def test_card_of_unexpected_form_can_be_written(tmp_path: Path, line: str) -> None:
    folder = snapshot(tmp_path, card=f"---\n{line}\n---\n")
    conversion = opened(folder)
    conversion.write_head(tmp_path / "head.gguf", {})
    conversion.close()
    assert (tmp_path / "head.gguf").stat().st_size > 0


def test_finished_file_replaces_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    number_of = {}
    opens, syncs = files.os.open, files.os.fsync

    def note_open(path: Path, flags: int) -> int:
        number = opens(path, flags)
        number_of[number] = Path(path).name
        return number

    def note_sync(number: int) -> None:
        flushed.append(number_of[number] + (" old" if target.read_text() == "old" else " new"))
        syncs(number)

    part, target = tmp_path / "model.part", tmp_path / "model"
    part.write_text("new")
    target.write_text("old")
    monkeypatch.setattr(files.os, "open", note_open)
    monkeypatch.setattr(files.os, "fsync", note_sync)
    files.replace(part, target)
    assert target.read_text() == "new" and not part.exists()
    assert flushed == ["model.part old", f"{tmp_path.name} new"], "the data before the name, then the folder"


@pytest.mark.parametrize("row", [row for row in ROWS if row.refused is None], ids=lambda row: row.name)
@pytest.mark.by_day(8)
def test_large_matrices_are_read_some_rows_at_a_time(
    row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are the same; and no weight is read before the file is written."""
    monkeypatch.setattr(llamacpp, "converter_class", without_vocabulary(llamacpp.converter_class))
    folder = save_family(row, tmp_path / "model")
    chosen = plan_without_scores(inspect(folder), Recipe.of(0))
    read, most, usual = np.fromfile, [], seam.LARGE

    def noted(file: Any, dtype: Any, n: int, **named: Any) -> np.ndarray:
        most.append(n)
        return read(file, dtype, n, **named)

    monkeypatch.setattr(np, "fromfile", noted)
    for outtype in ("f32", "q8_0"):
        contents, largest = [], []
        for large in (usual, 64):
            monkeypatch.setattr(seam, "LARGE", large)
            most.clear()
            measure(folder, chosen, outtype=outtype)
            assert not most
            most.clear()
            write(folder, None, chosen, tmp_path / f"{large}.gguf", outtype=outtype)
            contents.append(gguf_file.without_command(tmp_path / f"{large}.gguf"))
            largest.append(max(most))
        assert contents[0] == contents[1]
        print(f"{row.name}: {largest[0]} bytes at a time, {largest[1]} where all matrices are large")
