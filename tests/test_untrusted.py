"""Files of strangers: nothing in them is run, and no path in them leads out of their folder."""

import errno
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Command, names
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mone_export import cli_inspect
from mone_export.artifacts import Calibration
from mone_export.errors import MoneError
from mone_export.pipeline import export
from mone_export.pruning.plan_files import load_plan, load_recipe
from mone_export.source.gguf_header import read_header
from mone_export.source.weights import weight_files


class Trap:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._mark,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "consolidated.00.pth"])
def test_a_pickled_checkpoint_is_refused_and_not_loaded(
    command: Command, small: Path, tmp_path: Path, name: str
) -> None:
    model, mark = shutil.copytree(small, tmp_path / "model"), tmp_path / "mark"
    for file in model.glob("*.safetensors*"):
        file.unlink()
    (model / name).write_bytes(pickle.dumps(Trap(mark)))
    out = tmp_path / "x.gguf"
    command("-o", out, model=model).is_one_line("(converted to safetensors|cannot read the weights)")
    assert not mark.exists() and not out.exists()


@pytest.mark.parametrize("option", ["--stats", "--plan"])
@pytest.mark.parametrize("name", ["kept.pt", "kept.pkl"])
def test_pickled_records_are_refused_and_not_loaded(
    command: Command, tmp_path: Path, option: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file, mark = tmp_path / name, tmp_path / "mark"
    file.write_bytes(pickle.dumps(Trap(mark)))
    if option == "--stats":
        command(option, file, "-o", tmp_path / "x.gguf").is_one_line(f"{name} is not a statistics file")
    else:
        with pytest.raises(MoneError, match=f"{name} is no plan of mone-export"):
            load_recipe(file)
    assert cli_inspect.main([str(file)]) == 1
    assert not mark.exists() and name in capsys.readouterr().err
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "..", "a/b.safetensors", ""])
def test_an_index_names_files_of_its_own_folder_only(
    command: Command, small: Path, tmp_path: Path, shard: str
) -> None:
    model = shutil.copytree(small, tmp_path / "model")
    shutil.copyfile(next(small.glob("*.safetensors")), tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": shard}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MoneError, match="it names no files of its own folder"):
        weight_files(model)
    command("-o", tmp_path / "x.gguf", model=model).is_one_line("it names no files of its own folder")


def test_names_in_statistics_are_only_names(command: Command, stats: Path, tmp_path: Path) -> None:
    """Paths where names stand: nothing is read or written there."""
    found = Calibration.load(stats)
    tensors = load_file(stats)
    head = json.loads(stats.read_bytes()[8 : 8 + int.from_bytes(stats.read_bytes()[:8], "little")])
    told = json.loads(head["__metadata__"]["mone_calibration"])
    told["corpus_name"] = str(tmp_path / "elsewhere")
    told["parts"][0]["sources"] = {"../../elsewhere": found.n_token}
    save_file(tensors, stats, metadata={"mone_calibration": json.dumps(told)})
    before = names(tmp_path)
    command("--stats", stats, "-o", tmp_path / "x.gguf", text="").is_fine()
    assert names(tmp_path) == sorted([*before, "x.gguf"])


def test_a_files_own_words_do_nothing_to_a_terminal(command: Command, tmp_path: Path) -> None:
    file, name = tmp_path / "model.gguf", b"\x1b[2J\nmone-export: all is well\n"
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
    file.write_bytes(head + struct.pack("<Q", len(name)) + name + struct.pack("<I", 9) + bytes(200))
    done = command("-o", tmp_path / "x.gguf", model=file)
    done.is_one_line("is broken: .*all is well. has 9 dimensions")
    assert "\x1b" not in done.err


def test_a_tensor_whose_file_became_shorter_is_one_line(small: Path, tmp_path: Path) -> None:
    export(small, ratio=0, outfile=tmp_path / "model.gguf")
    last = list(read_header(tmp_path / "model.gguf").tensors.values())[-1]
    os.truncate(last.file, last.offset + last.size // 2)
    with pytest.raises(MoneError, match="became shorter while it was read"):
        last.values(np.float32)
    with pytest.raises(MoneError, match="became shorter while it was read"):
        last.read(last.size // 2, start=last.size // 2)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "out of memory: free some"),
        (RuntimeError("can't start new thread"), "out of memory: free some"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (OSError(errno.EFBIG, "File too large"), r"cannot write any more \(File too large\): free some"),
        (SafetensorError("failed to fill"), r"a safetensors file cannot be read any more \(failed to fill\)"),
    ],
    ids=["python", "thread", "torch", "disk", "truncated"],
)
def test_what_may_end_it_anywhere_is_one_line(
    error: Exception, line: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("mone_export.pipeline.collect", fail)
    command("-o", tmp_path / "x.gguf").is_one_line(line)


ODD = [None, "x", -1, 10**30, [], {}, ["x"], [[0]], {"0": None}, 1.5, True]


@pytest.mark.parametrize("key", ["recipe", "layers", "n_expert", "protected", "source", "calibration"])
def test_plans_of_any_shape_are_read_or_refused(
    command: Command, small: Path, tmp_path: Path, key: str
) -> None:
    """Each value of a plan, and each value in it, replaced by odd ones."""
    plan = tmp_path / "plan.json"
    rare = tmp_path / "rare.txt"
    rare.write_text("rare words " * 60)
    command("--plan-out", plan, "-o", tmp_path / "x.gguf", "--protect", f"{rare}=1").is_fine()
    value, spec = json.loads(plan.read_text()), spec_of(small)
    for change in _changes(value[key]):
        plan.write_text(json.dumps(value | {key: change}))
        _read_or_refused(lambda: load_plan(plan, spec, load_recipe(plan)))
        assert cli_inspect.main([str(plan)]) in (0, 1)
    del value[key]
    plan.write_text(json.dumps(value))
    _read_or_refused(lambda: load_plan(plan, spec, load_recipe(plan)))


def spec_of(model: Path) -> Any:
    from mone_export.source import open_source

    return open_source(model).spec


def _changes(value: Any) -> list[Any]:
    found = list(ODD)
    if isinstance(value, dict):
        for key, inner in list(value.items())[:9]:
            found += [value | {key: change} for change in _changes(inner)[:200]]
    if isinstance(value, list) and value:
        found += [[change, *value[1:]] for change in _changes(value[0])[:200]]
    return found


def _read_or_refused(read: Callable[[], object]) -> None:
    try:
        read()
    except MoneError as error:
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("key", ["spec", "parts", "sensitivity", "layer_n_token", "config", "n_token"])
def test_statistics_of_any_shape_are_read_or_refused(stats: Path, key: str) -> None:
    tensors = load_file(stats)
    head = json.loads(stats.read_bytes()[8 : 8 + int.from_bytes(stats.read_bytes()[:8], "little")])
    told = json.loads(head["__metadata__"]["mone_calibration"])
    for change in _changes(told[key])[:120]:
        save_file(tensors, stats, metadata={"mone_calibration": json.dumps(told | {key: change})})
        _read_or_refused(lambda: Calibration.load(stats))
        assert cli_inspect.main([str(stats)]) in (0, 1)
