"""The `mone-export` command: options, progress, exit codes."""

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from mone_export import __version__
from mone_export.errors import MoneError
from mone_export.terminal import ProgressLine

if TYPE_CHECKING:
    from mone_export.artifacts import MoeSpec, Report

_DESCRIPTION = (
    "Prune the experts a mixture-of-experts model can spare, put a constant vector (a novice) in the place "
    "of each, and write a GGUF for llama.cpp."
)
_EPILOG = """examples:
  mone-export demo --ratio 0.5 -o demo.gguf
  mone-export allenai/OLMoE-1B-7B-0125 --ratio 0.5 -f my-text.txt --outtype q4_k_m -o olmoe.gguf
  mone-export ./my-model --ratio 0.25 --stats my-model.stats -o quarter.gguf    keeps the calibration
  mone-export ./my-model --ratio 0.5 --stats my-model.stats -o half.gguf        and uses it again

The files run in the llama.cpp that `mone-llama build` makes."""
_DEMO_CHUNKS = (64, 512)  # rows, tokens: the demo model is small and was trained on short rows
_PAPER_CHUNKS = (100, 2048)  # MoNE's 100 samples of 2048 tokens


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mone-export`; returns the exit status: 0 done, 1 a MoneError, 2 usage, 130 interrupted."""
    args = _parser().parse_args(argv)
    _set_up_logging(verbose=args.verbose, quiet=args.quiet)
    try:
        return _dry_run(args) if args.dry_run else _export(args)
    except MoneError as error:
        print(f"mone-export: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mone-export: interrupted; nothing was written", file=sys.stderr)
        return 130


def _set_up_logging(*, verbose: bool, quiet: bool) -> None:
    """Say what we do, and with -v what transformers and llama.cpp's converter say, too."""
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(message)s")
    logging.getLogger("mone_export").setLevel(logging.ERROR if quiet else logging.INFO)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mone-export",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mone-export {__version__}")
    _add_input_options(parser.add_argument_group("input"))
    _add_pruning_options(parser.add_argument_group("pruning"))
    _add_output_options(parser.add_argument_group("output"))
    _add_run_options(parser.add_argument_group("run"))
    return parser


def _add_input_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("model", metavar="MODEL", help="folder, Hugging Face id, or demo (the built-in model)")
    group.add_argument(
        "-f",
        "--file",
        type=Path,
        action="append",
        default=[],
        metavar="TEXT",
        help='calibration text, repeatable: plain, or .jsonl with a "text" field (default: built-in text)',
    )
    group.add_argument(
        "--chunks",
        type=int,
        metavar="N",
        help=f"rows of text (default {_PAPER_CHUNKS[0]}; demo {_DEMO_CHUNKS[0]})",
    )
    group.add_argument(
        "-c",
        "--ctx-size",
        type=int,
        metavar="N",
        help=f"tokens per row (default {_PAPER_CHUNKS[1]}; demo {_DEMO_CHUNKS[1]})",
    )
    group.add_argument(
        "--stats",
        type=Path,
        metavar="FILE",
        help="keep the calibration in FILE, or take it from there if it exists",
    )


def _add_pruning_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--ratio",
        type=float,
        required=True,
        metavar="R",
        help="share of the experts to prune in each layer, e.g. 0.5",
    )
    group.add_argument(
        "--score",
        choices=_SCORES,
        default="mone",
        help="which experts stay: the best by this score (default mone)",
    )
    group.add_argument(
        "--novice", choices=_NOVICES, default="mean", help="what stands in for a pruned expert (default mean)"
    )
    group.add_argument(
        "--min-kept",
        type=int,
        metavar="N",
        help="experts that must stay in a layer (default: as many as a token uses)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="for --score random (default 0)")


def _add_output_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("-o", "--outfile", type=Path, required=True, metavar="PATH", help="the GGUF to write")
    group.add_argument(
        "--outtype",
        default="auto",
        metavar="TYPE",
        help="f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, iq4_xs, ... (default auto: the checkpoint's own)",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="print plan and exact sizes, write nothing; without saved --stats the plan has no expert ids",
    )


def _add_run_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N (default auto)"
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="precision of the calibration (default auto: the checkpoint's, on a CPU float32 where it fits)",
    )
    group.add_argument("-v", "--verbose", action="store_true", help="say more")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress, no report")


# written out so that `--help` need not import torch; a test holds them against the registries
_SCORES = (
    "mone",
    "mone-paper",
    "frequency",
    "gate",
    "variance",
    "ean",
    "reap",
    "man",
    "msan",
    "error",
    "random",
)
_NOVICES = ("mean", "gate-weighted", "least-squares", "zero")


def _export(args: argparse.Namespace) -> int:
    _quiet_transformers()
    from mone_export.pipeline import export

    n_row, seq_len = _chunks(args)
    with closing(ProgressLine(enabled=not args.quiet)) as progress:
        report = export(
            args.model,
            ratio=args.ratio,
            outfile=args.outfile,
            outtype=args.outtype,
            files=args.file,
            n_row=n_row,
            seq_len=seq_len,
            score=args.score,
            novice=args.novice,
            min_kept=args.min_kept,
            stats=args.stats,
            device=args.device,
            dtype=args.dtype,
            seed=args.seed,
            progress=progress,
        )
    if not args.quiet:
        _print_report(report)
    return 0


def _dry_run(args: argparse.Namespace) -> int:
    _quiet_transformers()
    from mone_export.artifacts import Calibration
    from mone_export.model import inspect, resolve
    from mone_export.pipeline import announce
    from mone_export.planning import plan, plan_without_scores
    from mone_export.scoring import score

    path = resolve(args.model)
    spec = inspect(path)
    size_unpruned, size = announce(
        path,
        spec,
        ratio=args.ratio,
        min_kept=args.min_kept,
        score=args.score,
        novice=args.novice,
        outfile=args.outfile,
        outtype=args.outtype,
    )
    chosen = plan_without_scores(spec, ratio=args.ratio, min_kept=args.min_kept)
    has_ids = args.stats is not None and args.stats.exists()
    if has_ids:
        calibration = Calibration.load(args.stats)
        if calibration.spec != spec:
            raise MoneError(f"{args.stats} was made from another model: choose another --stats file")
        scores = score(calibration, args.score, seed=args.seed)
        chosen = plan(scores, ratio=args.ratio, min_kept=args.min_kept)
    _print_spec(spec)
    for layer in chosen.layers:
        pruned = f": {' '.join(map(str, layer.pruned))}" if has_ids else ""
        print(f"layer {layer.layer:3}  keep {len(layer.kept)}, prune {len(layer.pruned)}{pruned}")
    _print_sizes(size_unpruned, size)
    return 0


def _chunks(args: argparse.Namespace) -> tuple[int, int]:
    n_row, seq_len = _DEMO_CHUNKS if args.model == "demo" else _PAPER_CHUNKS
    return (
        n_row if args.chunks is None else args.chunks,
        seq_len if args.ctx_size is None else args.ctx_size,
    )


def _print_spec(spec: "MoeSpec") -> None:
    print(
        f"{spec.arch}: {len(spec.moe_layers)} of {spec.n_layer} layers with {spec.n_expert} experts, "
        f"{spec.top_k} used per token"
    )


def _print_report(report: "Report") -> None:
    print(f"wrote {report.outfile}")
    kept = sorted(set(report.n_kept.values()))
    print(f"experts  {' to '.join(map(str, kept))} kept in each of {len(report.n_kept)} layers")
    _print_sizes(report.size_unpruned, report.size)
    print(f"time     {_durations(report.seconds)}")
    for remark in report.remarks:
        print(f"note     {remark}")


def _print_sizes(unpruned: int, size: int) -> None:
    print(f"size     {size / 1e6:.1f} MB ({size} bytes), {size / unpruned:.0%} of {unpruned / 1e6:.1f} MB")


def _durations(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{stage} {duration:.1f} s" for stage, duration in seconds.items())


def _quiet_transformers() -> None:
    """Keep transformers' own bars and notices off the terminal: errors reach the user as ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
