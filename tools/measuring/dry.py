"""How long a GGUF's dry run takes: the whole command, on files with holes in place of weights."""

import argparse
import os
import subprocess
import sys
import time

from measuring import Json, programs, scratch, spread
from models.hollow_gguf import MODELS, WEIGHTS, write_hollow


def measure_dry(args: argparse.Namespace) -> Json:
    """Return the seconds of the command from start to end for each model, the models in turns."""
    programs(args)
    runs: list[Json] = []
    # modules compiled once, as where they are installed
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with scratch() as folder:
        files = {name: write_hollow(folder / f"{name}.gguf", MODELS[name]) for name in args.models}
        for number in range(-1, args.rounds):
            for name, file in files.items():
                command = [sys.executable, "-m", "mone_export", str(file), "--ratio", "0.5", "--dry-run"]
                start = time.perf_counter()
                subprocess.run(command, env=environment, capture_output=True, check=True)
                if number >= 0:  # the first one finds nothing in the page cache
                    runs.append({"round": number, "model": name, "seconds": time.perf_counter() - start})
        sizes = {name: file.stat().st_size for name, file in files.items()}
    return {
        "settings": {"weights": WEIGHTS, "rounds": args.rounds},
        "sizes": sizes,
        "tokens": {name: MODELS[name].n_vocab for name in args.models},
        "runs": runs,
        "seconds": {
            name: spread([run["seconds"] for run in runs if run["model"] == name]) for name in args.models
        },
    }
