"""What the console commands show while they work: a bar on a terminal, lines elsewhere, or events as JSON.

A display is called with every step (`runtime.Progress`), where "calibrating (tokens)" is the stage and what
is counted; it takes log messages with `say`, which do not disturb the bar. `steady_output` is for the whole
of a command: no report is worth failing for when the file is made.
"""

import errno
import io
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from mone_export.errors import MoneError

try:
    from resource import RUSAGE_SELF, getrusage
except ImportError:  # Windows
    getrusage = None  # type: ignore[assignment]

_BETWEEN_FRAMES = 0.1  # seconds
_BETWEEN_LINES = 30.0
_BETWEEN_EVENTS = 1.0


class ProgressLine:
    """Draws on stderr: one bar that moves on a terminal, a line now and then elsewhere.

    When a stage is over, its line stays only where it is no bar, or with `verbose`.
    """

    def __init__(self, *, enabled: bool = True, verbose: bool = False) -> None:
        """Start with nothing drawn; `enabled=False` never draws."""
        self._enabled = enabled
        self._live = sys.stderr.isatty()
        self._kept = verbose or not self._live
        self._steps = _Steps(_BETWEEN_FRAMES if self._live else _BETWEEN_LINES, first=self._live)
        self._drawn = False

    def __call__(self, done: int, total: int, what: str) -> None:
        """Show a step; a `total` of 0 means that it is unknown."""
        if not self._enabled or (stage := self._steps.due(done, total, what)) is None:
            return
        if not self._live:
            print(stage.line(done, total), file=sys.stderr, flush=True)
            return
        kept, width = stage.ended and self._kept, shutil.get_terminal_size().columns - 1
        text = stage.line(done, total, width=width, bar=not kept)
        print(f"\r\x1b[K{text}", end="\n" if kept else "", file=sys.stderr, flush=True)
        self._drawn = not kept

    def say(self, _level: str, message: str) -> None:
        """Print a message above the bar, which is drawn again at the next step."""
        self.close()
        print(message, file=sys.stderr, flush=True)
        if self._live:
            self._steps.hurry()

    def close(self) -> None:
        """Take the bar away."""
        if self._drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._drawn = False


class JsonEvents:
    """Writes one JSON object per line to stdout: `progress` and `log` events; `event` writes any other."""

    def __init__(self, *, enabled: bool = True) -> None:
        """Start with nothing written; `enabled=False` leaves progress and messages out."""
        self._enabled = enabled
        self._steps = _Steps(_BETWEEN_EVENTS, first=True)

    def __call__(self, done: int, total: int, what: str) -> None:
        """Write a step: the first and the last of a stage, and one a second."""
        if not self._enabled or (stage := self._steps.due(done, total, what)) is None:
            return
        rate = stage.rate(done)
        self.event(
            "progress",
            stage=stage.name,
            unit=stage.unit,
            done=done,
            total=total,
            seconds=round(stage.seconds, 3),
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


def printable(text: str) -> str:
    """Return a line without what a file's own words could do to a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def as_size(n_byte: int) -> str:
    """Return a size in the unit that suits it, in powers of 1000 and with three digits."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = next((power for power in range(len(units)) if n_byte < 999.5 * 1000**power), len(units) - 1)
    value = n_byte / 1000**power
    n_digit = 0 if power == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{n_digit}f} {units[power]}"


