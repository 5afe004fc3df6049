#!/usr/bin/env python3
"""Measure what the README claims, and keep the numbers as JSON in docs/measurements.

    python tools/measure.py speed        llama-bench: unpruned, novices, hard-pruned; distance to the ideal
    python tools/measure.py calibrate    what observing costs on top of a forward pass
    python tools/measure.py quality      perplexity on held-out text by ratio, score and novice
    python tools/measure.py methods      KL divergence by method, score, novice and ratio
    python tools/measure.py protect      KL divergence on a rare text with and without --protect
    python tools/measure.py bytes        KL divergence at equal bytes: prune, or only quantise?
    python tools/measure.py roads        from a checkpoint or from a GGUF: KL divergence, speed
    python tools/measure.py dry          a GGUF's dry run, from start to end
    python tools/measure.py writing      rounding while writing: speed against llama-quantize, peak memory
    python tools/measure.py server       resident memory of llama-server
    python tools/measure.py wheel        llama.cpp for any x86-64 CPU against that for this one
    python tools/measure.py large        a 6 GB model in less memory than that; estimates

Competitors take turns inside every round, and ratios are taken round by round: neighbours on the machine slow
both sides alike. CPU time stands beside wall time for the same reason. `tools/pages/readme_tables.py` puts
the results into the README and docs/.
"""

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), *(str(ROOT / "tools" / name) for name in ("pages", "release"))]

import readme_tables  # noqa: E402

from measuring import environment  # noqa: E402  (neighbours, which import the checkout's own package)
from measuring.bytes import FRACTIONS, measure_bytes  # noqa: E402
from measuring.calibrate import measure_calibrate  # noqa: E402
from measuring.dry import measure_dry  # noqa: E402
from measuring.large import measure_large  # noqa: E402
from measuring.methods import MODELS, VARIANTS, measure_methods  # noqa: E402
from measuring.protect import WAYS, measure_protect  # noqa: E402
from measuring.quality import measure_quality  # noqa: E402
from measuring.roads import measure_roads  # noqa: E402
from measuring.server import measure_server  # noqa: E402
from measuring.speed import add_options as add_speed_options  # noqa: E402
from measuring.wheel import add_options as add_wheel_options  # noqa: E402
from measuring.writing import measure_writing  # noqa: E402
from models.hollow_gguf import MODELS as HOLLOW  # noqa: E402
from models.random_gguf import BLOCK_TYPES, SHAPES  # noqa: E402

OUT = ROOT / "docs" / "measurements"


