"""What a run may write to, and how a file comes to stand there."""

import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mone_export.errors import MoneError
from mone_export.locks import locked
from mone_export.paths import FIGURES, check_outputs, check_room, is_ours, page_outputs, replacing

NONE = Path("nothing")


def gguf(path: Path, *, key: str = "mone.format_version") -> Path:
    """A GGUF with one key, in the format's own bytes."""
    name = key.encode()
    path.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(name)) + name + struct.pack("<II", 4, 1))
    return path


def written(path: Path, text: str = "of great value") -> Path:
    path.write_text(text)
    return path


def test_outputs_come_back_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "link.gguf").symlink_to("there/real.gguf")
    found = check_outputs({"-o": Path("link.gguf"), "--stats": Path("there/../s")}, {"-f": NONE})
    assert found == {"-o": tmp_path / "there" / "real.gguf", "--stats": tmp_path / "s"}


@pytest.mark.parametrize("way", ["path", "dots", "link", "link to the input", "hard link"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_output_onto_an_input_is_refused(tmp_path: Path, way: str, overwrite: bool) -> None:
    text = written(tmp_path / "text.txt")
    output = read = text
    if way == "dots":
        (tmp_path / "sub").mkdir()
        output = tmp_path / "sub" / ".." / "text.txt"
    elif way == "link":
        output = tmp_path / "o.gguf"
        output.symlink_to(text)
    elif way == "link to the input":
        read = tmp_path / "alias.txt"
        read.symlink_to(text)
    elif way == "hard link":
        output = tmp_path / "o.gguf"
        output.hardlink_to(text)
    with pytest.raises(MoneError, match=r"^-o .* would replace what is read as -f: choose another -o$"):
        check_outputs({"-o": output}, {"MODEL": NONE, "-f": [NONE, read]}, overwrite=overwrite)
    assert text.read_text() == "of great value"


def test_files_of_an_input_folder_are_inputs(tmp_path: Path) -> None:
    """As in the hub's cache: the model's folder holds links to files elsewhere."""
    model, blobs = tmp_path / "model", tmp_path / "blobs"
    model.mkdir()
    blobs.mkdir()
    blob = written(blobs / "4f3c")
    (model / "model.safetensors").symlink_to(blob)
    for output in (blob, model / "model.safetensors"):
        with pytest.raises(MoneError, match="read as MODEL"):
            check_outputs({"-o": output}, {"MODEL": model}, overwrite=True)
    assert check_outputs({"-o": model / "new.gguf"}, {"MODEL": model})
    gguf(model / "new.gguf")
    assert check_outputs({"-o": model / "new.gguf"}, {"MODEL": model}), "our own file may be made again"


def test_two_outputs_cannot_be_one_file(tmp_path: Path) -> None:
    with pytest.raises(MoneError, match="-o and --stats both name .*: choose another --stats"):
        check_outputs({"-o": tmp_path / "X.gguf", "--stats": tmp_path / "x.GGUF"}, {})


@pytest.mark.parametrize("kind", ["null", "pipe", "folder", "loop", "in a loop"])
def test_special_files_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out"
    if kind == "null":
        path = Path("/dev/null")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path)
        path = path if kind == "loop" else path / "model.gguf"
    messages = {
        "folder": "is a folder: name a file",
        "loop": "leads to itself",
        "in a loop": "leads to itself",
    }
    message = messages.get(kind, "a device or a pipe")
    with pytest.raises(MoneError, match=message):
        check_outputs({"-o": path}, {}, overwrite=True)


def test_a_strangers_file_needs_overwrite(tmp_path: Path) -> None:
    for path in (written(tmp_path / "notes.gguf"), gguf(tmp_path / "plain.gguf", key="general.name")):
        with pytest.raises(MoneError, match="is no file of mone-export: .*pass --overwrite"):
            check_outputs({"-o": path}, {})
        assert check_outputs({"-o": path}, {}, overwrite=True) == {"-o": path}
    assert check_outputs({"-o": gguf(tmp_path / "ours.gguf")}, {}) == {"-o": tmp_path / "ours.gguf"}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_that_no_page_of_ours_left_is_not_replaced(name: str, tmp_path: Path) -> None:
    page, figure = tmp_path / "page.html", written(tmp_path / f"page-{name}.png")
    with pytest.raises(MoneError, match=f"page-{name}.png exists, --report would replace it: choose another"):
        page_outputs(page)
    written(page, "<p>somebody else's</p>")
    with pytest.raises(MoneError, match=f"page-{name}.png exists"):
        page_outputs(page)
    assert page_outputs(page, overwrite=True)["--report"] == page and figure.exists()


def test_a_file_of_ours_is_known_behind_a_vocabulary(tmp_path: Path) -> None:
    """The converter writes our keys after the tokens."""
    path = gguf(tmp_path / "x.gguf")
    start, end = path.read_bytes()[:24], path.read_bytes()[24:]
    path.write_bytes(start + os.urandom(2**24) + end)
    assert is_ours(path)
    path.write_bytes(start + b"say mone.format_version" * 9)
    assert not is_ours(path), "a text that contains the name is no key"


def test_space_is_counted_where_a_link_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, empty = tmp_path / "full", tmp_path / "empty"
    free = {full: 10**6, empty: 10**12}
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free[Path(folder)]))
    for folder in free:
        folder.mkdir()
    (empty / "link.gguf").symlink_to(full / "real.gguf")
    (full / "link.gguf").symlink_to(empty / "real.gguf")
    check_room(full / "link.gguf", needed=10**9)
    with pytest.raises(MoneError, match=r"full has 1.00 MB free, the export needs 1.00 GB: free some space"):
        check_room(empty / "link.gguf", needed=10**9)


