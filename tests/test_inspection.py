"""mone-inspect: what it says of every kind of file is what is in it, at once and without anything heavy."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command import Command
from gguf_models import tiny_gguf
from gguf_parts import key, put_together, taken_apart
from hub_server import hub_server
from safetensors.torch import load_file, save_file
from tiny import save_small

from mone_export import cli, cli_eval, cli_inspect
from mone_export.errors import MoneError
from mone_export.inspection.inspecting import examine
from mone_export.output.writing import OUTTYPES
from mone_export.source import open_source
from mone_export.source.gguf_header import read_header
from mone_export.source.pruned_before import pruned_before

# heads of their own, windows, latent attention, an indexer, recurrent layers
CACHES = ("olmoe", "gpt-oss", "deepseek2", "deepseek32", "qwen3next", "lfm2moe", "cohere2moe", "kimi-linear")
_LOAD = """import sys, llama_cpp
llama_cpp.Llama(sys.argv[1], n_ctx=4096, n_batch=512, n_ubatch=512, swa_full=False, verbose=True)"""


def test_a_pruned_files_fates_and_novices(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "pruned.gguf"
    command("-o", out, "--novice", "mean", "--plan-out", tmp_path / "plan.json").is_fine()
    plan = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["layers"]
    found = examine(str(out))
    before = pruned_before(read_header(out), open_source(out).spec)
    assert before is not None
    assert found.needs == "patched"
    for layer in found.layers:
        own = plan[str(layer.layer)]
        assert layer.fates == {"whole": len(own["kept"]), "constant": len(own["pruned"])}
        norms = np.linalg.norm(before.novices(layer.layer)[len(own["kept"]) :].astype(np.float64), axis=1)
        assert layer.norms == pytest.approx((norms.min(), np.median(norms), norms.max()))
    assert found.made["mone.novice"] == "mean"
    assert (
        found.n_byte["novices"]
        == sum(n["constant"] for n in (at.fates for at in found.layers)) * found.hidden_size * 4
    )
    assert sum(found.n_byte.values()) == sum(info.size for info in read_header(out).tensors.values())
    assert sum(found.types.values()) == sum(found.n_byte.values())


def test_thin_experts_by_their_widths_as_the_plan_has_them(command: Command, tmp_path: Path) -> None:
    out, plan = tmp_path / "thin.gguf", tmp_path / "plan.json"
    command("-o", out, "--plan-out", plan).is_fine()
    assert [at.fates for at in examine(str(out)).layers] == [at.fates for at in examine(str(plan)).layers]
    assert any("channels" in fate for fate in examine(str(out)).fates)


def test_a_checkpoint_and_its_gguf_are_the_same_model(small: Path, command: Command, tmp_path: Path) -> None:
    out = tmp_path / "whole.gguf"
    command("-o", out, "--ratio", "0", "--outtype", "f32", text="").is_fine()
    folder, file = examine(str(small)), examine(str(out))
    for name in ("n_layer", "n_expert", "top_k", "hidden_size", "expert_size", "fates", "n_ctx_train"):
        assert getattr(folder, name) == getattr(file, name), name
    assert folder.n_byte["experts"] == file.n_byte["experts"]
    assert file.needs == "any"


def test_blocks_that_predict_further_tokens_are_no_layers(small: Path, tmp_path: Path) -> None:
    """Neither `mtp.layers.0`, which has more experts here, nor a layer after the last."""
    folder = shutil.copytree(small, tmp_path / "small")
    tensors, plain = load_file(folder / "model.safetensors"), examine(str(small))
    expert = {"down_proj.weight": torch.zeros(64, 32), "gate_proj.weight": torch.zeros(32, 64)}
    for block, n_expert in (("mtp.layers.0", 20), (f"model.layers.{plain.n_layer}", 16)):
        tensors |= {
            f"{block}.mlp.experts.{e}.{part}": weight.clone()
            for e in range(n_expert)
            for part, weight in expert.items()
        }
        tensors[f"{block}.mlp.experts.down_proj"] = torch.zeros(20, 64, 32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = examine(str(folder))
    assert found.layers == plain.layers and found.n_expert == plain.n_expert
    assert found.n_byte["experts"] == plain.n_byte["experts"]
    more = sum(found.n_byte.values()) - sum(plain.n_byte.values())
    saved = {(each.ratio, each.outtype): each.size for each in plain.savings}
    (half,) = (each.size for each in found.savings if (each.ratio, each.outtype) == (0.5, "as it is"))
    assert half == saved[0.5, "as it is"] + more, "they stay as they are"


def test_a_model_on_the_hub_is_told_from_its_heads(small: Path, tmp_path: Path) -> None:
    with hub_server() as server:
        commit = server.add("someone/small", small)
        code = "from mone_export.cli_inspect import main; main(['someone/small', '--json'])"
        env = os.environ | server.environment(tmp_path / "home")
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        whole = [method for method, _, span in server.asked(r"\.safetensors") if method == "GET" and not span]
    found, here = json.loads(done.stdout), json.loads(json.dumps(examine(str(small)).as_json()))
    assert found == here | {"name": "someone/small", "made": {"revision": commit}}
    assert not whole


def test_what_ratios_save_is_about_what_an_export_weighs(command: Command, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole.gguf", tmp_path / "half.gguf"
    command("-o", whole, "--ratio", "0", text="").is_fine()
    command("-o", half, "--novice", "mean", "--allocate", "even").is_fine()
    saved = {(each.ratio, each.outtype): each.size for each in examine(str(whole)).savings}
    tensors = read_header(half).tensors.values()
    assert saved[0.5, "as it is"] == pytest.approx(sum(info.size for info in tensors), rel=0.02)


def test_types_of_the_table_can_be_typed(small: Path) -> None:
    named = {saving.outtype for saving in examine(str(small)).savings} - {"as it is"}
    assert named and named <= {*OUTTYPES}


def test_statistics_name_text_and_model(stats: Path) -> None:
    found = examine(str(stats))
    assert found.kind == "statistics"
    assert [layer.seen for layer in found.layers] == [layer.seen for layer in found.layers if layer.seen]
    assert found.made["n_token"] == 64


@pytest.mark.upstream
@pytest.mark.parametrize("arch", CACHES)
def test_the_cache_is_as_large_as_llama_cpps(arch: str, tmp_path: Path) -> None:
    file = tiny_gguf(arch, tmp_path)
    said = subprocess.run(
        [sys.executable, "-c", _LOAD, str(file)], capture_output=True, text=True, check=True
    )
    sizes = re.findall(r"llama_kv_cache: size =\s+([\d.]+) MiB", said.stderr)
    memory = examine(str(file), n_ctx=4096).memory
    assert memory is not None and sizes
    assert memory.cache / 2**20 == pytest.approx(sum(map(float, sizes)), abs=0.01)


def test_a_large_file_takes_no_longer_and_imports_nothing_heavy(demo_gguf: Path, tmp_path: Path) -> None:
    """A hole of 2 GB in a tensor: what is read is the head. In seconds of CPU: others may be busy beside."""
    large = tmp_path / "large.gguf"
    _write_large(large)
    code = (
        "import sys, time; from mone_export.cli_inspect import main;"
        "main(); print(time.process_time(), *{'torch', 'transformers'} & sys.modules.keys())"
    )
    times = []
    for _ in range(5):
        done = subprocess.run(
            [sys.executable, "-c", code, str(large)], capture_output=True, text=True, check=True
        )
        *_, last = done.stdout.splitlines()
        times.append(float(last))  # fails where a module is named after it
    assert large.stat().st_size > 2e9
    print(f"{large.stat().st_size / 1e9:.1f} GB, CPU time: {min(times):.2f} s to {max(times):.2f} s")
    assert min(times) < 0.8  # 0.5 on a machine that does nothing else


def _write_large(path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (("block_count", 4), ("expert_count", 64), ("expert_used_count", 8)):
        writer.add_uint32(f"llama.{name}", value)
    writer.add_uint32("llama.embedding_length", 2048)
    writer.add_token_list([f"token {number}" for number in range(150_000)])
    for layer in range(4):
        for matrix, shape in (
            ("gate", (64, 1024, 2048)),
            ("up", (64, 1024, 2048)),
            ("down", (64, 2048, 1024)),
        ):
            size = int(np.prod(shape)) * 2
            name = f"blk.{layer}.ffn_{matrix}_exps.weight"
            writer.add_tensor_info(name, shape, np.dtype(np.float16), size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 12 * 64 * 1024 * 2048 * 2 + 64)


def test_the_command_prints_a_table_and_json(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pruned.gguf"
    command("-o", out, "--novice", "mean").is_fine()
    assert cli_inspect.main([str(out), "-c", "1024"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"^runs on    the patched llama.cpp", table, re.MULTILINE)
    assert "for 1024 tokens" in table and "constant" in table
    assert cli_inspect.main([str(out), "-c", "1024", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["memory"]["n_ctx"] == 1024 and value["fates"] == examine(str(out)).fates


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"block_count": 2**31}, "does not say its architecture and its layers"),
        ({"expert_used_count": "many"}, "is many, not a whole number"),
        ({"attention__head_count": "few"}, "is few, not a whole number"),
        ({"expert_tier_count": 1, "expert_tier_sizes": 3}, "its tiers are not 1 for each of 5 layers"),
        ({"expert_tier_count": 2**31}, "its tiers are not"),
        ({"expert_tier_count": 1, "expert_tier_sizes": [999] * 5}, "layer 0 has more than 32 experts"),
    ],
)
def test_keys_of_another_form_are_one_line(
    keys: dict[str, int | str | list[int]], says: str, demo_gguf: Path, tmp_path: Path
) -> None:
    parts = taken_apart(demo_gguf)
    named = {f"llama.{name.replace('__', '.')}": value for name, value in keys.items()}
    changed = parts.keys | {name: key(name, value) for name, value in named.items()}
    (file := tmp_path / "odd.gguf").write_bytes(put_together(replace(parts, keys=changed)))
    with pytest.raises(MoneError, match=says):
        examine(str(file))


def test_names_do_nothing_to_a_terminal(
    demo_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = taken_apart(demo_gguf)
    named = parts.keys | {"general.name": key("general.name", "x\x1b[2J\nruns on    any")}
    (file := tmp_path / "odd.gguf").write_bytes(put_together(replace(parts, keys=named)))
    assert cli_inspect.main([str(file)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and said.count("\nruns on") == 1


def test_sizes_are_told_in_the_unit_that_suits(demo_gguf: Path, tmp_path: Path) -> None:
    large = tmp_path / "large.gguf"
    large.write_bytes(demo_gguf.read_bytes())
    with large.open("r+b") as file:
        file.truncate(999_600_000)
    done = subprocess.run(
        [sys.executable, "-m", "mone_export.cli_inspect", str(large)], capture_output=True, text=True
    )
    assert "1.00 GB" in done.stdout.splitlines()[0]


def test_a_model_without_experts_has_no_columns_of_pruning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "dense.gguf", "llama")
    writer.add_block_count(1)
    writer.add_tensor("blk.0.attn_k.weight", np.ones((256, 256), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert {saving.ratio for saving in examine(str(tmp_path / "dense.gguf")).savings} == {0}
    assert cli_inspect.main([str(tmp_path / "dense.gguf")]) == 0
    said = capsys.readouterr().out
    assert "experts    none" in said and "pruned" not in said.partition("what would")[2]


def test_no_sizes_are_made_up_for_packed_weights(tmp_path: Path) -> None:
    folder = save_small(tmp_path / "packed")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    save_file({name: values.to(torch.uint8) for name, values in tensors.items()}, file)
    assert {saving.outtype for saving in examine(str(folder)).savings} == {"as it is"}


@pytest.mark.parametrize("content", ["{}", '{"spec": 3, "version": 4}'])
def test_broken_statistics_are_one_line(content: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "file", metadata={"mone_calibration": content})
    with pytest.raises(MoneError, match="file is (broken|not a statistics file)"):
        examine(str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"GGUFnot much", "broken|version"),
        (b"{}", "is no GGUF"),
        (b"12345678{}", "holds tensors"),
        (b'{"mone_plan": 1}', "is no plan"),
    ],
)
def test_what_is_none_of_them_is_one_line(content: bytes, says: str, tmp_path: Path) -> None:
    (file := tmp_path / "file").write_bytes(content)
    with pytest.raises(MoneError, match=says):
        examine(str(file))


@pytest.mark.parametrize(
    ("kind", "says"),
    [("mmproj", "a projector of images, no language model"), ("model", "a vocabulary and no weights")],
)
def test_ggufs_of_no_language_model_are_one_line(
    kind: str, says: str, demo_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = taken_apart(demo_gguf)
    typed = parts.keys | {"general.type": key("general.type", kind)}
    tensors = {} if kind == "model" else parts.tensors
    (file := tmp_path / "x.gguf").write_bytes(put_together(replace(parts, keys=typed, tensors=tensors)))
    for main, options in (
        (cli_inspect.main, []),
        (cli_eval.main, []),
        (cli.main, ["--ratio", "0.5", "--dry-run"]),
    ):
        assert main([str(file), *options]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line and "pass the model's own GGUF" in line


def test_a_name_that_is_nothing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_inspect.main([str(tmp_path / "none.gguf")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mone-inspect: there is no ")
    with pytest.raises(MoneError, match="has no config.json"):
        examine(str(tmp_path))
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(MoneError, match="has no model.safetensors: it is no complete"):
        examine(str(tmp_path))
    with pytest.raises(MoneError, match="neither a folder nor"):
        examine("x" * 300 + "/" + "y" * 300 + " z")


def test_a_folder_of_fewer_tensors_than_it_lists_is_one_line(tmp_path: Path) -> None:
    folder = save_small(tmp_path / "broken")
    for file in folder.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:6])
    with pytest.raises(MoneError, match="cannot read .*safetensors"):
        examine(str(folder))
