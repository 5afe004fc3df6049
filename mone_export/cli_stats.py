"""The `mone-stats` command: merge statistics files, say what is in one."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mone_export.errors import MoneError
from mone_export.paths import check_outputs
from mone_export.terminal import steady_output

if TYPE_CHECKING:
    from mone_export.artifacts import Calibration

_DESCRIPTION = "Work with the statistics that `mone-export --stats FILE` keeps."
_EPILOG = """examples:
  mone-stats show model.stats
  mone-stats merge monday.stats tuesday.stats -o both.stats
  mone-stats merge code.stats chat.stats --weight code.stats=0.7 -o mix.stats
  mone-export MODEL --ratio 0.5 --stats mix.stats -o model.gguf    uses it, whatever text it is of"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mone-stats`; returns the exit status: 0 done, 1 a MoneError, 2 usage, 130 interrupted."""
    with steady_output() as output:
        args = _parser().parse_args(argv)
        try:
            if args.command == "merge":
                _merge(args)
            else:
                _show(args)
                output.check()
        except MoneError as error:
            print(f"mone-stats: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("mone-stats: interrupted; nothing was written", file=sys.stderr)
            return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mone-stats",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{merge,show}")
    merge = commands.add_parser("merge", help="merge files of one model that are of different texts")
    merge.add_argument("files", nargs="+", metavar="FILE", help="what `mone-export --stats` wrote")
    merge.add_argument(
        "--weight",
        action="append",
        default=[],
        metavar="FILE=SHARE",
        help="this file's share of the evidence, e.g. 0.7; the others divide the rest by their tokens",
    )
    merge.add_argument("-o", "--outfile", type=Path, required=True, metavar="PATH", help="the file to write")
    merge.add_argument("--overwrite", action="store_true", help="let PATH be a file that exists")
    show = commands.add_parser("show", help="print model, text and each layer's use of its experts")
    show.add_argument("file", type=Path, metavar="FILE")
    return parser


def _merge(args: argparse.Namespace) -> None:
    from mone_export.artifacts import Calibration
    from mone_export.calibration.merging import merge

    weights = dict(_weight(given) for given in args.weight)
    if repeated := {name for name in args.files if args.files.count(name) > 1}:
        raise MoneError(f"{min(repeated)} is named twice: name each file once")
    files = {f"FILE {name}": Path(name) for name in args.files}
    outfile = check_outputs({"-o": args.outfile}, files, overwrite=args.overwrite)["-o"]
    merged = merge({name: Calibration.load(Path(name)) for name in args.files}, weights=weights)
    merged.save(outfile)
    print(f"wrote {args.outfile}")
    _print_origin(merged)


def _weight(given: str) -> tuple[str, float]:
    name, _, number = given.rpartition("=")
    try:
        return name, float(number)
    except ValueError:
        raise MoneError(f"--weight {given}: write FILE=SHARE, for example a.stats=0.7") from None


def _show(args: argparse.Namespace) -> None:
    from mone_export.artifacts import Calibration
    from mone_export.calibration.usage import RARELY, entropy, rarely_seen

    calibration = Calibration.load(args.file)
    _print_origin(calibration)
    n_expert = calibration.spec.n_expert
    matters = calibration.sensitivity
    mean = sum(matters.values()) / len(matters) if matters else 1.0
    print(
        f"layer  experts seen  entropy (of {math.log2(n_expert):.2f} bits)  in fewer than {RARELY} tokens"
        + "  matters (of mean 1)" * bool(matters)
    )
    for layer, stats in calibration.layers.items():
        seen = int((stats.count > 0).sum())
        rare = len(rarely_seen(stats))
        line = f"{layer:5}  {seen:6} of {n_expert:3}  {entropy(stats):22.2f}  {rare:22}"
        print(line + (f"  {matters[layer] / mean:19.2f}" if matters else ""))


def _print_origin(calibration: "Calibration") -> None:
    spec = calibration.spec
    print(
        f"model    {spec.arch}: {len(spec.moe_layers)} of {spec.n_layer} layers with {spec.n_expert} "
        f"experts, {spec.top_k} used per token (SHA-256 {calibration.model_sha256[:16]})"
    )
    if calibration.made_with:
        print(f"made     {', '.join(f'{name} {value}' for name, value in calibration.made_with.items())}")
    print(f"text     {calibration.n_token} tokens (SHA-256 {calibration.corpus_sha256[:16]})")
    for part in calibration.parts:
        sources = ", ".join(f"{name} {n_token}" for name, n_token in part.sources.items())
        times = "" if part.weight == 1 else f", each counted {part.weight:.3g} times"
        print(f"         {sources} (SHA-256 {part.corpus_sha256[:16]}){times}")
