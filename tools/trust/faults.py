#!/usr/bin/env python3
"""Exports that are killed, starved and robbed at random moments: what is left and said, what a re-run does.

    python tools/trust/faults.py [--trials 60] [--controls 3] [--seed 0] [-o FILE.json]

A small random model goes all three roads: in memory, layer by layer, as a GGUF. After each trial: the old
output is whole, or the new one is; statistics and inputs are intact; only a killed run leaves temporary
files; a failure is one line; the same command once more gives the bytes of an undisturbed run, and takes the
temporary files away. Half of the kills and limits wait until the file is being written. `--without
rename|sweep|lines` takes one protection away in the exports, to show that the trials can fail. Prints its
figures as JSON; returns 1 where a check failed. It forks, mounts a small disk, and so runs as root on Linux.
"""

import argparse
import hashlib
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from disturbances import Change, at_the_writing, disk, limits, one_of_two, protections, touched
from figures import keep
from power import unflushed

ROADS: Mapping[str, tuple[str, ...]] = {
    "in memory": ("model", "--stream", "off"),
    "streamed": ("model", "--stream", "on", "--novice", "mean"),
    "gguf": ("model.gguf",),
}
KILLS = {"killed": [9], "terminated": [15], "interrupted twice": [2, 2], "killed and resumed": [9]}
KILLS |= {"killed while rounding": [9]}
KILLED = ("killed", "killed and resumed", "killed while rounding", "rank killed")
FAULTS = (
    *(*KILLS, "rank killed"),
    *("file size limit", "full disk", "output folder removed", "source truncated", "memory limit"),
    *("llama-quantize fails", "llama-quantize killed", "cache not writable", "two at once"),
    *("two in a work folder", "clock set back", "power cut"),
)
CONTROLS = {
    "rename": "file size limit",
    "sweep": "killed",
    "lines": "llama-quantize fails",
    "flush": "power cut",
}
"""Which fault shows that a protection is missing."""
OPTIONS = ("--ratio", "0.5", "-f", "text.txt", "--chunks", "8", "-c", "64", "-q", "--overwrite")
OUTPUTS = ("-o", "out/model.gguf", "--stats", "kept/stats", "--plan-out", "kept/plan.json")
MORE = {"quantized": ("--outtype", "q4_0"), "kept": ("--workdir", "work")}
PATIENCE = 300  # seconds, of a run that hangs

Hashes = dict[str, str]


@dataclass(frozen=True)
class Known:
    """What undisturbed runs of a road leave: output, statistics (before and with sensitivities), seconds."""

    output: bytes
    stats: frozenset[bytes]
    last_stats: bytes
    seconds: float


