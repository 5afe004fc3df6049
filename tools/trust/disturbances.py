"""What happens to the exports of faults.py: limits, full disks, other clocks, and protections taken away."""

import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any

from power import record

Change = Callable[[], None]
"""What is called in an export's own process before it begins."""


@contextmanager
def disk(folder: Path, dice: random.Random, most: int) -> Iterator[None]:
    """Make a folder a disk with room for the old output and some of the new one, which has `most` bytes."""
    old = (folder / "model.gguf").read_bytes()
    size = len(old) + dice.randrange(4096, most)
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
    if fault == "clock set back":
        return [clock_back]
    if fault == "power cut":
        return [partial(record, folder, folder.with_suffix(".unflushed"))]
    return []


def clock_back() -> None:
    """Let the clock of this process run backwards, from a day ago."""
    now = time.time()
    time.time = lambda: now - 86_400 - time.monotonic()  # type: ignore[assignment]
    time.time_ns = lambda: int(time.time() * 1e9)  # type: ignore[assignment]


def touched(folder: Path) -> None:
    """Let all files of a folder be of tomorrow."""
    for path in folder.rglob("*"):
        os.utime(path, (time.time() + 86_400,) * 2)


def one_of_two(rank: int, meeting: Path) -> None:
    """Make this process one of two that share the rows, as torchrun does; they meet in a file."""
    import torch

    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in names.items()}, GLOO_SOCKET_IFNAME="lo")
    joined = torch.distributed.init_process_group
    torch.distributed.init_process_group = partial(
        joined, init_method=f"file://{meeting}", rank=rank, world_size=2
    )


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
    """Make a llama-quantize that fails in the middle of its answer."""
    place = folder.with_suffix(".bin")
    place.mkdir(exist_ok=True)
    end = "kill -9 $$" if killed else "echo 'error: no'; exit 1"
    answer = "echo '[   1/ 100] output.weight - [64, 64, 1, 1], type = f16, size = 0.1 MiB -> 0.1 MiB (q4_0)'"
    (place / "llama-quantize").write_text("\n".join(["#!/bin/bash", answer, end]))
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

        paths.sweep = lambda _: None

    def lines() -> None:
        from mone_export import cli

        cli.first_line = lambda error: f"{error}\nTraceback"
        cli.MoneError = ZeroDivisionError

    def flush() -> None:
        from mone_export import files

        files.flush = lambda _: None

    found = {"rename": rename, "sweep": sweep, "lines": lines, "flush": flush}
    return [found[without]] if without else []
