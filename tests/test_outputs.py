"""Outputs named like inputs, names from hell, folders that go away or may only be read: by the command."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from command import Command, names

from mone_export.source.llamacpp import Conversion

pytestmark = pytest.mark.slow  # a whole command each


@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
@pytest.mark.parametrize("way", ["itself", "hard link", "link", "dots"])
@pytest.mark.parametrize("what", ["text", "weights", "config", "statistics"])
@pytest.mark.by_day(12)
def test_an_output_never_replaces_an_input(
    command: Command,
    small: Path,
    text: Path,
    stats: Path,
    tmp_path: Path,
    what: str,
    way: str,
    overwrite: bool,
) -> None:
    model = shutil.copytree(small, tmp_path / "model")
    own_text = Path(shutil.copy(text, tmp_path / "text.txt"))
    config = model / "config.json"
    read = {"text": own_text, "weights": model / "model.safetensors", "config": config, "statistics": stats}
    content, out = read[what].read_bytes(), tmp_path / "out.gguf"
    if way == "hard link":
        os.link(read[what], out)
    elif way == "link":
        out.symlink_to(read[what])
    else:
        out = read[what] if way == "itself" else read[what].parent / "." / "x" / ".." / read[what].name
    done = command("-o", out, "--stats", stats, *["--overwrite"] * overwrite, model=model, text=own_text)
    done.is_one_line("would replace what is read as .*: choose another -o")
    assert read[what].read_bytes() == content


def test_a_device_is_no_output(command: Command) -> None:
    command("-o", "/dev/null").is_one_line("-o /dev/null is a device or a pipe, not a file")
    assert Path("/dev/null").is_char_device()


def test_a_file_of_somebody_else_needs_overwrite(command: Command, stats: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"GGUF, but not ours")
    command("-o", out, "--stats", stats, text="").is_one_line("is no file of mone-export: .*--overwrite")
    assert out.read_bytes() == b"GGUF, but not ours"
    command("-o", out, "--stats", stats, "--overwrite", text="").is_fine()
    command("-o", out, "--stats", stats, text="").is_fine()  # now it is ours


def test_a_folder_that_goes_away_meanwhile_is_one_line(
    command: Command, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write_tensors = tmp_path / "gone", Conversion.write_tensors
    folder.mkdir()

    def remove_first(conversion: Conversion, *arguments: Any) -> None:
        shutil.rmtree(folder)
        write_tensors(conversion, *arguments)

    monkeypatch.setattr(Conversion, "write_tensors", remove_first)
    command("-o", folder / "out.gguf", "--stats", stats, text="").is_one_line("cannot write .*gone")
    assert not folder.exists()


NAMES = ("with spaces", "ünïcode 模型 🙂", "-o", "quote ' and \"", "100% {x} %s", "a=b", "[glob]*?", "$HOME")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.by_day(4)
def test_any_name_will_do(
    command: Command, small: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = shutil.copytree(small, tmp_path / f"model {name}")
    folder = tmp_path / name
    folder.mkdir()
    own_text = Path(shutil.copy(text, folder / f"{name}.txt"))
    out, kept = folder / f"{name}.gguf", folder / f"{name}.stats"
    command("-o", out, "--stats", kept, model=model, text=own_text).is_fine()
    monkeypatch.chdir(folder)
    command("-o", f"./{out.name}", "--stats", f"./{kept.name}", model=model, text="").is_fine()
    command("-o", ".", "--stats", f"./{kept.name}", model=model, text="").is_fine()
    own = f"model {name}-50pc.gguf"
    assert names(folder) == sorted([f"{name}.gguf", f"{name}.stats", f"{name}.txt", own])
    assert out.read_bytes() == (folder / own).read_bytes()


def test_a_model_folder_may_be_read_only(command: Command, small: Path, tmp_path: Path) -> None:
    model = shutil.copytree(small, tmp_path / "model")
    before = {file.name: file.stat().st_mtime_ns for file in model.iterdir()}
    mount = ["mount", "-o", "bind,ro", str(model), str(model)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    model.chmod(0o555) if not mounted else None
    try:
        command("-o", tmp_path / "out.gguf", model=model).is_fine()
        command("-o", model / "out.gguf", model=model).is_one_line("is not writable")
    finally:
        if mounted:
            subprocess.run(["umount", str(model)], check=True)
        model.chmod(0o755)
    assert {file.name: file.stat().st_mtime_ns for file in model.iterdir()} == before
