"""Peak memory of the writing stage."""

import argparse
import multiprocessing
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from measuring import Json, scratch
from models.random_model import save_random_model

MEMORY_SHAPE = {"n_layer": 2, "n_expert": 128, "top_k": 8, "hidden": 1024, "expert": 1024}
BAR_FACTOR, BAR_EXTRA = 1.5, 500_000_000


def measure_memory(args: argparse.Namespace) -> Json:
    """Sample the anonymous memory of `write` on a checkpoint with large layers, experts apart and fused."""
    if args.bin:
        raise SystemExit("memory needs no programs: leave out --bin")
    sizes = MEMORY_SHAPE
    layer_bytes = sizes["n_expert"] * 3 * sizes["hidden"] * sizes["expert"] * 2
    runs = []
    for form in ("apart", "fused"):
        with scratch() as folder:
            save_random_model(folder / "model", sizes, fused=form == "fused")
            for outtype in ("auto", "q8_0", "f32"):
                with multiprocessing.get_context("spawn").Pool(1) as pool:  # a fresh process: no old memory
                    run = pool.apply(write_and_sample, (folder, outtype))
                runs.append({"form": form, "outtype": outtype} | run)
                print(runs[-1], file=sys.stderr, flush=True)
    bar = BAR_FACTOR * layer_bytes + BAR_EXTRA
    return {
        "settings": sizes | {"dtype": "bfloat16", "ratio": 0.25},
        "largest_layer_experts": layer_bytes,
        "bar": bar,
        "runs": [run | {"within": run["peak"] <= bar} for run in runs],
    }


def write_and_sample(folder: Path, outtype: str) -> Json:
    """Write the checkpoint, a quarter of its experts pruned; return anonymous bytes before and at peak."""
    import torch

    from mone_export.artifacts import Calibration, ExpertStats
    from mone_export.output.writing import write
    from mone_export.pruning.planning import plan_without_scores
    from mone_export.recipe import Recipe
    from mone_export.source import inspect

    path = folder / "model"
    spec = inspect(path)
    stats = ExpertStats.empty(spec.n_expert, spec.hidden_size)
    calibration = Calibration(
        spec=spec,
        model_sha256="0" * 64,
        corpus_sha256="0" * 64,
        corpus_name="none",
        n_token=0,
        layers=dict.fromkeys(spec.moe_layers, stats),
    )
    chosen = plan_without_scores(spec, Recipe.of(0.25))
    torch.set_num_threads(1)
    before = anonymous_bytes()
    outfile = folder / "out.gguf"
    start = time.perf_counter()
    with peak_memory() as peak:
        size = write(path, calibration, chosen, outfile, outtype=outtype)
    seconds = time.perf_counter() - start
    outfile.unlink()
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
