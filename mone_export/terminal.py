"""One line of progress on stderr, for the console commands."""

import shutil
import sys
import time


class ProgressLine:
    """Draws progress: one line that changes on a terminal, a line now and then elsewhere."""

    def __init__(self, *, enabled: bool = True) -> None:
        """Start with nothing drawn; `enabled=False` never draws."""
        self._enabled = enabled
        self._live = sys.stderr.isatty()
        self._stage = ""
        self._start = 0.0
        self._next = 0.0
        self._ended = False

    def __call__(self, done: int, total: int, what: str) -> None:
        """Show a step; a `total` of 0 means that it is unknown."""
        now = time.monotonic()
        if what != self._stage:
            self._stage, self._start, self._next = what, now, now + (0 if self._live or not total else 15)
            self._ended = False
        ended = total > 0 and done >= total
        if not self._enabled or self._ended or (now < self._next and not ended):
            return
        self._ended = ended
        self._next = now + (0.1 if self._live else 15)
        text = self._text(done, total, what, now - self._start)
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text[:width]}", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def _text(self, done: int, total: int, what: str, seconds: float) -> str:
        if not total:
            return what
        eta = f", {seconds / done * (total - done):.0f} s left" if 0 < done < total and seconds > 3 else ""
        return f"{done}/{total} {what}{eta}"

    def close(self) -> None:
        """Clear the line."""
        if self._live and self._stage and self._enabled:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