def peak_memory() -> int | None:
    """Return the most memory this process has had resident so far, in bytes; None where that is not known."""
    if getrusage is None:
        return None
    peak: int = getrusage(RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def steady_output() -> Iterator["Output"]:
    """Go on whatever happens to stdout or stderr: a closed pipe, a full disk, a narrow encoding.

    Yields what stands for stdout meanwhile.
    """
    before = sys.stdout, sys.stderr
    streams = [Output(stream) for stream in before]
    sys.stdout, sys.stderr = streams
    try:
        yield streams[0]
    finally:
        for stream in streams:
            stream.detach_broken()
        sys.stdout, sys.stderr = before


class Output(io.TextIOBase):
    """A text stream that does not fail: what it cannot encode becomes `?`, what it cannot write is lost.

    `lost` is the error with which that began.
    """

    encoding = "ascii"

    def __init__(self, stream: TextIO | None) -> None:
        """Stand for `stream`; None, a stream closed before the start, loses nothing that anybody awaits."""
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None) or "ascii"
        self.lost: OSError | None = None
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        """Write, unless something was lost before."""
        if self._stream and self.lost is None:
            try:
                self._stream.write(text)
            except OSError as error:
                self.lost = error
        return len(text)

    def flush(self) -> None:
        """Pass on what was written so far."""
        if self._stream and self.lost is None:
            try:
                self._stream.flush()
            except OSError as error:
                self.lost = error

    def isatty(self) -> bool:
        """Say whether a person watches."""
        return bool(self._stream and self._stream.isatty())

    def check(self) -> None:
        """Raise MoneError if lines are lost for another reason than that the reader went away (`| head`)."""
        self.flush()
        # Windows says of a closed pipe that an argument is invalid
        gone = errno.EINVAL if sys.platform == "win32" else errno.EPIPE
        if self.lost and not isinstance(self.lost, BrokenPipeError) and self.lost.errno != gone:
            raise MoneError(f"cannot print the result ({self.lost.strerror}): free some space where it goes")

    def detach_broken(self) -> None:
        """Flush; point what is broken at nothing, since Python flushes at its end, too, and would fail."""
        self.flush()
        if self.lost and self._stream:
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


class _Steps:
    """Says which steps are shown: the last of a stage, and one every so often."""

    def __init__(self, between: float, *, first: bool) -> None:
        """`between` steps shown lie so many seconds; `first`: that of a stage is, too."""
        self._between, self._first = between, first
        self._stage: _Stage | None = None
        self._next = 0.0

    def due(self, done: int, total: int, what: str) -> "_Stage | None":
        """Return the stage if this step is to be shown."""
        now = time.monotonic()
        if self._stage is None or what != self._stage.what:
            self._stage = _Stage(what, done, now)
            self._next = now if self._first or not total else now + self._between
        self._stage.seconds = now - self._stage.start
        ended = 0 < total <= done
        if self._stage.ended or (now < self._next and not ended):
            return None
        self._stage.ended = ended
        self._next = now + self._between
        return self._stage

    def hurry(self) -> None:
        """Show the next step, whenever it comes."""
        self._next = 0.0


class _Stage:
    """A stage, from its first step on: what is done, what is counted, and how fast."""

    def __init__(self, what: str, done: int, now: float) -> None:
        self.what = what
        name, _, unit = what.partition(" (")
        self.unit, _, manner = unit.removesuffix(")").partition(", ")
        self.name = f"{name} {manner}" if manner else name
        self.start = now
        self.seconds = 0.0  # until the latest step
        self.ended = False
        self._first = done

    def rate(self, done: int) -> float | None:
        """Return the units per second since the first step."""
        return (done - self._first) / self.seconds if self.seconds > 0.2 and done > self._first else None

    def line(self, done: int, total: int, *, width: int | None = None, bar: bool = False) -> str:
        """Say how far it is, with a bar or without, in at most `width` characters."""
        from tqdm import tqdm  # `--help` does without

        rate, peak = self.rate(done), peak_memory()
        figures = f"  {{n_fmt}}/{{total_fmt}} {self.unit}".rstrip()
        if rate:
            until = "{elapsed}" if self.ended else "{remaining} left"
            figures += f"  {rate:.0f}/s  {until}" if rate >= 10 else f"  {rate:.2g}/s  {until}"
        figures += f"  peak {as_size(peak)}" if peak else ""
        shape = "{desc} {percentage:3.0f}% {bar}" if bar else "{desc}"
        line: str = tqdm.format_meter(
            done,
            total,
            self.seconds,
            ncols=width,
            prefix=self.name,
            rate=rate,
            ascii="utf" not in (sys.stderr.encoding or "").lower(),
            bar_format=shape + figures if total else "{desc}",
        )
        return line
