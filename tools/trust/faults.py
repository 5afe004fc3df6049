#!/usr/bin/env python3
"""Exports that are killed, starved and robbed at random moments: what is left and said, what a re-run does.

    python tools/trust/faults.py [--trials 60] [--seed 0] [--without PROTECTION] [-o FILE.json]

A small random model goes all three roads: in memory, layer by layer, as a GGUF. After each trial: the old
output is whole, or the new one is; statistics and inputs are intact; only a killed run leaves temporary
files; a failure is one line; the same command once more gives the bytes of an undisturbed run, and takes the
temporary files away. Half of the kills and limits wait until the file is being written. `--without
rename|sweep|lines` takes one protection away in the exports, to show that the trials can fail. Prints its
figures as JSON; returns 1 where a check failed. It forks, mounts a small disk, and so runs as root on Linux.
"""

import argparse
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any

from figures import keep

ROADS: Mapping[str, tuple[str, ...]] = {
    "in memory": ("model", "--stream", "off"),
    "streamed": ("model", "--stream", "on", "--novice", "mean"),
    "gguf": ("model.gguf",),
}
KILLS = {"killed": [9], "terminated": [15], "interrupted twice": [2, 2]}
FAULTS = (
    *KILLS,
    *("file size limit", "full disk", "output folder removed", "source truncated", "memory limit"),
    *("llama-quantize fails", "llama-quantize killed", "cache not writable", "two at once"),
)
OPTIONS = ("--ratio", "0.5", "-f", "text.txt", "--chunks", "8", "-c", "64", "-q", "--overwrite")
OUTPUTS = ("-o", "out/model.gguf", "--stats", "kept/stats", "--plan-out", "kept/plan.json")
PATIENCE = 180  # seconds, of a run that hangs

Change = Callable[[], None]
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
        before, wrong = hashes(self.folder), []
        with disk(self.folder / "out", self) if self.fault == "full disk" else nullcontext():
            statuses, said = self._disturbed()
            if statuses is None:
                return ["it hangs"]
            self.ended = tuple(statuses)
            wrong += list(self._left(statuses, has_stats))
            wrong += list(self._told(statuses, said))
            wrong += [f"{name} changed" for name in self._inputs(before) if self.fault != "source truncated"]
        (self.folder / "out").mkdir(exist_ok=True)
        if self.fault == "source truncated":
            self._restore()
        status, said = finished(self._start(()))
        if status != 0:
            wrong.append(f"a re-run ends with {status}: {said[-200:]}")
        elif self._output() != self.known.output:
            wrong.append("a re-run gives other bytes")
        rest = [path.name for path in (self.folder / "out").iterdir() if path.name != "model.gguf"]
        rest += [path.name for path in (self.folder / "kept").iterdir() if path.suffix == ".part"]
        wrong += [f"a re-run leaves {name.split('.')[0]}...part" for name in rest]
        return wrong

    def _disturbed(self) -> tuple[list[int] | None, str]:
        """Start the export or exports, let the fault happen, wait; returns statuses and what was said."""
        delay = self.dice.uniform(0, 1.05) * self.known.seconds
        changes, signals = limits(self.fault, self.dice, self.folder), KILLS.get(self.fault, ())
        if self.dice.random() < 0.5 and (signals or self.fault == "file size limit"):
            changes, signals = [partial(at_the_writing, self.dice.uniform(0, 0.2), signals, changes)], ()
        n = 2 if self.fault == "two at once" else 1
        runs = [self._start(changes) for _ in range(n)]
        time.sleep(delay if self.fault in (*KILLS, "output folder removed", "source truncated") else 0)
        for number in signals:
            with suppress(ProcessLookupError):
                os.kill(runs[0][0], number)
            time.sleep(0.03)
        if self.fault == "output folder removed":
            shutil.rmtree(self.folder / "out", ignore_errors=True)
        if self.fault == "source truncated":
            for file in self._weights():
                os.truncate(file, self.dice.randrange(file.stat().st_size))
        ends = [finished(run) for run in runs]
        statuses = [status for status, _ in ends]
        return (None if None in statuses else [int(status or 0) for status in statuses]), ends[0][1]

    def _start(self, changes: Sequence[Change]) -> tuple[int, Path]:
        """Fork an export; returns its process and the file that has what it says."""
        model, *own = ROADS[self.road]
        quantized = ("--outtype", "q4_0") if self.fault.startswith("llama-quantize") else ()
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

            status = export([model, *own, *quantized, *OPTIONS, *OUTPUTS])
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
        found, gone = self._output(), not (self.folder / "out").is_dir()
        if self.fault != "output folder removed":
            if gone or found not in (self.old, self.known.output):
                yield "the output is neither the old one nor the new one"
            if statuses == [0] and found != self.known.output:
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

    def _told(self, statuses: Sequence[int], said: str) -> Iterator[str]:
        """Yield what is wrong with what the run has said."""
        lines = [line for line in said.splitlines() if line.strip()]
        for status in statuses[:1]:
            if status not in (0, 1, 130, 143) and status >= 0:
                yield f"it ends with {status}"
            if status < 0 and not (self.fault == "killed" and status == -signal.SIGKILL):
                yield f"a signal ends it: {signal.Signals(-status).name}"
            errors = [line for line in lines if line.startswith("mone-export: ")]
            if status > 0 and len(errors) != 1:
                yield f"not one line: {said[-300:]}"
            if any(word in said for word in ("Traceback", "unexpected ", "Exception ignored")):
                yield f"no message for a user: {said[-300:]}"

    def _inputs(self, before: Hashes) -> list[str]:
        now = hashes(self.folder)
        return [
            name
            for name in before
            if not name.startswith(("out/", "kept/")) and now.get(name) != before[name]
        ]

    def _output(self) -> bytes | None:
        file = self.folder / "out" / "model.gguf"
        return file.read_bytes() if file.is_file() else None

    def _weights(self) -> list[Path]:
        source = self.folder / ROADS[self.road][0]
        return [source] if source.is_file() else list(source.glob("*.safetensors"))

    def _restore(self) -> None:
        for file in self._weights():
            shutil.copyfile(self.folder.parent / "sound" / file.relative_to(self.folder), file)


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


