"""What the console commands show while they work: a bar on a terminal, lines elsewhere, or events as JSON.

A display is called with every step (`runtime.Progress`), where "calibrating (tokens)" is the stage and what
is counted; it takes log messages with `say`, which do not disturb the bar.
"""

import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

try:
    from resource import RUSAGE_SELF, getrusage
except ImportError:  # Windows
    getrusage = None  # type: ignore[assignment]

_BETWEEN_FRAMES = 0.1  # seconds
_BETWEEN_LINES = 30.0
_BETWEEN_EVENTS = 1.0
_WIDEST_BAR = 30


class ProgressLine:
    """Draws on stderr: one bar that moves on a terminal, a line now and then elsewhere.

    When a stage is over, its line stays only where it is no bar, or with `verbose`.
    """

    def __init__(self, *, enabled: bool = True, verbose: bool = False) -> None:
        """Start with nothing drawn; `enabled=False` never draws."""
        self._enabled = enabled
        self._live = sys.stderr.isatty()
        self._kept = verbose or not self._live
        self._stage: _Stage | None = None
        self._next = 0.0

    def __call__(self, done: int, total: int, what: str) -> None:
        """Show a step; a `total` of 0 means that it is unknown."""
        if not self._enabled:
            return
        now = time.monotonic()
        if self._stage is None or what != self._stage.what:
            self._stage = _Stage(what, done, now)
            self._next = now + (0 if self._live or not total else _BETWEEN_LINES)
        ended = 0 < total <= done
        if self._stage.ended or (now < self._next and not ended):
            return
        self._stage.ended = ended
        self._next = now + (_BETWEEN_FRAMES if self._live else _BETWEEN_LINES)
        self._draw(self._stage, done, total, now)

    def say(self, _level: str, message: str) -> None:
        """Print a message above the bar."""
        self.close()
        print(message, file=sys.stderr, flush=True)
        self._next = 0.0 if self._live else self._next

    def close(self) -> None:
        """Take the bar away."""
        if self._live and self._enabled and self._stage:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _draw(self, stage: "_Stage", done: int, total: int, now: float) -> None:
        if not self._live:
            print(stage.line(done, total, now), file=sys.stderr, flush=True)
            return
        width = shutil.get_terminal_size().columns - 1
        kept = stage.ended and self._kept
        text = stage.line(done, total, now) if kept else stage.bar(done, total, now, width)
        print(f"\r\x1b[K{text[:width]}", end="\n" if kept else "", file=sys.stderr, flush=True)


class JsonEvents:
    """Writes one JSON object per line to stdout: `progress` and `log` events; `event` writes any other."""

    def __init__(self, *, enabled: bool = True) -> None:
        """Start with nothing written; `enabled=False` leaves progress and messages out."""
        self._enabled = enabled
        self._stage: _Stage | None = None
        self._next = 0.0

    def __call__(self, done: int, total: int, what: str) -> None:
        """Write a step: the first and the last of a stage, and one a second."""
        now = time.monotonic()
        if self._stage is None or what != self._stage.what:
            self._stage, self._next = _Stage(what, done, now), 0.0
        ended = 0 < total <= done
        if not self._enabled or self._stage.ended or (now < self._next and not ended):
            return
        self._stage.ended = ended
        self._next = now + _BETWEEN_EVENTS
        rate = self._stage.rate(done, now)
        self.event(
            "progress",
            stage=self._stage.name,
            unit=self._stage.unit,
            done=done,
            total=total,
            seconds=round(now - self._stage.start, 3),
            per_second=round(rate, 3) if rate else None,
            seconds_left=round((total - done) / rate, 1) if rate and total else None,
            peak_bytes=peak_memory(),
        )

    def say(self, level: str, message: str) -> None:
        """Write a log message."""
        if self._enabled:
            self.event("log", level=level, message=message)

    def event(self, event: str, **values: Any) -> None:
        """Write one event."""
        print(json.dumps({"event": event} | values), flush=True)

    def close(self) -> None:
        """Nothing is open."""


Display = ProgressLine | JsonEvents


@contextmanager
def logging_to(display: Display, *, level: int, own_level: int) -> Iterator[None]:
    """Send log messages to a display for the length of the block.

    `own_level` is for this package's messages, `level` for those of all others.
    """
    handler = logging.Handler()
    handler.emit = lambda record: display.say(record.levelname.lower(), record.getMessage())  # type: ignore[method-assign]
    root, own = logging.getLogger(), logging.getLogger("mone_export")
    before = root.level, own.level
    root.setLevel(level)
    own.setLevel(own_level)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before[0])
        own.setLevel(before[1])


def peak_memory() -> int | None:
    """Return the most memory this process has had resident so far, in bytes; None where that is not known."""
    if getrusage is None:
        return None
    peak: int = getrusage(RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Stage:
    """A stage, from its first step on: what is done, what is counted, and how fast."""

    def __init__(self, what: str, done: int, now: float) -> None:
        self.what = what
        name, _, unit = what.partition(" (")
        self.unit, _, manner = unit.removesuffix(")").partition(", ")
        self.name = f"{name} {manner}" if manner else name
        self.start = now
        self.ended = False
        self._first = done

    def rate(self, done: int, now: float) -> float | None:
        """Return the units per second since the first step."""
        seconds = now - self.start
        return (done - self._first) / seconds if seconds > 0.2 and done > self._first else None

    def line(self, done: int, total: int, now: float) -> str:
        """Say how far it is, without a bar."""
        return "  ".join((self.name, *self._figures(done, total, now)))

    def bar(self, done: int, total: int, now: float, width: int) -> str:
        """Draw how far it is, as wide a bar as fits into `width`."""
        figures = "  ".join(self._figures(done, total, now))
        room = min(_WIDEST_BAR, width - len(self.name) - len(figures) - 11)
        if not total or room < 5:
            return f"{self.name}  {figures}".rstrip()
        filled = min(room, room * done // total)
        return f"{self.name} {done / total:4.0%} {_bar(filled, room - filled)} {figures}"

    def _figures(self, done: int, total: int, now: float) -> Iterator[str]:
        if not total:
            return
        yield f"{done}/{total} {self.unit}".rstrip()
        if rate := self.rate(done, now):
            yield f"{rate:.0f}/s" if rate >= 10 else f"{rate:.2g}/s"
            yield f"{_duration((total - done) / rate)} left" if done < total else _duration(now - self.start)
        if peak := peak_memory():
            yield f"peak {peak / 1e9:.1f} GB"


def _bar(filled: int, empty: int) -> str:
    full, rest = ("█", "░") if "utf" in (sys.stderr.encoding or "").lower() else ("#", ".")
    return full * filled + rest * empty


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