@pytest.mark.parametrize("place", ["missing/x.gguf", "file/x.gguf"])
def test_folder_that_is_not_there_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MoneError, match="does not exist: create it or choose another --stats"):
        check_outputs({"--stats": tmp_path / place}, {})


def test_file_appears_complete_and_with_the_usual_rights(tmp_path: Path) -> None:
    target = written(tmp_path / "x.gguf", "before")
    target.chmod(0o600)
    with replacing(target) as part:
        written(part.with_name("between.gguf"))
        written(part, "after")
        assert target.read_text() == "before" and part.parent.parent == tmp_path
    assert target.read_text() == "after" and list(tmp_path.iterdir()) == [target]
    written(tmp_path / "other")
    assert target.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    target = written(tmp_path / "x.gguf", "before")
    with pytest.raises(KeyboardInterrupt), replacing(target) as part:
        written(part)
        raise KeyboardInterrupt
    assert target.read_text() == "before" and list(tmp_path.iterdir()) == [target]


def test_place_that_is_taken_at_the_end_is_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(MoneError, match=r"^cannot write .*x \(Is a directory\): "),
        replacing(tmp_path / "x") as part,
    ):
        written(part)
        (tmp_path / "x").mkdir()
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_what_a_link_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link, real = tmp_path / "x.gguf", tmp_path / "disk" / "real.gguf"
    link.symlink_to(real)
    with replacing(link) as part:
        assert part.parent.parent == real.parent, "on the disk of the file"
        written(part, "new")
    assert link.is_symlink() and real.read_text() == "new" and not real.is_symlink()


def folder_of(path: Path, text: str) -> Path:
    path.mkdir()
    written(path / "weights", text)
    return path


def test_a_folder_is_replaced_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the disk or the user stops it: while data is flushed, or at the new folder's rename."""
    target, real = folder_of(tmp_path / "x", "before"), {"fsync": os.fsync, "replace": Path.replace}
    for where, name in ((os, "fsync"), (Path, "replace")):
        for stop in (OSError(28, "No space left on device"), KeyboardInterrupt()):

            def stopped(*_: object, stop: BaseException = stop) -> None:
                raise stop

            monkeypatch.setattr(where, name, stopped)
            with pytest.raises((MoneError, KeyboardInterrupt)), replacing(target) as part:
                folder_of(part, "after")
            monkeypatch.setattr(where, name, real[name])
            assert (target / "weights").read_text() == "before" and list(tmp_path.iterdir()) == [target]
    with replacing(target) as part:
        folder_of(part, "after")
    assert (target / "weights").read_text() == "after" and list(tmp_path.iterdir()) == [target]


