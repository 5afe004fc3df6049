"""Tokens per second in llama.cpp, and the distance to the ideal, for shapes x types x ratios."""

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from shutil import copy
from typing import NamedTuple

import numpy as np

from measuring import Json, pairwise, programs, scratch, spread
from measuring.routed_share import routed_share
from models.random_gguf import BLOCK_TYPES, SHAPES, Form, Shape, write_model
from mone_export import runtime
from mone_export.runtime.toolchain import gpu_identity

TESTS = ("prompt", "generation")
REPETITIONS = 2


class Competitor(NamedTuple):
    """A file, and the llama.cpp that runs it."""

    form: Form
    ratio: float = 0.0
    stock: bool = False
    copied: bool = False

    @property
    def name(self) -> str:
        """How the results call it."""
        if self.copied:
            return "copy"
        ratio = f" {self.ratio:.0%}" if self.ratio else ""
        return f"{self.form}{ratio}{' on stock' if self.stock else ''}"


def measure_speed(args: argparse.Namespace) -> Json:
    """Time llama-bench on random files: unpruned, with novices, with fewer experts, and two probes.

    The probe `skipped` is a novice file with a router that never chooses a kept expert: the time without
    expert matrices. `half-used` is the unpruned file with half as many experts used per token: two points of
    a line, hence the time of the expert matrices with none of our changes in it. Either gives an ideal, the
    time of a model whose experts cost exactly in proportion to the slots that land on kept experts.
    Hard-pruned files and one of two unpruned runs use llama.cpp without the patches. A byte copy of the
    unpruned file, on the same build, shows what the machine's noise does to a ratio.
    """
    args.n_gen = args.n_gen or (64 if args.backend == "cpu" else 512)
    patched = programs(args)
    stock = runtime.build(args.backend, patched=False, targets=("llama-bench",)).bin
    cases = []
    for shape_name in args.shapes:
        for weights in args.weights:
            case = measure_case(shape_of(shape_name, args), weights, {False: patched, True: stock}, args)
            cases.append({"shape": shape_name, "weights": weights} | case)
            print(f"{shape_name} {weights} done", file=sys.stderr, flush=True)
    named = ("backend", "rounds", "threads", "n_prompt", "n_gen", "ratios")
    settings = {key: vars(args)[key] for key in named}
    settings["gpu"] = gpu_identity(()) if args.backend == "cuda" else None
    shapes = {name: asdict(shape_of(name, args)) for name in args.shapes}
    return {"settings": settings | {"repetitions": REPETITIONS}, "shapes": shapes, "cases": cases}


def measure_case(shape: Shape, weights: str, folders: dict[bool, Path], args: argparse.Namespace) -> Json:
    """Measure all files of one shape and type of weights."""
    competitors = [
        *(Competitor("full"), Competitor("full", stock=True), Competitor("skipped", 0.5)),
        *(Competitor("full", copied=True), Competitor("half-used"), Competitor("tiers")),
        *(Competitor("novices", ratio) for ratio in args.ratios),
        *(Competitor("thin", ratio) for ratio in args.ratios if ratio >= 0.5),
        *(Competitor("hard", ratio, stock=True) for ratio in args.ratios),
    ]
    with scratch() as folder:
        files = {
            item: folder / f"{item.form}-{item.ratio}{'-copy' * item.copied}.gguf" for item in competitors
        }
        for item, file in files.items():
            if item.copied:
                copy(files[Competitor("full")], file)
            elif not file.exists():
                write_model(file, shape, weights, item.form, n_kept(shape, item.ratio))
        share = {
            item.name: measure_share(file, shape, n_kept(shape, item.ratio), args)
            for item, file in files.items()
            if item.form in ("novices", "skipped")
        }
        runs: list[Json] = []
        for number in range(args.rounds):
            # every other round backwards, so that none always runs after the same neighbour
            order = competitors if number % 2 == 0 else competitors[::-1]
            for item in order:
                timed = bench(folders[item.stock] / "llama-bench", files[item], args)
                runs += [{"round": number, "name": item.name} | run for run in timed]
        sizes = {item.name: file.stat().st_size for item, file in files.items()}
    summary = {test: summarise(runs, share, test, args.ratios) for test in TESTS}
    return {"sizes": sizes, "share": share, "summary": summary, "runs": runs}


def shape_of(name: str, args: argparse.Namespace) -> Shape:
    """Return a shape with as many layers as were asked for."""
    return replace(SHAPES[name], n_layer=args.layers) if args.layers else SHAPES[name]


def n_kept(shape: Shape, ratio: float) -> int:
    """Return how many experts of a layer stay."""
    return shape.n_expert - round(ratio * shape.n_expert)