@dataclass
class Trial:
    """One export that something happens to, in a folder of its own."""

    road: str
    fault: str
    dice: random.Random
    folder: Path
    known: Known
    old: bytes
    without: str | None
    ended: tuple[int, ...] = ()  # how the disturbed export or exports did

    def run(self) -> list[str]:
        """Run it, and return what is wrong afterwards."""
        has_stats = self.dice.random() < 0.3
        if has_stats:
            (self.folder / "kept" / "stats").write_bytes(self.known.last_stats)
        if self.fault == "clock set back":
            touched(self.folder)
        before, wrong = hashes(self.folder), []
        room = disk(self.folder / "out", self.dice, len(self.known.output))
        with room if self.fault == "full disk" else nullcontext():
            ends = self._disturbed()
            if any(status is None for status, _ in ends):
                return ["it hangs"]
            self.ended = tuple(int(status or 0) for status, _ in ends)
            wrong += list(self._left(self.ended, has_stats))
            for status, (_, said) in zip(self.ended, ends, strict=True):
                wrong += list(self._told(status, said))
            wrong += [f"{name} changed" for name in self._inputs(before) if self.fault != "source truncated"]
        wrong += unflushed(self.folder.with_suffix(".unflushed"))
        return wrong + list(self._again())

    def _again(self) -> Iterator[str]:
        """Run the same command once more, without the fault; yields what is wrong then."""
        (self.folder / "out").mkdir(exist_ok=True)
        if self.fault == "source truncated":
            self._restore()
        for status, said in [finished(run) for run in self.begin()]:
            if status != 0:
                yield f"a re-run ends with {status}: {said[-200:]}"
        if self.output() != self.known.output:
            yield "a re-run gives other bytes"
        rest = [path.name for path in (self.folder / "out").iterdir() if path.name != "model.gguf"]
        for folder in ("kept", "work"):
            rest += [path.name for path in (self.folder / folder).glob("*.part")]
        yield from (f"a re-run leaves {name.split('.')[0]}...part" for name in rest)

    def _disturbed(self) -> list[tuple[int | None, str]]:
        """Start the exports, let the fault happen, wait; returns how each ended, and what it said."""
        delay = self.dice.uniform(0, 1.05) * self.known.seconds
        changes, signals = limits(self.fault, self.dice, self.folder), KILLS.get(self.fault, ())
        if self.dice.random() < 0.5 and (signals or self.fault == "file size limit"):
            changes, signals = [partial(at_the_writing, self.dice.uniform(0, 0.2), signals, changes)], ()
        runs = self.begin(changes)
        if self.fault.startswith("two "):
            runs += self.begin(changes)
        waits = (*KILLS, "output folder removed", "source truncated", "rank killed")
        time.sleep(delay if self.fault in waits else 0)
        for number in signals:
            with suppress(ProcessLookupError):
                os.kill(runs[0][0], number)
            time.sleep(0.03)
        if self.fault == "rank killed":
            self._kill_one(runs)
        if self.fault == "output folder removed":
            shutil.rmtree(self.folder / "out", ignore_errors=True)
        if self.fault == "source truncated":
            for file in self._weights():
                os.truncate(file, self.dice.randrange(file.stat().st_size))
        return [finished(run) for run in runs]

    def _kill_one(self, runs: Sequence[tuple[int, Path]]) -> None:
        """Kill one of the processes that share the rows, and end the other as torchrun does then."""
        one = self.dice.randrange(2)
        for (process, _), number in ((runs[one], signal.SIGKILL), (runs[1 - one], signal.SIGTERM)):
            os.kill(process, number)  # one that has ended is a process until it is waited for
            time.sleep(0.1)  # torchrun looks as often

    def begin(self, changes: Sequence[Change] = ()) -> list[tuple[int, Path]]:
        """Start the command: one process, or two that share the rows."""
        if self.fault != "rank killed":
            return [self._start(changes)]
        meeting = self.folder.with_suffix(f".{time.monotonic_ns()}.meeting")
        return [self._start([*changes, partial(one_of_two, rank, meeting)]) for rank in range(2)]

    def _start(self, changes: Sequence[Change]) -> tuple[int, Path]:
        """Fork an export; returns its process and the file that has what it says."""
        model, *own = ROADS[self.road]
        more = MORE.get(kind_of(self.fault), ())
        log = self.folder.with_suffix(f".{time.monotonic_ns()}.log")
        if number := os.fork():
            return number, log
        status = 70
        try:
            os.chdir(self.folder)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with log.open("wb") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            for change in (*changes, *protections(self.without)):
                change()
            from mone_export.cli import main as export

            status = export([model, *own, *more, *OPTIONS, *OUTPUTS])
            sys.stdout.flush()
        except BaseException as error:  # of a child nothing must come back into this program
            print(f"Traceback: {error!r}", file=sys.stderr)
        finally:
            with suppress(BaseException):
                sys.stderr.flush()
            os._exit(status)

    def _left(self, statuses: Sequence[int], has_stats: bool) -> Iterator[str]:
        """Yield what is wrong with what the run has left."""
        killed = any(status < 0 for status in statuses)
        found, gone = self.output(), not (self.folder / "out").is_dir()
        if self.fault != "output folder removed":
            if gone or found not in (self.old, self.known.output):
                yield "the output is neither the old one nor the new one"
            if statuses == (0,) and found != self.known.output:
                yield "it says that all is well and the output is the old one"
        elif found not in (None, self.known.output):
            yield "half an output"
        for folder in ("out", "kept"):
            there = (self.folder / folder).iterdir() if (self.folder / folder).is_dir() else ()
            rest = [path.name for path in there if path.name not in ("model.gguf", "stats", "plan.json")]
            if rest and not killed:
                yield f"temporary files in {folder}"
        stats = self.folder / "kept" / "stats"
        if stats.exists() and stats.read_bytes() not in self.known.stats:
            yield "statistics that are not whole"
        if has_stats and not stats.exists():
            yield "the statistics are gone"

    def _told(self, status: int, said: str) -> Iterator[str]:
        """Yield what is wrong with how a run has ended, and what it has said."""
        if status not in (0, 1, 130, 143) and status >= 0:
            yield f"it ends with {status}"
        if status < 0 and not (self.fault in KILLED and status == -signal.SIGKILL):
            yield f"a signal ends it: {signal.Signals(-status).name}"
        errors = [line for line in said.splitlines() if line.startswith("mone-export: ")]
        if status > 0 and len(errors) != 1:
            yield f"not one line: {said[-300:]}"
        if any(word in said for word in ("Traceback", "unexpected ", "Exception ignored")):
            yield f"no message for a user: {said[-300:]}"

    def _inputs(self, before: Hashes) -> list[str]:
        now = hashes(self.folder)
        return [
            name
            for name in before
            if not name.startswith(("out/", "kept/", "work/")) and now.get(name) != before[name]
        ]

    def output(self) -> bytes | None:
        """Return the output, if there is one."""
        file = self.folder / "out" / "model.gguf"
        return file.read_bytes() if file.is_file() else None

    def _weights(self) -> list[Path]:
        source = self.folder / ROADS[self.road][0]
        return [source] if source.is_file() else list(source.glob("*.safetensors"))

    def _restore(self) -> None:
        for file in self._weights():
            shutil.copyfile(self.folder.parent / "sound" / file.relative_to(self.folder), file)


