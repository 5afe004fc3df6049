"""llama.cpp's programs that fail or say something else: one line with the reason, and files stay."""

from pathlib import Path

import pytest

from mone_export.errors import MoneError
from mone_export.evaluation import speed
from mone_export.llama_options import LlamaOptions
from mone_export.output import quantizing, splitting

PARTS = 'for last; do :; done; for n in 1 2; do echo "part $n" > "$last-0000$n-of-00002.gguf"; done'
LARGEST = splitting.LEAST


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the build, empty."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for module in (quantizing, speed, splitting):
        monkeypatch.setattr(module, "path", lambda: folder)
    return folder


@pytest.fixture
def outfile(tmp_path: Path) -> Path:
    """A finished file, larger than its parts may be."""
    path = tmp_path / "out" / "model.gguf"
    path.parent.mkdir()
    path.write_bytes(b"GGUF" + bytes(LARGEST))
    return path


def stand_in(programs: Path, name: str, script: str) -> None:
    file = programs / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def test_parts_take_the_place_of_the_file(programs: Path, outfile: Path) -> None:
    stand_in(programs, "llama-gguf-split", PARTS)
    first = splitting.split(outfile, LARGEST)
    assert first.name == "model-00001-of-00002.gguf" and first.read_text() == "part 1\n"
    assert sorted(outfile.parent.iterdir()) == [first, outfile.with_name("model-00002-of-00002.gguf")]


def test_a_small_file_needs_no_program(programs: Path, outfile: Path) -> None:
    assert splitting.split(outfile, 2 * LARGEST) == outfile
    assert outfile.is_file()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo no room >&2; exit 1", r"llama-gguf-split failed \(no room\)"),
        (f"{PARTS}; exit 1", r"llama-gguf-split failed \(no output\)"),
        ("echo all done", r"llama-gguf-split failed \(all done\)"),
        (None, "cannot split .*No such file or directory"),
    ],
    ids=["fails", "fails late", "makes nothing", "is not there"],
)
def test_a_file_that_cannot_be_split_stays_whole(
    script: str | None, message: str, programs: Path, outfile: Path
) -> None:
    if script:
        stand_in(programs, "llama-gguf-split", script)
    with pytest.raises(MoneError, match=f"{message}.* is complete, in one file"):
        splitting.split(outfile, LARGEST)
    assert [*outfile.parent.iterdir()] == [outfile] and outfile.stat().st_size > LARGEST


def test_a_strangers_file_in_the_way_of_a_part_stays(programs: Path, outfile: Path) -> None:
    stand_in(programs, "llama-gguf-split", PARTS)
    strange = outfile.with_name("model-00002-of-00002.gguf")
    strange.write_text("of great value")
    with pytest.raises(MoneError, match="00002.gguf exists and is no GGUF of mone-export: pass --overwrite"):
        splitting.split(outfile, LARGEST)
    assert strange.read_text() == "of great value" and sorted(outfile.parent.iterdir()) == [strange, outfile]
    splitting.split(outfile, LARGEST, overwrite=True)
    assert strange.read_text() == "part 2\n" and not outfile.exists()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo error: no such type; echo usage; exit 1", "error: no such type"),
        ("echo usage; exit 1", "usage"),
        ("exit 1", "no output"),
    ],
)
def test_quantising_that_fails_gives_the_reason(
    script: str, reason: str, programs: Path, outfile: Path
) -> None:
    stand_in(programs, "llama-quantize", script)
    with pytest.raises(MoneError, match=f"llama-quantize failed: {reason}$"):
        quantizing.quantized_types(outfile, "q4_k_m")
    assert [*outfile.parent.iterdir()] == [outfile]


@pytest.mark.parametrize(
    ("mode", "reason"), [(None, "No such file or directory"), (0o644, "Permission denied")]
)
def test_quantising_without_its_program_is_one_line(
    mode: int | None, reason: str, programs: Path, outfile: Path
) -> None:
    if mode:
        stand_in(programs, "llama-quantize", "exit 0")
        (programs / "llama-quantize").chmod(mode)
    with pytest.raises(
        MoneError, match=rf"cannot run .*llama-quantize \({reason}\): run `mone-llama build`$"
    ):
        quantizing.quantized_types(outfile, "q4_k_m")


def test_types_that_llama_quantize_does_not_say_are_one_line(programs: Path, outfile: Path) -> None:
    stand_in(programs, "llama-quantize", "echo nothing to do")
    with pytest.raises(MoneError, match="llama-quantize cannot make q4_k_m of this model: nothing to do$"):
        quantizing.quantized_types(outfile, "q4_k_m")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "echo main: error: out of memory >&2; echo bye >&2; exit 3",
            "failed on .*: main: error: out of mem",
        ),
        ("echo only this; exit 3", "llama-bench failed on .*: only this$"),
        ("exit 3", "llama-bench failed on .*: it does not say why$"),
        ("echo not JSON", "llama-bench printed no speeds of .*model.gguf: build it anew"),
        ("echo '[]'", "llama-bench printed no speeds of .*model.gguf: build it anew"),
        (None, r"cannot run .*llama-bench \(No such file or directory\): run `mone-llama build`"),
    ],
)
def test_a_speed_that_cannot_be_measured_is_one_line(
    script: str | None, message: str, programs: Path, outfile: Path
) -> None:
    if script:
        stand_in(programs, "llama-bench", script)
    with pytest.raises(MoneError, match=message):
        speed.measure_speed(outfile, LlamaOptions())