def main() -> int:
    """Run one measurement, write its JSON and print its table."""
    args = _parser().parse_args()
    started = environment()
    data = {"kind": args.command} | started | args.measure(args)
    data["machine"]["load_average_after"] = [round(load, 1) for load in os.getloadavg()]
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{args.name or args.command}.json").write_text(json.dumps(data, indent=1) + "\n")
    print(readme_tables.render(data))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--name", help="name of the JSON file (default: the command's)")
    common.add_argument(
        "--bin", type=Path, help="folder of llama.cpp's programs (default: what mone-llama built)"
    )

    speed = commands.add_parser("speed", parents=[common], help="tokens per second in llama.cpp")
    add_speed_options(speed)

    calibrate = commands.add_parser("calibrate", parents=[common], help="tokens per second of a calibration")
    calibrate.add_argument("--rounds", type=int, default=5)
    calibrate.add_argument("--tokens", type=int, default=4096, help="tokens a round (batches of 4096)")
    calibrate.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    calibrate.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    calibrate.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    calibrate.set_defaults(measure=measure_calibrate)

    quality = commands.add_parser("quality", parents=[common], help="perplexity on held-out text")
    quality.add_argument("model", nargs="?", default="demo", help="as for mone-export (default demo)")
    quality.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5])
    quality.add_argument("--chunks", type=int, default=40, help="rows of 512 held-out tokens")
    quality.add_argument("-t", "--threads", type=int, default=2)
    quality.set_defaults(measure=measure_quality)

    methods = commands.add_parser("methods", parents=[common], help="KL divergence by method, score, novice")
    methods.add_argument("models", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)}")
    methods.add_argument("--ratios", type=float, nargs="+", default=[0.125, 0.25, 0.5, 0.75])
    methods.add_argument(
        "--add", type=Path, metavar="JSON", help="keep this file's runs of other models and ratios"
    )
    methods.add_argument("--kinds", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="of variants")
    methods.add_argument("--samples", type=int, default=5, help="calibration samples")
    methods.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[16, 32],
        help="rows of 512 tokens to calibrate on; with fewer than the most, only those of `always`",
    )
    methods.add_argument("--eval-rows", type=int, default=8, help="rows of 512 tokens of each text")
    methods.add_argument(
        "--minutes", type=float, default=55, help="training time of a model not in the cache"
    )
    methods.add_argument("-t", "--threads", type=int, default=2)
    methods.set_defaults(measure=measure_methods)

    protect = commands.add_parser("protect", parents=[common], help="a rare text with and without --protect")
    protect.add_argument("models", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)}")
    protect.add_argument("--ratio", type=float, default=0.5)
    protect.add_argument("--numbers", type=int, nargs="+", default=[2, 4, 8], help="experts of each layer")
    protect.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    protect.add_argument("--samples", type=int, default=5, help="calibration samples")
    protect.add_argument("--rows", type=int, default=32, help="rows of 512 tokens to calibrate on")
    protect.add_argument(
        "--protected-rows", type=int, nargs="+", default=[2, 8], help="rows of 512 tokens to protect"
    )
    protect.add_argument("--eval-rows", type=int, default=8, help="rows of 512 tokens of each text")
    protect.add_argument(
        "--minutes", type=float, default=55, help="training time of a model not in the cache"
    )
    protect.add_argument("-t", "--threads", type=int, default=2)
    protect.set_defaults(measure=measure_protect)

    same = commands.add_parser("bytes", parents=[common], help="KL divergence at equal bytes")
    same.add_argument("models", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)}")
    same.add_argument(
        "--fractions", type=float, nargs="+", default=list(FRACTIONS), help="of the unpruned size"
    )
    same.add_argument("--samples", type=int, default=3, help="calibration samples")
    same.add_argument("--rows", type=int, default=32, help="rows of 512 tokens to calibrate on")
    same.add_argument("--chunks", type=int, default=16, help="rows of 512 tokens of each text")
    same.add_argument("--minutes", type=float, default=55, help="training time of a model not in the cache")
    same.add_argument("-t", "--threads", type=int, default=2)
    same.set_defaults(measure=measure_bytes)

    roads = commands.add_parser("roads", parents=[common], help="from a checkpoint, or from a GGUF")
    roads.add_argument("models", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)}")
    roads.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5])
    roads.add_argument("--rows", type=int, default=32, help="rows of 512 tokens to calibrate on")
    roads.add_argument("--chunks", type=int, default=16, help="rows of 512 tokens of each text")
    roads.add_argument("--minutes", type=float, default=55, help="training time of a model not in the cache")
    roads.add_argument("--shape", choices=SHAPES, default="OLMoE", help="of what is timed")
    roads.add_argument("--weights", choices=BLOCK_TYPES, default="Q4_K", help="of what is timed")
    roads.add_argument("--rows-timed", type=int, default=8, help="rows of 512 tokens")
    roads.add_argument("--rounds", type=int, default=5)
    roads.add_argument("-t", "--threads", type=int, default=2)
    roads.set_defaults(measure=measure_roads)

    dry = commands.add_parser("dry", parents=[common], help="a GGUF's dry run, from start to end")
    dry.add_argument("models", nargs="*", default=list(HOLLOW), help=f"of {', '.join(HOLLOW)}")
    dry.add_argument("--rounds", type=int, default=9)
    dry.set_defaults(measure=measure_dry)

    writing = commands.add_parser("writing", parents=[common], help="speed and peak memory of writing")
    writing.add_argument("--outtypes", nargs="+", default=["q8_0", "q4_k_m"], help="rounded to")
    writing.add_argument("--rounds", type=int, default=3)
    writing.set_defaults(measure=measure_writing)

    server = commands.add_parser("server", parents=[common], help="resident memory of llama-server")
    server.set_defaults(measure=measure_server)

    wheel = commands.add_parser(
        "wheel", parents=[common], help="the wheel's llama.cpp against the native one"
    )
    add_wheel_options(wheel)

    large = commands.add_parser("large", parents=[common], help="a model larger than the memory")
    large.add_argument(
        "--model", type=Path, help="what tools/models/random_model.py wrote (default: made and removed)"
    )
    large.set_defaults(measure=measure_large)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
