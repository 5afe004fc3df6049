"""Fingerprints of large files are remembered, so that the same files are hashed once."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from mone_export.runtime import cache_dir


def remembered(files: Sequence[Path], compute: Callable[[], str]) -> str:
    """Return the SHA-256 of files, computed now or before: by path, size, time of change and inode."""
    stats = [(str(file.resolve()), file.stat()) for file in files]
    key = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats]
    note = cache_dir() / "fingerprints" / hashlib.sha256(json.dumps(key).encode()).hexdigest()
    with suppress(OSError):
        if re.fullmatch("[0-9a-f]{64}", found := note.read_text(encoding="ascii")):
            return found
    sha256 = compute()
    with suppress(OSError):  # a cache that cannot be written is no reason to stop
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(sha256, encoding="ascii")
    return sha256
