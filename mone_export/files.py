"""How a finished file gets its name, so that a power cut leaves the old or the new one, whole; links."""

import os
import shutil
import sys
from pathlib import Path


def replace(part: Path, target: Path) -> None:
    """Rename the complete file or folder `part` to `target`, on the same disk, once its data is on it.

    The folder of `target` is flushed as well, so that the new name outlives a power cut. A folder in the way
    is put at `aside(part)`, and put back should the rename fail. Raises `OSError`.
    """
    for path in (*part.iterdir(), part) if part.is_dir() else (part,):
        flush(path)
    before = aside(part)
    try:
        if part.is_dir() and target.is_dir():  # no system renames onto a folder that holds something
            target.rename(before)
        part.replace(target)
    finally:
        if before.is_dir() and not target.exists():
            before.rename(target)
    flush(target.parent)


def aside(part: Path) -> Path:
    """Return where the folder that `part` replaces lies until it is replaced."""
    return part.with_name(f"{part.name}.before")


def link(original: Path, place: Path) -> None:
    """Make `place`, which is not there, stand for a file or folder. Raises `OSError`.

    Where symbolic links need a right that this process lacks (Windows), files get hard links, and on another
    disk they are copied.
    """
    try:
        place.symlink_to(original)
    except OSError:
        if original.is_dir():
            place.mkdir()
            for each in original.iterdir():
                link(each, place / each.name)
            return
        try:
            place.hardlink_to(original)
        except OSError:
            shutil.copy2(original, place)


def flush(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk. Raises `OSError`."""
    if path.is_dir() and sys.platform == "win32":  # Windows opens no folders, and needs it for files only
        return
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)
