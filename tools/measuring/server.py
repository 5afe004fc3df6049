"""Resident memory of llama-server, all experts against novices."""

import argparse
import re
import sys
from pathlib import Path

from measuring import Json, programs, scratch
from models.random_gguf import SHAPES, write_model

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from programs import running_server  # noqa: E402  (as the tests run it)

SHAPE, WEIGHTS, RATIO = "OLMoE", "Q8_0", 0.5
BAR = 0.05


def measure_server(args: argparse.Namespace) -> Json:
    """Read the resident memory of llama-server with random files of the same shape, when it is ready.

    Memory mapping is off: mapped pages would come and go with the machine's free memory.
    """
    bin_dir, shape = programs(args), SHAPES[SHAPE]
    n_kept = shape.n_expert - round(RATIO * shape.n_expert)
    options = ("-c", 512, "-np", 1, "--load-mode", "none")
    runs = {}
    with scratch() as folder:
        for form in ("full", "novices"):
            file = write_model(folder / f"{form}.gguf", shape, WEIGHTS, form, n_kept)
            with running_server(bin_dir, "-m", file, *options) as server:
                runs[form] = {"size": file.stat().st_size, "resident": resident_bytes(server.pid)}
    saved = {key: runs["full"][key] - runs["novices"][key] for key in ("size", "resident")}
    return {
        "settings": {
            "shape": SHAPE,
            "weights": WEIGHTS,
            "ratio": RATIO,
            "n_layer": shape.n_layer,
            "ctx": 512,
        },
        "runs": runs,
        "saved": saved | {"within": abs(saved["resident"] / saved["size"] - 1) <= BAR},
    }


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 if found else 0