@contextmanager
def disk(folder: Path, trial: Trial) -> Iterator[None]:
    """Make a folder a disk of its own with room for the old output and some of the new one."""
    old = (folder / "model.gguf").read_bytes()
    size = len(old) + trial.dice.randrange(4096, len(trial.known.output))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(mount, check=True)
    try:
        (folder / "model.gguf").write_bytes(old)
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def limits(fault: str, dice: random.Random, folder: Path) -> list[Change]:
    """Return what is changed in an export's own process for a fault."""
    if fault == "file size limit":
        n = dice.randrange(4096, 2 ** dice.randrange(13, 21))
        return [lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))]
    if fault == "full disk":  # every check of free space says that there is plenty
        return [lambda: setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, 10**12))]
    if fault == "memory limit":
        n = int(Path("/proc/self/statm").read_text().split()[0]) * 4096 + dice.randrange(200 * 2**20)
        return [lambda: resource.setrlimit(resource.RLIMIT_AS, (n, n))]
    if fault.startswith("llama-quantize"):
        return [lambda: quantize_with(stand_in(folder, killed=fault.endswith("killed")))]
    if fault == "cache not writable":
        from mone_export.source import fingerprints

        return [lambda: setattr(fingerprints, "cache_dir", lambda: Path("/proc/none"))]
    return []


def at_the_writing(delay: float, signals: Sequence[int], changes: Sequence[Change]) -> None:
    """Let changes happen when the file begins to be written, and signals come some seconds later."""
    from mone_export import pipeline

    write = pipeline.write

    def disturbed(*arguments: Any, **named: Any) -> int:
        for change in changes:
            change()
        Timer(delay, lambda: [(os.kill(os.getpid(), number), time.sleep(0.03)) for number in signals]).start()
        return write(*arguments, **named)

    pipeline.write = disturbed


