"""What is drawn when: bars on a terminal, lines elsewhere, events for programs; messages above the bar."""

import errno
import io
import json
import logging
import os
import pty
import re
import shlex
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from mone_export import cli, terminal
from mone_export.errors import MoneError
from mone_export.terminal import JsonEvents, Output, ProgressLine, as_size, logging_to, steady_output


class Screen(io.StringIO):
    """A stderr that is a terminal, or not, and of some encoding."""

    def __init__(self, *, live: bool, encoding: str = "utf-8") -> None:
        super().__init__()
        self._live, self._encoding = live, encoding

    @property
    def encoding(self) -> str:
        return self._encoding

    def isatty(self) -> bool:
        return self._live

    def lines(self) -> list[str]:
        """What a terminal shows: a carriage return and the erasure begin the line anew."""
        return [line.rpartition("\r\x1b[K")[2] for line in self.getvalue().split("\n")]


class Clock:
    """Time that passes when told."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr(terminal, "peak_memory", lambda: 1_234_000_000)
    return clock


def screen(
    monkeypatch: pytest.MonkeyPatch, *, live: bool, encoding: str = "utf-8", columns: int = 100
) -> Screen:
    found = Screen(live=live, encoding=encoding)
    monkeypatch.setattr(sys, "stderr", found)
    monkeypatch.setenv("COLUMNS", str(columns))
    return found


def test_bar_has_share_count_rate_time_and_memory(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    shown = screen(monkeypatch, live=True)
    line = ProgressLine()
    line(0, 40000, "calibrating (tokens)")
    clock.now += 10
    line(10000, 40000, "calibrating (tokens)")
    (text,) = shown.lines()
    bar = re.search(r"% (█+\S? *)  1", text)
    assert bar and text.replace(bar[1], "BAR") == (
        "calibrating  25% BAR  10000/40000 tokens  1000/s  00:30 left  peak 1.23 GB"
    )
    assert text.count("█") == pytest.approx(len(bar[1]) / 4, abs=1) and len(text) == 99
    line.close()
    assert shown.lines() == [""]


@pytest.mark.parametrize("columns", [20, 60, 100, 200])
def test_bar_never_wraps(monkeypatch: pytest.MonkeyPatch, clock: Clock, columns: int) -> None:
    shown = screen(monkeypatch, live=True, columns=columns)
    line = ProgressLine()
    for done in (0, 1, 999_999, 1_000_000):
        line(done, 1_000_000, "calibrating (tokens, layer by layer)")
        clock.now += 5000
        assert len(shown.lines()[-1]) < columns
    line(0, 0, "waiting for another process that works in " + "a long folder/" * 20)
    assert len(shown.lines()[-1]) < columns
    assert ("█" in shown.getvalue()) == (columns > 20)


def test_terminal_without_unicode_gets_signs(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    shown = screen(monkeypatch, live=True, encoding="ascii")
    ProgressLine()(1, 2, "writing (MiB)")
    assert "###" in shown.getvalue() and shown.getvalue().isascii()


def test_frames_are_a_tenth_of_a_second_apart(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    shown = screen(monkeypatch, live=True)
    line = ProgressLine()
    for done in range(100):
        line(done, 1000, "writing (MiB)")
        clock.now += 0.01
    assert shown.getvalue().count("\r") == pytest.approx(10, abs=1)


@pytest.mark.parametrize("verbose", [False, True])
def test_finished_stage_leaves_a_line_only_with_verbose(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, verbose: bool
) -> None:
    shown = screen(monkeypatch, live=True)
    line = ProgressLine(verbose=verbose)
    for what in ("loading", "writing (MiB)"):
        for done in (0, 5, 10, 10):
            line(done, 10, what)
            clock.now += 1
    line.close()
    left = [text for text in shown.lines() if text]
    assert left == (
        ["loading  10/10  5/s  00:02  peak 1.23 GB", "writing  10/10 MiB  5/s  00:02  peak 1.23 GB"]
        if verbose
        else []
    )


def test_no_bar_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    shown = screen(monkeypatch, live=False)
    line = ProgressLine()
    for second in range(101):
        line(second, 100, "calibrating (tokens)")
        clock.now += 1
    line.close()
    assert [text.split("  ")[1] for text in shown.getvalue().splitlines()] == [
        "30/100 tokens",
        "60/100 tokens",
        "90/100 tokens",
        "100/100 tokens",
    ]
    assert not {"\r", "\x1b", "█"} & set(shown.getvalue())


def test_quiet_draws_nothing(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    shown = screen(monkeypatch, live=True)
    line = ProgressLine(enabled=False)
    line(1, 2, "writing (MiB)")
    line.close()
    assert not shown.getvalue()


def test_messages_stand_above_the_bar(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    shown = screen(monkeypatch, live=True)
    line = ProgressLine()
    log = logging.getLogger("mone_export.test")
    with logging_to(line, level=logging.ERROR, own_level=logging.INFO):
        line(1, 4, "writing (MiB)")
        log.info("%d things", 3)
        log.debug("hidden")
        logging.getLogger("other").info("hidden")
        line(2, 4, "writing (MiB)")
    assert shown.lines()[0] == "3 things" and "2/4 MiB" in shown.lines()[1]
    log.info("no longer")
    assert "no longer" not in shown.getvalue()


def test_events_are_one_json_object_a_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    events = JsonEvents()
    for second in range(41):
        events(second * 100, 4000, "calibrating (tokens, layer by layer)")
        clock.now += 0.25
    events.say("info", "é")
    first, *others, last, log = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["event"], first["stage"], first["unit"]) == (
        "progress",
        "calibrating layer by layer",
        "tokens",
    )
    assert first["done"] == 0 and first["per_second"] is None
    assert [event["done"] for event in others] == list(range(400, 4000, 400))
    assert last["done"] == last["total"] == 4000 and last["per_second"] == 400 and last["seconds"] == 10
    assert others[0]["seconds_left"] == 9 and last["peak_bytes"] == 1_234_000_000
    assert log == {"event": "log", "level": "info", "message": "é"}


REPORT = """
import sys
from mone_export.errors import MoneError
from mone_export.terminal import steady_output
with steady_output() as out:
    print("model über 16 experts — gekürzt \\udce4" * int(sys.argv[1]))
    try:
        out.check()
    except MoneError as error:
        print(error, file=sys.stderr)
