"""What happens when somebody cuts a file short that llama.cpp has mapped.

The system sends SIGBUS to a thread that looks at what is gone, and that would end the process, with no line
said and its temporary files left. Python runs a signal's handler in the main thread, while the other one
tries again and again. The handler puts zeros in the place of the mapping, and so all calls come to an end;
what they computed is of no use.
"""

import ctypes
import mmap
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_MAPS = Path("/proc/self/maps")
_FIXED = 0x10  # MAP_FIXED of Linux, which Python's mmap has no name for


@contextmanager
def cut_short() -> Iterator[list[Path]]:
    """Yield a list that gets the mapped files which are cut short during the block.

    It is for the main thread while others work, and it must be back in Python every now and then. Elsewhere,
    and on systems other than Linux, the list stays empty, and SIGBUS ends the process.
    """
    found: list[Path] = []
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        yield found
        return

    def handle(*_: Any) -> None:
        if files := list(_replaced()):
            found.extend(files)
        else:  # it comes again, and ends the process
            signal.signal(signal.SIGBUS, signal.SIG_DFL)

    before = signal.signal(signal.SIGBUS, handle)
    try:
        yield found
    finally:
        signal.signal(signal.SIGBUS, before or signal.SIG_DFL)


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
