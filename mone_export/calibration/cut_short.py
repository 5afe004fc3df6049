"""What happens when somebody cuts a file short that llama.cpp has mapped.

The system sends SIGBUS to a thread that looks at what is gone, and that would end the process, with no line
said and its temporary files left. The handler puts zeros in the place of the mapping, so that the thread goes
on; what it computes is of no use. It is the C library's, called in that thread: Python's own runs in the main
thread, into which the other one, trying again and again, would call it faster than it returns.
"""

import ctypes
import mmap
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_FIXED = 0x10  # MAP_FIXED of Linux, which Python's mmap has no name for
_HANDLER, _DEFAULT = ctypes.CFUNCTYPE(None, ctypes.c_int), None  # SIG_DFL is a null pointer


@contextmanager
def cut_short() -> Iterator[list[Path]]:
    """Yield a list that gets the mapped files which are cut short during the block.

    It is for the main thread while others work in calls that hold no lock of Python's. In other threads, and
    on systems other than Linux, the list stays empty, and SIGBUS ends the process.
    """
    found: list[Path] = []
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        yield found
        return
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p

    def handle(_: int) -> None:
        found.extend(_replaced())
        if not found:  # it comes again, and ends the process
            library.signal(signal.SIGBUS, _DEFAULT)

    handler = _HANDLER(handle)
    before = library.signal(signal.SIGBUS, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield found
    finally:
        library.signal(signal.SIGBUS, before)


def _replaced() -> Iterator[Path]:
    """Put zeros in the place of each mapping that goes on beyond the end of its file; yields the files."""
    library = ctypes.CDLL(None)
    library.mmap.argtypes = (*(ctypes.c_void_p, ctypes.c_size_t), *[ctypes.c_int] * 3, ctypes.c_long)
    for line in _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        place, rights, offset, *_, name = line.split(maxsplit=5)
        if rights != "r--s" or not (file := Path(name)).is_file():
            continue
        start, end = (int(number, 16) for number in place.split("-"))
        if file.stat().st_size <= int(offset, 16) + end - start - mmap.PAGESIZE:
            kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED
            library.mmap(start, end - start, mmap.PROT_READ, kind, -1, 0)
            yield file