def test_a_folder_that_cannot_go_back_waits_for_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = folder_of(tmp_path / "x", "before"), Path.rename

    def only_away(old: Path, new: Path) -> Path:
        if new == target:
            raise OSError(28, "No space left on device")
        return rename(old, new)

    monkeypatch.setattr(Path, "rename", only_away)
    monkeypatch.setattr(Path, "replace", only_away)
    with pytest.raises(MoneError, match="No space left"), replacing(target) as part:
        folder_of(part, "after")
    monkeypatch.undo()
    assert not target.exists()
    with replacing(target) as part:
        assert (target / "weights").read_text() == "before"
        folder_of(part, "after")
    assert (target / "weights").read_text() == "after" and list(tmp_path.iterdir()) == [target]


def test_old_folder_is_there_while_the_new_ones_data_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, fsync, seen = folder_of(tmp_path / "x", "before"), os.fsync, []

    def watched(number: int) -> None:
        seen.append((target / "weights").read_text())
        fsync(number)

    monkeypatch.setattr(os, "fsync", watched)
    with replacing(target) as part:
        folder_of(part, "after")
    assert seen == ["before", "before", "after"], "file, folder, and the name at the end"


def test_a_folder_comes_back_from_a_run_killed_between_two_renames(tmp_path: Path) -> None:
    target = folder_of(tmp_path / "x", "before")
    code = (
        "import os, sys, pathlib; from mone_export.paths import replacing\n"
        "pathlib.Path.replace = lambda *_: os._exit(9)\n"
        "with replacing(pathlib.Path(sys.argv[1])) as part: part.mkdir()"
    )
    assert subprocess.run([sys.executable, "-c", code, str(target)]).returncode == 9
    assert not target.exists()
    with pytest.raises(KeyboardInterrupt), replacing(target):
        raise KeyboardInterrupt
    assert (target / "weights").read_text() == "before" and list(tmp_path.iterdir()) == [target]


def test_runs_of_one_output_do_not_share_a_file(tmp_path: Path) -> None:
    target = tmp_path / "x.gguf"
    with replacing(target) as first:
        written(first, "first")
        for name in ("second", "third"):
            with replacing(target) as part:
                written(part, name)
            assert target.read_text() == name
            assert first.read_text() == "first", f"the {name} has not taken the first's for a left-over"
            assert (first.parent / "lock").exists()
    assert target.read_text() == "first" and list(tmp_path.iterdir()) == [target]


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    target = tmp_path / "x[1].gguf"
    code = (
        "import sys, pathlib, time; from mone_export.paths import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1])) as part:\n"
        "    part.write_text('half'); print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with replacing(target) as part:
            written(part, "another's")
        assert len(list(tmp_path.glob("*.part"))) == 1, "its process lives"
        process.send_signal(signal.SIGKILL)
    assert len(list(tmp_path.glob("*.part"))) == 1
    (tmp_path / "y.gguf.abcdefgh.part").mkdir()
    with replacing(target) as part:
        written(part, "new")
    assert {file.name for file in tmp_path.iterdir()} == {target.name, "y.gguf.abcdefgh.part"}


def test_lock_is_for_one_at_a_time(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "lock"),
        pytest.raises(MoneError, match="another process works in"),
        locked(tmp_path / "lock"),
    ):
        pass
    with pytest.raises(FileNotFoundError), locked(tmp_path / "missing" / "lock"):
        pass


def test_a_disk_without_room_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    """In a process that may write 1000 bytes to a file: the system itself refuses more."""
    code = (
        "import resource, signal, sys, pathlib; from mone_export.paths import replacing\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    with replacing(pathlib.Path(sys.argv[1])) as part: part.write_bytes(bytes(5000))\n"
        "except OSError as error: print(error.strerror)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x")]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "File too large\n"
    assert not list(tmp_path.iterdir())