def kind_of(fault: str) -> str:
    """Return what sets the exports of a fault apart: other options, or two processes."""
    if fault.startswith("llama-quantize") or fault == "killed while rounding":
        return "quantized"
    if fault == "rank killed":
        return "shared out"
    return "kept" if fault in ("killed and resumed", "two in a work folder") else ""


def finished(run: tuple[int, Path]) -> tuple[int | None, str]:
    """Wait for a run: (status, negative for a signal; None where it hangs, what it said)."""
    number, log = run
    for _ in range(PATIENCE * 50):
        found, status = os.waitpid(number, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), log.read_text(errors="replace") if log.exists() else ""
        time.sleep(0.02)
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)
    return None, log.read_text(errors="replace")


def hashes(folder: Path) -> Hashes:
    """Return the SHA-256 of every file in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def prepared(folder: Path) -> Path:
    """Make the sound inputs, which every trial gets a copy of."""
    from fixed_text import fixed_text
    from tiny import save_small

    from mone_export.pipeline import export

    sound = folder / "sound"
    for name in ("out", "kept"):
        (sound / name).mkdir(parents=True)
    save_small(sound / "model")
    (sound / "text.txt").write_text(fixed_text()[:40_000], encoding="utf-8")
    export(sound / "model", ratio=0, outfile=sound / "model.gguf")
    export(sound / "model", ratio=0.25, method="drop", score="random", outfile=sound / "out" / "model.gguf")
    return sound


def undisturbed(sound: Path, road: str, fault: str) -> Known:
    """Run a road once without a fault, and learn what it leaves."""
    folder = sound.parent / "known"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder)
    trial = Trial(road, fault, random.Random(0), folder, Known(b"", frozenset(), b"", 0.0), b"", None)
    start = time.monotonic()
    for status, said in [finished(run) for run in trial.begin()]:
        if status:
            raise SystemExit(f"{road} fails by itself: {said}")
    output, last = trial.output(), (folder / "kept" / "stats").read_bytes()
    assert output is not None
    return Known(output, frozenset({last, *first_stats(last, folder)}), last, time.monotonic() - start)


def first_stats(last: bytes, folder: Path) -> Iterator[bytes]:
    """Yield the statistics as they are before the sensitivities are known."""
    from dataclasses import replace

    from mone_export.artifacts import Calibration

    (folder / "last").write_bytes(last)
    replace(Calibration.load(folder / "last"), sensitivity={}).save(folder / "first")
    yield (folder / "first").read_bytes()


class Trials:
    """Trials one after the other, of each fault on each road in turn, and what came of them."""

    def __init__(self, place: Path, seed: int) -> None:
        """Make the inputs in a folder."""
        self._dice, self._sound = random.Random(seed), prepared(place)
        self._old = (self._sound / "out" / "model.gguf").read_bytes()
        self._known: dict[tuple[str, str], Known] = {}
        self._number = 0

    def run(
        self, faults: Sequence[str], n: int, *, without: str | None = None, until: float = math.inf
    ) -> dict[str, Any]:
        """Run `n` trials, or those that begin before `until` on the monotonic clock; return their figures."""
        counts, ends, failed = Counter[str](), Counter[str](), list[dict[str, Any]]()
        for number in range(n):
            if time.monotonic() > until:
                break
            fault, turn = faults[number % len(faults)], number // len(faults)
            roads = [road for road in ROADS if fault != "rank killed" or road != "gguf"]  # it has no ranks
            trial = self._trial(roads[turn % len(roads)], fault, without)
            wrong = trial.run()
            counts[f"{fault}, {trial.road}"] += 1
            ends.update(map(str, trial.ended))
            failed += [{"trial": number, "road": trial.road, "fault": fault, "wrong": wrong}] if wrong else []
            print(f"{number + 1}/{n} {trial.road}, {fault}: {wrong or 'fine'}", file=sys.stderr, flush=True)
            for path in self._sound.parent.glob(f"{trial.folder.name}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        figures = {"trials": sum(counts.values()), "failed": len(failed), "ended_with": dict(ends)}
        return figures | {"by_fault": dict(counts), "failures": failed}

    def _trial(self, road: str, fault: str, without: str | None) -> Trial:
        kind = road, kind_of(fault)
        if kind not in self._known:
            self._known[kind] = undisturbed(self._sound, road, fault)
        self._number += 1
        folder = self._sound.parent / f"trial-{self._number:04}"
        shutil.copytree(self._sound, folder)
        return Trial(road, fault, self._dice, folder, self._known[kind], self._old, without)


def main() -> int:
    """Run the trials; returns 1 where a check failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no trial after so many")
    parser.add_argument("--controls", type=int, default=0, help="trials without each of the protections")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without", choices=CONTROLS)
    parser.add_argument("--fault", choices=FAULTS, action="append", help="only this one, repeatable")
    parser.add_argument("-o", type=Path, dest="out", help="keep the figures in this file, too")
    args = parser.parse_args()
    until = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as place:
        trials = Trials(Path(place), args.seed)
        controls = {
            name: trials.run([fault], args.controls, without=name)
            for name, fault in CONTROLS.items()
            if args.controls
        }
        found = trials.run(args.fault or FAULTS, args.trials, without=args.without, until=until)
    figures = {"seed": args.seed, "without": args.without, **found, "controls": {}}
    figures["controls"] = {
        name: {"fault": CONTROLS[name], "trials": control["trials"], "failed": control["failed"]}
        for name, control in controls.items()
    }
    keep("faults", figures, args.out)
    return int(found["failed"] > 0 or not all(control["failed"] for control in controls.values()))


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)  # which a forked process keeps

    sys.exit(main())
