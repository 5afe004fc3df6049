"""How fast a file runs and what memory it takes, by llama-bench of the build, in a process of its own."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from mone_export.errors import MoneError
from mone_export.evaluation.results import Measured
from mone_export.llama_options import LlamaOptions
from mone_export.runtime import Progress, environment, path, program

N_PROMPT, N_NEW, N_ROUND = 512, 64, 3  # tokens, and how often both are measured
_BETWEEN = 0.02  # seconds between two looks at the memory
_PEAK = re.compile(r"VmHWM:\s*(\d+) kB")


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second, and the most bytes that were resident in the process that measured them."""

    prefill: Measured
    decode: Measured
    resident: int


def measure_speed(file: Path, options: LlamaOptions, *, progress: Progress | None = None) -> Speed:
    """Run llama-bench: prompts of 512 tokens, and 64 tokens after none; each three times.

    The errors are standard errors of the mean. Raises `MoneError` with llama-bench's own reason.
    """
    tests = ("-p", N_PROMPT, "-n", N_NEW, "-r", N_ROUND, "-o", "json")
    if progress:
        progress(0, 0, "measuring the speed")
    output, resident = run_program("llama-bench", file, options, *tests)
    try:
        found = {bool(test["n_gen"]): test for test in json.loads(output)}
        return Speed(_rate(found[False]), _rate(found[True]), resident)
    except (ValueError, KeyError, TypeError):
        raise MoneError(
            f"llama-bench printed no speeds of {file}: build it anew, `mone-llama build`"
        ) from None


def run_program(
    name: str,
    file: Path,
    options: LlamaOptions,
    *arguments: object,
) -> tuple[str, int]:
    """Run one of the build's programs on a file; return what it printed, and its peak of resident memory.

    The memory counts what is read of the file itself. Raises `MoneError` where the program is missing, or
    fails.
    """
    folder = path()
    command = [str(program(folder, name)), "-m", str(file), *_words(options), *map(str, arguments)]
    try:
        process = subprocess.Popen(
            command,
            env=environment(folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise MoneError(f"cannot run {command[0]} ({error.strerror}): run `mone-llama build`") from None
    peak = 0
    try:
        while True:
            try:
                output, said = process.communicate(timeout=_BETWEEN)
                break
            except subprocess.TimeoutExpired:
                peak = max(peak, _resident(process.pid))
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode:
        raise MoneError(f"{name} failed on {file}: {_reason(said or output)}")
    return output, peak


def _words(options: LlamaOptions) -> list[str]:
    words: Sequence[tuple[str, Any]] = (
        ("-ngl", options.n_gpu_layers),
        ("--n-cpu-moe", options.n_cpu_moe or None),
        ("-t", options.n_threads),
        ("-b", options.n_batch),
        ("-ub", options.n_ubatch),
    )
    return [word for name, value in words if value is not None for word in (name, str(value))]


def _rate(test: dict[str, Any]) -> Measured:
    n = len(test["samples_ts"])
    return Measured(float(test["avg_ts"]), float(test["stddev_ts"]) / n**0.5 if n > 1 else None)


def _resident(pid: int) -> int:
    """Return the most bytes that a process has had resident so far; where only that is known, has now."""
    try:
        if sys.platform == "linux":
            found = _PEAK.search(Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
            return int(found[1]) * 1024 if found else 0
        return int(psutil.Process(pid).memory_info().rss)
    except (OSError, psutil.Error):  # it has just ended
        return 0


def _reason(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error|failed|\bE\b", line)] or lines
    return telling[-1][:300] if telling else "it does not say why"
