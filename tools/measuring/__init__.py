"""What all measurements share: the machine's description, medians, ratios round by round, scratch files."""

import argparse
import datetime
import os
import platform
import re
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mone_export import runtime

Json = dict[str, Any]


def environment() -> Json:
    """Describe when, on what and with what: no names of hosts, users or folders."""
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    upstream = runtime.Upstream.load(runtime.patches_dir() / "UPSTREAM")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "machine": {
            "cpu": model[1] if model else platform.processor(),
            "cores": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
            "load_average_before": [round(load, 1) for load in os.getloadavg()],
        },
        "versions": {
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
            "llama_cpp": f"{upstream.package} {upstream.version} ({upstream.llama_cpp_commit})",
        },
    }


def spread(values: Sequence[float]) -> Json:
    """Return median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def pairwise(runs: Sequence[Json], key: str, name: str, base: str) -> Json:
    """Return the spread of value(name) / value(base), taken round by round."""
    values = {(run["round"], run["name"]): run[key] for run in runs}
    rounds = sorted({number for number, _ in values})
    return spread([values[number, name] / values[number, base] for number in rounds])


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a folder in the cache for large files, removed at the end."""
    runtime.cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=runtime.cache_dir(), prefix="measure-") as folder:
        yield Path(folder)


def programs(args: argparse.Namespace) -> Path:
    """Return the folder of llama.cpp's programs, and make llama-cpp-python load the libraries there."""
    folder: Path = args.bin or runtime.path(vars(args).get("backend"))
    os.environ["LLAMA_CPP_LIB_PATH"] = str(folder)
    return folder


def ask_perplexity(bin_dir: Path, file: Path, text: Path, pattern: str, *options: object) -> re.Match[str]:
    """Run llama-perplexity on a text, 512 tokens at a time; return where its output matches `pattern`.

    On a busy machine it may end before its last lines are written: then it is asked again.
    """
    command = [bin_dir / "llama-perplexity", "-m", file, "-f", text, "-c", 512, *options]
    for _ in range(20):
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
        )
        output = done.stdout + done.stderr
        if done.returncode != 0:
            break
        if found := re.search(pattern, output):
            return found
    raise SystemExit(f"llama-perplexity ended with {done.returncode} and gave no result: {output[-2000:]}")


def with_constants(module: Any, constants: Any, hidden: Any, ids: Any, weights: Any) -> Any:
    """Run an experts module, and add each expert's constant, [n_expert, d], weighted as its output is."""
    import torch

    from mone_export.calibration.observer import run_experts

    spread = torch.zeros(len(ids), len(constants)).scatter_(1, ids, weights)
    return run_experts(module, hidden, ids, weights) + spread @ constants
