"""Speed of the llama.cpp in the wheel, for any x86-64 CPU, against the one compiled for this CPU."""

import argparse
import sys

from runtimes import KINDS, compiled

from measuring import Json, pairwise, programs, scratch, spread
from measuring.speed import REPETITIONS, TESTS, bench
from models.random_gguf import BLOCK_TYPES, SHAPES, write_model

RATIO = 0.5


def measure_wheel(args: argparse.Namespace) -> Json:
    """Time llama-bench of both builds on random files with novices, in turns that go to and fro."""
    folders = {"native": programs(args), "wheel": compiled(KINDS["cpu"]).bin}
    shape = SHAPES[args.shape]
    cases = []
    with scratch() as folder:
        for weights in args.weights:
            n_kept = shape.n_expert - round(RATIO * shape.n_expert)
            file = write_model(folder / f"{weights}.gguf", shape, weights, "novices", n_kept)
            runs: list[Json] = []
            for number in range(args.rounds):
                for name in list(folders)[:: -1 if number % 2 else 1]:
                    timed = bench(folders[name] / "llama-bench", file, args)
                    runs += [{"round": number, "name": name} | run for run in timed]
                print(f"{weights}: round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
            cases.append({"weights": weights, "summary": summarise(runs), "runs": runs})
            file.unlink()
    named = ("rounds", "threads", "n_prompt", "n_gen", "shape")
    settings = {key: vars(args)[key] for key in named} | {"repetitions": REPETITIONS, "ratio": RATIO}
    return {"settings": settings, "cases": cases}


def summarise(runs: list[Json]) -> Json:
    """Return each test's CPU times, and how many times as fast the wheel is, round by round."""
    summary = {}
    for test in TESTS:
        rows = [run for run in runs if run["test"] == test]
        times = {
            name: spread([run["cpu_ms"] for run in rows if run["name"] == name])
            for name in ("native", "wheel")
        }
        summary[test] = {"cpu_ms": times, "speed_ratio": pairwise(rows, "cpu_ms", "native", "wheel")}
    return summary


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what `measure.py wheel` understands."""
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("-p", "--n-prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("-n", "--n-gen", type=int, default=32, help="tokens to generate")
    parser.add_argument("--shape", choices=SHAPES, default="OLMoE")
    parser.add_argument("--weights", nargs="+", choices=BLOCK_TYPES, default=["Q4_K", "Q8_0"])
    parser.set_defaults(measure=measure_wheel)