"""


def report(stdout: object, *, lines: int = 1, **env: str) -> "subprocess.CompletedProcess[bytes]":
    """A process of its own that prints, and says on stderr what its `check` says."""
    command = [sys.executable, "-c", REPORT, str(lines)]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env=os.environ | env)


@pytest.mark.parametrize("lines", [1, 10_000])
def test_full_disk_behind_stdout_is_said_and_fails_nothing(lines: int) -> None:
    with Path("/dev/full").open("wb") as full:
        done = report(full, lines=lines)
    assert (done.returncode, done.stderr.decode()) == (
        0,
        "cannot print the result (No space left on device): free some space where it goes\n",
    )


@pytest.mark.parametrize("lines", [1, 10_000])
def test_reader_that_went_away_is_no_error(lines: int) -> None:
    """As in `| head`."""
    read, write = os.pipe()
    os.close(read)
    done = report(write, lines=lines)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_an_encoding_lacks_becomes_a_question_mark(encoding: str) -> None:
    done = report(subprocess.PIPE, PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and done.stderr == b""
    assert (
        done.stdout.decode(encoding).replace("ü", "?").replace("—", "?")
        == "model ?ber 16 experts ? gek?rzt ?\n"
    )


def test_closed_streams_are_no_error() -> None:
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(REPORT)} 1 >&- 2>&-"
    assert subprocess.run(command, shell=True).returncode == 0


def test_streams_are_as_before_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with pytest.raises(MoneError), steady_output():
        print("said")
        print("noted", file=sys.stderr)
        raise MoneError("wrong")
    assert before == (sys.stdout, sys.stderr) and capsys.readouterr() == ("said\n", "noted\n")


@pytest.fixture
def arguments(small: Path, text: Path, tmp_path: Path) -> list[str]:
    output = str(tmp_path / "x.gguf")
    return [str(small), "--ratio", "0.5", "-f", str(text), "--chunks", "8", "-c", "32", "-o", output]


class Unwritable(io.StringIO):
    """A stream that the system refuses to write to."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, _text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize(
    ("platform", "number", "fine"),
    [
        ("linux", errno.EPIPE, True),
        ("linux", errno.EINVAL, False),
        ("linux", errno.ENOSPC, False),
        ("win32", errno.EINVAL, True),
        ("win32", errno.ENOSPC, False),
    ],
)
def test_a_reader_that_went_away_is_no_error(
    platform: str, number: int, fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mone_export.terminal.sys", SimpleNamespace(platform=platform))
    output = Output(Unwritable(number))
    output.write("lost")
    with nullcontext() if fine else pytest.raises(MoneError, match="cannot print the result"):
        output.check()


@pytest.mark.parametrize(
    ("n_byte", "shown"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (9_994_999, "9.99 MB"),
        (9_995_000, "10.0 MB"),
        (99_950_001, "100 MB"),
        (999_499_999, "999 MB"),
        (999_500_000, "1.00 GB"),
        (15 * 10**15, "15000 TB"),
    ],
)
def test_sizes_have_three_digits(n_byte: int, shown: str) -> None:
    assert as_size(n_byte) == shown


def test_export_as_events(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    events = [json.loads(line) for line in captured.out.splitlines()]
    assert {event["event"] for event in events[:-1]} == {"progress", "log"}
    report = events[-1]
    assert report["event"] == "report" and report["outfile"] == arguments[-1]
    assert report["size"] == Path(arguments[-1]).stat().st_size
    assert list(report["n_kept"]) == ["0", "1", "2"] == list(report["fates"])
    assert [sum(fates.values()) for fates in report["fates"].values()] == [16, 16, 16]
    assert [fates.get("whole", 0) for fates in report["fates"].values()] == [*report["n_kept"].values()]
    assert sum(report["parts"][0]["sources"].values()) == 256
    assert not captured.err


def test_quiet_events_are_the_last_one_only(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*arguments, "--json", "-q", "--dry-run"]) == 0
    (plan,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert plan["event"] == "plan" and plan["pruned"] is None and plan["n_kept"] is None, "not known yet"
    assert cli.main([*arguments, "--json", "-q", "--dry-run", "--allocate", "even"]) == 0
    assert json.loads(capsys.readouterr().out)["n_kept"] == {"0": 8, "1": 8, "2": 8}
    assert cli.main([*arguments, "--json", "-q", "--ratio", "7"]) == 1
    captured = capsys.readouterr()
    (error,) = map(json.loads, captured.out.splitlines())
    assert error["event"] == "error" and error["status"] == 1 and "--ratio 7" in error["message"]
    assert captured.err == f"mone-export: {error['message']}\n"


@pytest.mark.slow
def test_a_real_terminal_is_left_clean(arguments: list[str]) -> None:
    """A process of its own on a pseudo-terminal: messages stay, bars go, the report follows."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "mone_export", *arguments]
    with subprocess.Popen(command, stdout=follower, stderr=follower) as process:
        os.close(follower)
        data = b""
        while True:
            try:
                chunk = os.read(leader, 65536)
            except OSError:  # the other end is closed
                break
            data += chunk
        assert process.wait() == 0
    os.close(leader)
    text = data.decode().replace("\r\n", "\n")
    assert "\r\x1b[K" in text
    shown = [line.rpartition("\r\x1b[K")[2] for line in text.split("\n")]
    assert [line for line in shown if "%" in line and "size" not in line] == []
    assert "loaded small as torch.float32 on cpu" in shown
    assert shown[shown.index(f"wrote {arguments[-1]}") + 1].endswith(" in 3 layers")