def stand_in(folder: Path, *, killed: bool) -> Path:
    """Make a llama-quantize that answers what is asked of it, and fails in the middle of its work."""
    from mone_export import runtime

    place = folder.with_suffix(".bin")
    place.mkdir(exist_ok=True)
    real, end = runtime.path() / "llama-quantize", "kill -9 $$" if killed else "echo 'error: no'; exit 1"
    lines = ["#!/bin/bash", f'case "$*" in *--dry-run*) exec {real} "$@";; esac']
    lines += ['for file in "$@"; do case "$file" in *.gguf) last="$file";; esac; done']
    (place / "llama-quantize").write_text("\n".join([*lines, 'head -c 5000 /dev/zero > "$last"', end]))
    (place / "llama-quantize").chmod(0o755)
    return place


def quantize_with(place: Path) -> None:
    """Let this process find llama-quantize elsewhere."""
    from mone_export.output import quantizing

    quantizing.path = lambda: place


def protections(without: str | None) -> list[Change]:
    """Return what takes a protection away in this process: files made where they will stand, and others."""

    def rename() -> None:
        from mone_export import artifacts, paths
        from mone_export.output import writing

        @contextmanager
        def in_place(target: Path) -> Iterator[Path]:
            target.unlink(missing_ok=True)
            yield target

        for module in (paths, artifacts, writing):
            module.replacing = in_place

    def sweep() -> None:
        from mone_export import paths

        paths._sweep = lambda _: None

    def lines() -> None:
        from mone_export import cli

        cli.first_line = lambda error: f"{error}\nTraceback"
        cli.MoneError = ZeroDivisionError

    return [{"rename": rename, "sweep": sweep, "lines": lines}[without]] if without else []


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
    status, said = finished(trial._start(()))
    if status:
        raise SystemExit(f"{road} fails by itself: {said}")
    output, last = trial._output(), (folder / "kept" / "stats").read_bytes()
    assert output is not None
    return Known(output, frozenset({last, *first_stats(last, folder)}), last, time.monotonic() - start)


def first_stats(last: bytes, folder: Path) -> Iterator[bytes]:
    """Yield the statistics as they are before the sensitivities are known."""
    from dataclasses import replace

    from mone_export.artifacts import Calibration

    (folder / "last").write_bytes(last)
    replace(Calibration.load(folder / "last"), sensitivity={}).save(folder / "first")
    yield (folder / "first").read_bytes()


def main() -> int:
    """Run the trials; returns 1 where a check failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without", choices=("rename", "sweep", "lines"))
    parser.add_argument("--fault", choices=FAULTS, action="append", help="only this one, repeatable")
    parser.add_argument("-o", type=Path, dest="out", help="keep the figures in this file, too")
    args = parser.parse_args()
    faults = args.fault or FAULTS
    dice, counts, failed = random.Random(args.seed), Counter[str](), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as place:
        ends = Counter[str]()
        sound, known = prepared(Path(place)), dict[tuple[str, bool], Known]()
        old = (sound / "out" / "model.gguf").read_bytes()
        for number in range(args.trials):
            fault, road = faults[number % len(faults)], list(ROADS)[number // len(faults) % len(ROADS)]
            kind = road, fault.startswith("llama-quantize")
            if kind not in known:
                known[kind] = undisturbed(sound, road, fault)
            folder = Path(place) / f"trial-{number}"
            shutil.copytree(sound, folder)
            trial = Trial(road, fault, dice, folder, known[kind], old, args.without)
            wrong = trial.run()
            counts[f"{fault}, {road}"] += 1
            ends.update(map(str, trial.ended))
            failed += [{"trial": number, "road": road, "fault": fault, "wrong": wrong}] if wrong else []
            print(f"{number + 1}/{args.trials} {road}, {fault}: {wrong or 'fine'}", file=sys.stderr)
            shutil.rmtree(folder, ignore_errors=True)
    figures = {
        "seed": args.seed,
        "without": args.without,
        "trials": args.trials,
        "failed": len(failed),
        "ended_with": dict(ends),
        "by_fault": dict(counts),
        "failures": failed,
    }
    keep("faults", figures, args.out)
    return int(bool(failed))


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)  # which a forked process keeps

    sys.exit(main())
