"""What a power cut would lose: whether each rename comes after the flush of what it promises."""

import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_NO_PROMISE = (".part", ".before", "lock")  # how names of temporary files end


def record(place: Path, out: Path) -> None:
    """Note in the file `out` what this process, from now on, renames in a folder without having flushed it.

    A name that appears promises the file behind it, and all that this process has written below the folder in
    which it appears: that must be on the disk by then. The folder itself must be flushed afterwards.
    """
    order = _Order(place, out)
    os.fsync = order.noting(os.fsync)
    os.replace, os.rename = order.checking(os.replace), order.checking(os.rename)


def unflushed(out: Path) -> list[str]:
    """Return what `record` has noted, each once."""
    return sorted(set(out.read_text().splitlines())) if out.exists() else []


class _Order:
    """Which files are flushed, as of which change, and which folders are to be."""

    def __init__(self, place: Path, out: Path) -> None:
        self._place, self._out, self._began = place, out, time.time_ns()
        self._flushed: dict[tuple[int, int], int] = {}
        self._found: list[str] = []
        self._names: dict[int, str] = {}  # of folders that wait for a flush, by inode

    def noting(self, fsync: Callable[[int], None]) -> Callable[[int], None]:
        """Return an `os.fsync` that is noted."""

        def flushed(number: int) -> None:
            fsync(number)
            found = os.fstat(number)
            self._flushed[found.st_dev, found.st_ino] = found.st_mtime_ns
            if stat.S_ISDIR(found.st_mode) and self._names.pop(found.st_ino, None):
                self._say()

        return flushed

    def checking(self, move: Callable[..., None]) -> Callable[..., None]:
        """Return an `os.replace` that is checked."""

        def moved(source: Any, target: Any, **named: Any) -> None:
            move(source, target, **named)
            new = Path(target)
            if not new.is_relative_to(self._place) or new.name.endswith(_NO_PROMISE):
                return
            late = [path for path in self._promised(new.parent) if not self._on_disk(path)]
            self._found += [f"{new.name} appears and {path.name} is not flushed" for path in late]
            self._names[new.parent.stat().st_ino] = new.parent.name
            self._say()

        return moved

    def _promised(self, folder: Path) -> Iterator[Path]:
        for path in folder.rglob("*"):
            parts = path.relative_to(folder).parts
            if path.is_file() and not any(part.endswith(_NO_PROMISE) for part in parts):
                yield path

    def _on_disk(self, path: Path) -> bool:
        found = path.stat()
        changed = found.st_mtime_ns
        return changed < self._began or self._flushed.get((found.st_dev, found.st_ino), -1) >= changed

    def _say(self) -> None:
        lines = [*self._found, *(f"{name} is not flushed after a rename" for name in self._names.values())]
        self._out.write_text("".join(f"{line}\n" for line in lines))
