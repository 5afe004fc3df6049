"""Disks that are full, folders that two runs share, a terminal that takes nothing: what is left and said."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command import SMALL_TEXT, Command, names

from mone_export import pipeline
from mone_export.calibration import rows
from mone_export.locks import locked

pytestmark = pytest.mark.slow  # a whole command each

Limit = Callable[[int], AbstractContextManager[Path]]


@contextmanager
def _largest_file(size: int, folder: Path) -> Iterator[Path]:
    """No file may be larger, from the calibration on."""
    before, collect = resource.getrlimit(resource.RLIMIT_FSIZE), pipeline.collect

    def limit(*arguments: Any, **named: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        return collect(*arguments, **named)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "collect", limit)
            yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def _disk(size: int, folder: Path) -> Iterator[Path]:
    """A disk of its own that holds no more; every check of free space says that there is plenty."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting takes the rights of root")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**12, total=10**12, used=0))
            yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(params=["limit", "disk"])
def limited(request: pytest.FixtureRequest, tmp_path: Path) -> Limit:
    """A folder in which files, or all of them together, hold so many bytes."""
    folder = tmp_path / "limited"
    folder.mkdir()
    return lambda size: (_largest_file if request.param == "limit" else _disk)(size, folder)


FULL = "(File too large|No space left on device)"


def test_a_full_disk_keeps_the_old_output(command: Command, stats: Path, limited: Limit) -> None:
    with limited(700_000) as folder:
        out = folder / "model.gguf"
        out.write_bytes(b"old")
        command("-o", out, "--stats", stats, "--overwrite", text="").is_one_line(f"{FULL}.*; free some space")
        assert out.read_bytes() == b"old" and names(folder) == ["model.gguf"]


def test_temporary_files_that_find_the_disk_full_are_one_line(
    command: Command, stats: Path, tmp_path: Path
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        done = command("-o", tmp_path / "model.gguf", "--stats", stats, text="")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    done.is_one_line("cannot write temporary files .File too large.: .* set TMPDIR")


@pytest.mark.upstream
def test_a_full_disk_leaves_nothing_of_a_file_that_is_rounded(
    command: Command, stats: Path, limited: Limit
) -> None:
    with limited(200_000) as folder:
        out = folder / "model.gguf"
        command("-o", out, "--stats", stats, "--outtype", "q4_k_m", text="").is_one_line("free some space")
        assert not names(folder)


def test_statistics_that_find_the_disk_full_are_one_line(
    command: Command, tmp_path: Path, limited: Limit
) -> None:
    with limited(8192) as folder:
        done = command("-o", tmp_path / "model.gguf", "--stats", folder / "stats")
        done.is_one_line(f"cannot write .*stats.*{FULL}")
        assert not names(folder) and not (tmp_path / "model.gguf").exists()


def test_a_work_folder_on_a_full_disk_is_one_line_and_goes_on_later(
    command: Command, tmp_path: Path, limited: Limit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "SECONDS_PER_STEP", 0)
    out = tmp_path / "model.gguf"
    with limited(8192) as folder:
        command("-o", out, "--workdir", folder / "work").is_one_line(f"{FULL}")
        assert not out.exists()
        if not os.path.ismount(folder):
            assert not list(folder.rglob("*.part")), "nothing half written"
            shutil.copytree(folder / "work", tmp_path / "later")
    command("-o", out, "--workdir", tmp_path / "later").is_fine()


@pytest.mark.nightly
def test_two_runs_of_one_output_both_end_well(small: Path, text: Path, stats: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    arguments = [small, "--ratio", "0.5", "-f", text, *SMALL_TEXT, "--stats", stats, "-q"]
    command = [sys.executable, "-m", "mone_export", *map(str, arguments), "-o", str(folder / "model.gguf")]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=300)[1] for process in processes] == ["", ""]
    assert [process.returncode for process in processes] == [0, 0]
    assert names(folder) == ["model.gguf"]
    alone = command[:-1] + [str(tmp_path / "alone.gguf")]
    subprocess.run(alone, check=True, timeout=300)
    assert (folder / "model.gguf").read_bytes() == (tmp_path / "alone.gguf").read_bytes()


def test_a_work_folder_is_for_one_run_at_a_time(command: Command, tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "model.gguf"
    (work / "rank-0").mkdir(parents=True)
    with locked(work / "rank-0" / "lock"):
        half = work / "rank-0" / "1.safetensors.part"
        half.write_bytes(b"of the run that holds the lock")
        command("-o", out, "--workdir", work).is_one_line(
            "another process works in .*rank-0: wait for it, or choose another"
        )
        assert half.exists() and not out.exists()
    command("-o", out, "--workdir", work).is_fine()


@pytest.mark.parametrize(
    ("shell", "status"),
    [
        ('"$@" > /dev/full', 0),
        ('PYTHONIOENCODING=ascii "$@"', 0),
        ('"$@" --dry-run | head -1', 0),
        ('PYTHONIOENCODING=ascii "$@" --json | head -1', 0),
    ],
)
@pytest.mark.by_day(2)
def test_a_terminal_that_takes_nothing_costs_no_file(
    shell: str, status: int, small: Path, stats: Path, tmp_path: Path
) -> None:
    out = tmp_path / "modèle 模型.gguf"
    arguments = [str(small), "--ratio", "0.5", "--stats", str(stats), "-o", str(out)]
    command = ["bash", "-o", "pipefail", "-c", shell, "bash", sys.executable, "-m", "mone_export", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert out.exists() == ("--dry-run" not in shell)
