"""A file says which command made it; that command, in another folder, gives the same bytes."""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from command import Command

from mone_export import cli, cli_inspect
from mone_export.errors import MoneError
from mone_export.output.redoing import redo
from mone_export.pipeline import export, rehearse
from mone_export.source.gguf_header import read_header

pytestmark = pytest.mark.slow  # a whole command each

Moved = Callable[..., Path]


def run(arguments: Sequence[object]) -> None:
    assert cli.main([*map(str, arguments), "-q"]) == 0


def printed(file: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `--from` prints on stdout: a command and no more."""
    capsys.readouterr()
    assert cli.main(["--from", str(file)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return line


@pytest.fixture
def moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Moved:
    """A new working folder, with copies of some files under their own names."""

    def move(*paths: Path) -> Path:
        folder = tmp_path / "elsewhere"
        folder.mkdir()
        for path in paths:
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)
        monkeypatch.chdir(folder)
        return folder

    return move


def again(file: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Assert that the printed command, run in a folder, gives a file's bytes, and names no folder."""
    command = printed(file, capsys)
    assert not re.search(r"/(?!\w+\b)|\.\./", command.replace("./", "")), command
    name, *arguments = shlex.split(command)
    assert name == "mone-export"
    run(arguments)
    made = folder / f"{file.stem}-again.gguf"
    assert made.read_bytes() == file.read_bytes(), command
    assert printed(made, capsys).replace("-again-again", "-again") == command
    assert str(file.parent).encode() not in file.read_bytes()


DEMO: dict[str, list[object]] = {
    "thin by default": ["--ratio", 0.5],
    "means of experts by another score": [
        *("--ratio", 0.4, "--novice", "mean", "--score", "reap", "--allocate", "even"),
        *("--no-guard", "--min-kept", 9, "--seed", 3),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", DEMO)
def test_the_demo_again(
    case: str, text: Path, tmp_path: Path, moved: Moved, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.gguf"
    run(["demo", *DEMO[case], "-f", text, "--chunks", 12, "-c", 256, "-o", out])
    again(out, moved(text), capsys)


@pytest.mark.slow
@pytest.mark.upstream
def test_a_size_again(text: Path, tmp_path: Path, moved: Moved, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.gguf"
    run(["demo", "--fit", "7M", "-f", text, "--chunks", 12, "-c", 256, "-o", out])
    again(out, moved(text), capsys)


@pytest.mark.slow
@pytest.mark.upstream
def test_a_gguf_again(
    demo_gguf: Path, text: Path, tmp_path: Path, moved: Moved, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.gguf"
    run([demo_gguf, "--ratio", "30%", "-f", text, "--chunks", 4, "-c", 256, "--outtype", "q8_0", "-o", out])
    again(out, moved(text, demo_gguf), capsys)


def test_statistics_in_place_of_a_text(
    command: Command,
    small: Path,
    stats: Path,
    tmp_path: Path,
    moved: Moved,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "model.gguf"
    command("--stats", stats, "-o", out, text="").is_fine()
    assert "--stats stats" in printed(out, capsys)
    again(out, moved(small, stats), capsys)


def test_statistics_of_the_text_that_is_given_are_not_stated(
    command: Command, stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With them or without, the bytes are the same."""
    one, two = tmp_path / "one.gguf", tmp_path / "two.gguf"
    command("--stats", stats, "-o", one, "--novice", "mean").is_fine()
    command("-o", two, "--novice", "mean").is_fine()
    assert one.read_bytes() == two.read_bytes()
    assert "--stats" not in printed(one, capsys)


@pytest.mark.parametrize(
    ("place", "first", "wanted"),
    [
        ("--stats", ("--dtype", "bfloat16"), "--stats kept"),
        ("--workdir", ("--dtype", "bfloat16"), "--dtype bfloat16"),
        ("--workdir", ("--stream", "on"), "--stream on"),
    ],
)
def test_what_was_computed_otherwise_before_is_stated(
    place: str,
    first: Sequence[str],
    wanted: str,
    command: Command,
    small: Path,
    text: Path,
    tmp_path: Path,
    moved: Moved,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept, out = tmp_path / "kept", tmp_path / "model.gguf"
    command(place, kept, *first, "--novice", "mean", "-o", tmp_path / "first.gguf").is_fine()
    command(place, kept, "--novice", "mean", "-o", out).is_fine()
    assert wanted in printed(out, capsys)
    again(out, moved(small, text, *([kept] if place == "--stats" else [])), capsys)


def test_a_plan_a_protected_text_and_a_method(
    command: Command,
    small: Path,
    text: Path,
    tmp_path: Path,
    moved: Moved,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rare, plan = tmp_path / "rare.txt", tmp_path / "plan.json"
    rare.write_text("something else entirely, " * 40)
    held, ordinary, planned = (tmp_path / f"{name}.gguf" for name in ("held", "ordinary", "planned"))
    command("-o", held, "--protect", f"{rare}=2", "--allocate", "model", "--plan-out", plan).is_fine()
    command("-o", ordinary, "--method", "drop", "--outtype", "f32").is_fine()
    folder = moved(small, text, rare, plan)
    for file in (held, ordinary):
        again(file, folder, capsys)
    run([small, "--plan", plan, "-f", text, "--chunks", 2, "-c", 32, "-o", planned])
    again(planned, folder, capsys)


GIVEN = {  # as it is given -> as it is stated
    "./calib.txt": "calib.txt",
    "sub//a.txt": "a.txt",
    "sub/../calib.txt=2": "calib.txt=2",
}


@pytest.mark.parametrize("given", GIVEN)
def test_a_file_is_stated_by_its_name(
    given: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("calib.txt", "sub/a.txt"):
        shutil.copyfile(text, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert options_of("demo", files=[given])[-2:] == ["-f", GIVEN[given]]


@pytest.mark.parametrize("after", ["", "=2", ":train", ":default:train=2"])
def test_a_dataset_is_stated_without_its_folder(after: str, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sub"
    folder.mkdir()
    shutil.copyfile(text, folder / "train.txt")
    told = options_of("demo", datasets=[f"{folder}{after}"])
    assert told[-2:] == ["--dataset", f"./sub{after}"]
    assert list(redo(forged(tmp_path, told)).arguments[:-2]) == told


def options_of(model: str, **options: Any) -> list[str]:
    """The options that an export would state."""
    job, _ = rehearse(model, **{"ratio": 0.5, "novice": "mean"} | options)
    told: list[str] = json.loads(job.stated["mone.options"][1])
    return told


HONEST: dict[str, list[str]] = {
    "a negative number": ["demo", "--ratio", "0.5", "-ngl", "-1"],
    "a file without a suffix": ["./model", "--ratio", "0.5"],
    "two points in a model": ["some..model.gguf", "--ratio", "0.5"],
    "two points in a text": ["demo", "--ratio", "0.5", "-f", "notes..txt=2"],
    "a text like an option": ["demo", "--ratio", "0.5", "-f", "./-notes.txt"],
}


@pytest.mark.parametrize("case", HONEST)
def test_an_odd_command_is_printed_as_it_was(case: str, tmp_path: Path) -> None:
    assert list(redo(forged(tmp_path, HONEST[case])).arguments[:-2]) == HONEST[case]


@pytest.mark.parametrize("name", ["model", "Model.GGUF", "-model.gguf", "a..gguf"])
def test_odd_names_are_stated_so_that_they_pass(
    name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export("demo", ratio=0, outfile=tmp_path / "model.gguf")
    (tmp_path / "model.gguf").rename(tmp_path / name)
    shutil.copyfile(text, tmp_path / "-notes.txt")
    monkeypatch.chdir(tmp_path)
    told = options_of(f"./{name}", ratio=0, novice=None) + options_of("demo", files=["-notes.txt"])[1:]
    assert list(redo(forged(tmp_path, told)).arguments[:-2]) == told and told[-1] == "./-notes.txt"


def test_the_inspector_shows_it(
    command: Command, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.gguf"
    command("-o", out).is_fine()
    wanted = printed(out, capsys)
    assert cli_inspect.main([str(out)]) == 0
    assert f"again      {wanted}" in capsys.readouterr().out
    assert cli_inspect.main([str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["command"] == wanted


@pytest.mark.parametrize("beside", [("demo",), ("-o", "x.gguf"), ("--ratio", "0.5"), ("--fit", "1G")])
def test_nothing_may_stand_beside_it(
    beside: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else a user waits for a file that is not written."""
    with pytest.raises(SystemExit) as stop:
        cli.main([*beside, "--from", str(forged(tmp_path, ["demo"]))])
    name = "MODEL" if len(beside) == 1 else beside[0]
    assert stop.value.code == 2 and f"leave out {name}" in capsys.readouterr().err


def test_a_file_without_a_command_says_so(
    command: Command, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = forged(tmp_path, ["demo"])
    file.write_bytes(file.read_bytes().replace(b"mone.options", b"mone.optionz"))
    assert cli.main(["--from", str(file)]) == 1
    assert "does not say which command made it" in capsys.readouterr().err
    assert cli.main(["--from", str(tmp_path / "none.gguf")]) == 1
    assert cli_inspect.main([str(file)]) == 0


def forged(folder: Path, arguments: object) -> Path:
    """Make a file that states any arguments."""
    file = folder / "forged.gguf"
    export("demo", ratio=0, outfile=file)
    told = json.dumps(arguments).encode()
    entry = read_header(file).keys["mone.options"]
    data = file.read_bytes()
    at = data.index(entry.raw)
    more = len(told) - (len(entry.raw) - 8)
    told += b" " * (-more % 32)  # tensors stay where multiples of 32 bytes are
    file.write_bytes(data[:at] + len(told).to_bytes(8, "little") + told + data[at + len(entry.raw) :])
    return file


HOSTILE: dict[str, Any] = {
    "another program": ["demo; rm -rf x", "--ratio", "0.5"],
    "an option of its own": ["demo", "--ratio", "0.5", "--overwrite"],
    "an output": ["demo", "--ratio", "0.5", "-o", "x.gguf"],
    "a file elsewhere": ["demo", "--ratio", "0.5", "-f", "../../secret"],
    "an absolute file": ["demo", "--ratio", "0.5", "--stats", "/etc/passwd"],
    "a model elsewhere": ["../model", "--ratio", "0.5"],
    "a model of a share": ["\\\\evil\\share\\m.gguf", "--ratio", "0.5"],
    "an absolute dataset": ["demo", "--ratio", "0.5", "--dataset", "/etc/ssh"],
    "a dataset elsewhere": ["demo", "--ratio", "0.5", "--dataset", "../secret:train"],
    "a dataset of a share": ["demo", "--ratio", "0.5", "--dataset", "\\\\evil\\s"],
    "an option as a value": ["demo", "--ratio", "--trust-remote-code"],
    "a terminal's language": ["demo", "--ratio", "0.5", "--field", "\u001b[2J"],
    "no list": {"demo": "--ratio with a long value that fills the room"},
    "numbers": ["demo", 1, 2, 3, 4, 5, 6, 7, 8, 9],
    "too many": ["demo", *["--no-guard"] * 600],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_command_that_is_not_ours_is_not_printed(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = forged(tmp_path, HOSTILE[case])
    with pytest.raises(MoneError, match="states a command that mone-export has not written"):
        redo(file)
    assert cli.main(["--from", str(file)]) == 1
    done = capsys.readouterr()
    assert not done.out and len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "wanted"), [("a\u001b[2J.gguf", "a_[2J-again.gguf"), ("-x.gguf", "./-x-again.gguf")]
)
def test_a_files_own_name_is_neither_an_option_nor_a_terminals_language(
    name: str, wanted: str, tmp_path: Path
) -> None:
    file = forged(tmp_path, ["demo", "--ratio", "0.5"]).rename(tmp_path / name)
    assert redo(file).arguments[-2:] == ("-o", wanted)


@pytest.mark.parametrize(("options", "noted"), [((), True), (("--novice", "mean"), False)])
def test_what_a_size_was_met_with_is_noted(options: Sequence[str], noted: bool, tmp_path: Path) -> None:
    found = redo(forged(tmp_path, ["demo", "--fit", "7000000", *options]))
    assert any("its novices are none" in note for note in found.notes) == noted


def test_code_of_others_runs_by_the_users_own_word_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = forged(tmp_path, ["some/model", "--ratio", "0.5", "--trust-remote-code", "--field", "a; b $(c)"])
    found = redo(file)
    assert "--trust-remote-code" not in found.command and any("--trust" in note for note in found.notes)
    assert shlex.split(found.command)[4:6] == ["--field", "a; b $(c)"]
