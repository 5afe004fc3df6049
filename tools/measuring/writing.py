"""The writing stage: how long a file is rounded while it is written, and in how much memory.

Against llama-quantize, which rounds a file that has been written without: the same types, the same threads,
and less work, since it neither converts the model nor leaves experts out. Both until the data is on the disk.
"""

import argparse
import multiprocessing
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from measuring import Json, pairwise, programs, scratch
from models.random_model import save_random_model

SHAPE = {"n_layer": 2, "n_expert": 128, "top_k": 8, "hidden": 1024, "expert": 1024}
RATIO = 0.25
FORMS = ("experts apart", "experts fused", "GGUF")
BAR_EXTRA = 500_000_000  # bytes of memory beside the largest stack of experts


def measure_writing(args: argparse.Namespace) -> Json:
    """Write a model with large layers from checkpoints, experts apart and fused, and from its GGUF."""
    bin_dir = programs(args)
    n_kept = SHAPE["n_expert"] - round(RATIO * SHAPE["n_expert"])
    stack = n_kept * SHAPE["hidden"] * SHAPE["expert"] * 2
    runs: list[Json] = []
    with scratch() as folder:
        sources = dict(zip(FORMS, (folder / name for name in ("apart", "fused", "whole.gguf")), strict=True))
        for form in FORMS[:2]:
            save_random_model(sources[form], SHAPE, fused=form == FORMS[1])
        exact, made = folder / "exact.gguf", folder / "made.gguf"
        _in_a_fresh_process(sources[FORMS[0]], sources[FORMS[2]], "auto", 0.0)
        for number in range(args.rounds):
            for outtype in ("auto", *args.outtypes):
                for form in FORMS:
                    run = _in_a_fresh_process(sources[form], made, outtype, RATIO)
                    runs.append({"round": number, "outtype": outtype, "name": form} | run)
                    print(runs[-1], file=sys.stderr, flush=True)
                if outtype == "auto":
                    made.replace(exact)
                    continue
                command = [str(bin_dir / "llama-quantize"), str(exact), str(made), outtype]
                seconds = _seconds(command, ["sync", str(made)])
                name = "llama-quantize"
                runs.append({"round": number, "outtype": outtype, "name": name, "seconds": seconds})
    return {
        "settings": SHAPE | {"dtype": "bfloat16", "ratio": RATIO, "rounds": args.rounds},
        "stack": stack,
        "bar": stack + BAR_EXTRA,
        "runs": runs,
        "speed": {
            outtype: {
                form: pairwise(
                    [run for run in runs if run["outtype"] == outtype], "seconds", "llama-quantize", form
                )
                for form in FORMS
            }
            for outtype in args.outtypes
        },
    }


def _seconds(*commands: list[str]) -> float:
    start = time.perf_counter()
    for command in commands:
        subprocess.run(command, check=True, capture_output=True)
    return round(time.perf_counter() - start, 2)


def _in_a_fresh_process(model: Path, outfile: Path, outtype: str, ratio: float) -> Json:
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # without old memory
        return pool.apply(write_and_sample, (model, outfile, outtype, ratio))


def write_and_sample(model: Path, outfile: Path, outtype: str, ratio: float) -> Json:
    """Write a model without some of its experts; return seconds, and anonymous bytes before and at peak."""
    from mone_export.output.writing import write
    from mone_export.pruning.planning import plan_without_scores
    from mone_export.recipe import Recipe
    from mone_export.source import open_source

    source = open_source(model)
    source.fingerprint()  # is known by then, from the calibration
    chosen = plan_without_scores(source.spec, Recipe.of(ratio, method="drop", score="random"))
    before, start = anonymous_bytes(), time.perf_counter()
    with peak_memory() as peak:
        size = write(source, None, chosen, outfile, outtype=outtype)
    seconds = time.perf_counter() - start
    return {"before": before, "peak": peak[0], "size": size, "seconds": round(seconds, 2)}


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Sample this process's anonymous memory every few milliseconds; the list holds the largest sample."""
    peak, done = [anonymous_bytes()], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def anonymous_bytes() -> int:
    """Return the memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0