def summarise(runs: Sequence[Json], share: Json, test: str, ratios: Sequence[float]) -> Json:
    """Return the spread of one test's times, and of the ratios of speed round by round."""
    rows = [run for run in runs if run["test"] == test]
    probe_share = share[Competitor("skipped", 0.5).name][test]
    for number in sorted({run["round"] for run in rows}):
        times = {run["name"]: run for run in rows if run["round"] == number}
        for ratio in ratios:
            not_routed = 1 - share[Competitor("novices", ratio).name][test]
            for name, probe, slots in (
                (f"ideal {ratio:.0%}", Competitor("skipped", 0.5).name, 1 - probe_share),
                (f"ideal by use {ratio:.0%}", "half-used", 0.5),
            ):
                row: Json = {"round": number, "name": name}
                for key in ("wall_ms", "cpu_ms"):
                    full = times["full"][key]
                    row[key] = full - not_routed * (full - times[probe][key]) / slots
                rows.append(row)
    pairs = [("full", "full on stock"), ("copy", "full"), ("tiers", "full")]
    for ratio in ratios:
        novices = Competitor("novices", ratio).name
        others = (
            "full",
            Competitor("hard", ratio, stock=True).name,
            f"ideal {ratio:.0%}",
            f"ideal by use {ratio:.0%}",
        )
        pairs += [(novices, other) for other in others]
        thin = Competitor("thin", ratio).name
        pairs += [(thin, other) for other in ("full", novices) if any(run["name"] == thin for run in rows)]
    return {
        "times": {
            name: {
                key: spread([run[key] for run in rows if run["name"] == name])
                for key in ("wall_ms", "cpu_ms")
            }
            for name in dict.fromkeys(run["name"] for run in rows)
        },
        # how many times faster the first is than the second
        "speed_ratios": {
            f"{name} / {other}": {key: pairwise(rows, key, other, name) for key in ("wall_ms", "cpu_ms")}
            for name, other in pairs
        },
    }


def bench(program: Path, file: Path, args: argparse.Namespace) -> Iterator[Json]:
    """Yield wall and CPU time per token of llama-bench's two tests on a file.

    The process's CPU time is read when its log says that the timed runs begin, and when the result appears:
    loading, repacking and warming up are not in it.
    """
    command = [str(program), "-m", str(file), "-t", str(args.threads), "-r", str(REPETITIONS)]
    command += ["-p", str(args.n_prompt), "-n", str(args.n_gen), "-o", "jsonl", "--progress"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    clock = ~process.pid << 3 | 2  # Linux: the CPU-time clock of another process
    began, seen = 0.0, []
    for line in process.stdout:
        seen.append(line)
        if f"run 1/{REPETITIONS}" in line:
            began = time.clock_gettime(clock)
        elif line.startswith("{"):
            cpu = time.clock_gettime(clock) - began
            result = json.loads(line)
            test, n_token = ("prompt", args.n_prompt) if result["n_prompt"] else ("generation", args.n_gen)
            yield {
                "test": test,
                "wall_ms": 1000 / result["avg_ts"],
                "cpu_ms": 1000 * cpu / (REPETITIONS * n_token),
            }
    if process.wait() != 0:
        raise SystemExit(f"llama-bench failed: {''.join(seen)[-2000:]}")


def measure_share(file: Path, shape: Shape, n_kept: int, args: argparse.Namespace) -> Json:
    """Return the share of slots on kept experts, on the tokens that `bench` has the file run."""
    # llama-bench draws from C's `rand`, which it never seeds, and one token more than it uses per generation
    libc = ctypes.CDLL(None)
    libc.srand(1)

    def draw(length: int) -> np.ndarray:
        return np.array([libc.rand() % shape.n_vocab for _ in range(length)])

    prompts = [draw(args.n_prompt) for _ in range(REPETITIONS + 1)]
    lengths = [1] + [args.n_gen] * REPETITIONS
    generations = [draw(length + 1)[:length] for length in lengths]
    return {
        "prompt": routed_share(file, [(tokens, args.n_prompt) for tokens in prompts], n_kept),
        "generation": routed_share(file, [(tokens, 1) for tokens in generations], n_kept),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what `measure.py speed` understands."""
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--backend", choices=("cpu", "cuda", "vulkan"), default="cpu")
    parser.add_argument("--layers", type=int, help="of the random models (default: 2, to fit small machines)")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-p", "--n-prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("-n", "--n-gen", type=int, help="tokens to generate (default: 64, with a GPU 512)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--weights", nargs="+", choices=BLOCK_TYPES, default=list(BLOCK_TYPES))
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.set_defaults(measure=measure_speed)
