"""Locks between processes, each on a file of its own that stays where it is.

The system drops a lock when the process that holds it ends, however it ends, so none is ever stale. filelock
locks the descriptor: by flock on POSIX, where a child that inherits the descriptor keeps the lock even when
its parent is killed; by LockFileEx on Windows, where children inherit none.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mone_export.errors import MoneError


class NoLocksError(MoneError):
    """The file system has no locks."""


@contextmanager
def locked(file: Path, *, waiting: Callable[[], None] | None = None) -> Iterator[int]:
    """Hold the lock of `file`, made if need be, for the length of the block; yields the descriptor.

    Where another process holds it, `waiting` is called once and the lock awaited; without `waiting` that is a
    MoneError. Raises OSError for a file that cannot be made.
    """
    with file.open("ab") as stream:
        if not _taken(stream.fileno(), file):
            if waiting is None:
                raise MoneError(
                    f"another process works in {file.parent}: wait for it, or choose another folder"
                )
            waiting()
            _taken(stream.fileno(), file, blocking=True)
        yield stream.fileno()


@contextmanager
def tried(file: Path) -> Iterator[bool]:
    """Try the lock of `file`: yields whether nobody else has it, and holds it for the length of the block."""
    try:
        stream = file.open("ab")
    except OSError:
        yield False
        return
    with stream:
        try:
            taken = _taken(stream.fileno(), file)
        except NoLocksError:
            taken = False
        yield taken


def _taken(descriptor: int, file: Path, *, blocking: bool = False) -> bool:
    from filelock import lock_descriptor  # `--help` does without

    try:
        return lock_descriptor(descriptor, blocking=blocking)
    except OSError as error:
        raise NoLocksError(
            f"{file.parent} is on a file system without locks ({error.strerror}): choose a folder elsewhere"
        ) from None
