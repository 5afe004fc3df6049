"""The `mone-export` command: options, progress, exit codes."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mone_export import __version__
from mone_export.errors import MoneError
from mone_export.terminal import Display, JsonEvents, ProgressLine, logging_to

if TYPE_CHECKING:
    from mone_export.artifacts import Candidate, MoeSpec, Part, Report

_DESCRIPTION = (
    "Prune the experts a mixture-of-experts model can spare, put a constant vector (a novice) in the place "
    "of each, and write a GGUF for llama.cpp."
)
_EPILOG = """examples:
  mone-export demo --ratio 0.5 -o demo.gguf
  mone-export allenai/OLMoE-1B-7B-0125 --ratio 0.5 -f my-text.txt --outtype q4_k_m -o olmoe.gguf
  mone-export ./my-model --fit 16GiB -o fits.gguf                  prune, or only quantise? finds out
  mone-export ./my-model --ratio 0.25 --stats my-model.stats -o quarter.gguf    keeps the calibration
  mone-export ./my-model --ratio 0.5 --stats my-model.stats -o half.gguf        and uses it again

The files run in the llama.cpp that `mone-llama build` makes."""
_DEMO_CHUNKS = (64, 512)  # rows, tokens: the demo model is small and was trained on short rows
_PAPER_CHUNKS = (100, 2048)  # MoNE's 100 samples of 2048 tokens


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mone-export`; returns the exit status: 0 done, 1 a MoneError, 2 usage, 130 interrupted."""
    args = _parse(argv)
    display: Display = ProgressLine(enabled=not args.quiet, verbose=args.verbose)
    if args.json:
        display = JsonEvents(enabled=not args.quiet)
    try:
        with _logging(display, verbose=args.verbose, quiet=args.quiet), closing(display):
            return _dry_run(args, display) if args.dry_run else _export(args, display)
    except MoneError as error:
        status, message = 1, str(error)
    except KeyboardInterrupt:
        status, message = 130, "interrupted; nothing was written"
    if isinstance(display, JsonEvents):
        display.event("error", message=message, status=status)
    print(f"mone-export: {message}", file=sys.stderr)
    return status


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; `--stock` decides the method where none is named."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.stock and args.method == "mone":
        parser.error("--stock with --method mone: novices need the patched llama.cpp; leave one of them out")
    if args.ratio is None and args.fit is None:
        parser.error("how many experts should go? pass --ratio, such as 0.5, or a size with --fit")
    args.method = args.method or ("drop" if args.stock else "mone")
    args.quiet |= os.environ.get("RANK", "0") != "0"  # of torchrun's processes the first one speaks
    return args


def _logging(display: Display, *, verbose: bool, quiet: bool) -> AbstractContextManager[None]:
    """Say what we do, and with -v in detail, and what transformers and llama.cpp's converter say, too."""
    own = logging.DEBUG if verbose else logging.INFO
    return logging_to(
        display,
        level=logging.INFO if verbose else logging.ERROR,
        own_level=logging.ERROR if quiet else own,
    )


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
        dest="files",
        action="append",
        default=[],
        metavar="TEXT[=WEIGHT]",
        help="calibration text, repeatable: plain, or .jsonl of texts or chats (default: built-in text)",
    )
    group.add_argument(
        "--dataset",
        dest="datasets",
        action="append",
        default=[],
        metavar="ID[:CONFIG][:SPLIT][=WEIGHT]",
        help="calibration text from a Hugging Face dataset, id or folder; repeatable, with or without -f",
    )
    group.add_argument(
        "--field", default="text", metavar="NAME", help="where records hold their text (default text)"
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
        "--until-stable",
        type=float,
        metavar="X",
        help="stop reading text when this much of the decision stands while the text doubles, e.g. 0.95",
    )
    group.add_argument(
        "--stats",
        type=Path,
        metavar="FILE",
        help="keep the calibration in FILE, or take it from there if it exists",
    )


def _add_pruning_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--ratio", type=float, metavar="R", help="share of the experts to prune, e.g. 0.5")
    group.add_argument(
        "--fit",
        "--target-size",
        type=_size,
        metavar="SIZE",
        help="largest size of the file, e.g. 16GiB: what --ratio and --outtype leave open is chosen to fit",
    )
    group.add_argument(
        "--method",
        choices=_METHODS,
        help="mone: novices stand in (default); drop: the router loses them, too; dern: others absorb parts",
    )
    group.add_argument(
        "--stock",
        action="store_true",
        help="write a file that unpatched llama.cpp runs: --method drop, unless another is named",
    )
    group.add_argument(
        "--score",
        choices=_SCORES,
        help="which experts stay: the best by this score (default error; with drop reap, with dern gate)",
    )
    group.add_argument(
        "--novice",
        choices=_NOVICES,
        default="least-squares",
        help="what stands in for a pruned expert (default least-squares)",
    )
    group.add_argument(
        "--min-kept",
        type=int,
        metavar="N",
        help="experts that must stay in a layer (default: as many as a token uses)",
    )
    group.add_argument(
        "--scope",
        choices=("layer", "model"),
        default="layer",
        help="layer: prune the same share of each (default); model: layers compete by relative score",
    )
    group.add_argument(
        "--allocate",
        choices=("auto", "even", "sensitivity", "search"),
        default="auto",
        help="sensitivity: layers that matter more keep more experts (default, but even with --scope model, "
        "drop and dern); search: start there, and measure the model",
    )
    group.add_argument(
        "--sequential",
        action="store_true",
        help="calibrate each layer behind the pruned ones before it: two more passes over the text",
    )
    group.add_argument(
        "--no-guard",
        dest="guarded",
        action="store_false",
        help="let experts of extreme outputs be pruned like others",
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="for --dataset and --score random (default 0)"
    )


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
        "--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps (default auto)"
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="precision of the calibration (default auto: the checkpoint's, on a CPU float32 where it fits)",
    )
    group.add_argument(
        "--stream",
        choices=("auto", "on", "off"),
        default="auto",
        help="bring the model's layers into memory one at a time (default auto: if they do not fit together)",
    )
    group.add_argument(
        "--memory",
        type=_size,
        metavar="SIZE",
        help="memory the calibration may use, e.g. 12G (default: what is free)",
    )
    group.add_argument(
        "--workdir",
        type=Path,
        metavar="DIR",
        help="keep unfinished work in DIR: the same command goes on where it was stopped",
    )
    group.add_argument("-v", "--verbose", action="store_true", help="say more: a line for every stage, too")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress, no report")
    group.add_argument(
        "--json", action="store_true", help="progress and report as JSON on stdout, one event per line"
    )


# written out so that `--help` need not import torch; a test holds them against the registries
_METHODS = ("mone", "drop", "dern")
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
    "aimer",
)
_NOVICES = ("mean", "gate-weighted", "least-squares", "zero", "joint")


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of a request: most options have their name."""
    from mone_export.request import Request

    n_row, seq_len = _DEMO_CHUNKS if args.model == "demo" else _PAPER_CHUNKS
    values = vars(args) | {
        "n_row": n_row if args.chunks is None else args.chunks,
        "seq_len": seq_len if args.ctx_size is None else args.ctx_size,
    }
    return {field.name: values[field.name] for field in fields(Request)}


def _export(args: argparse.Namespace, display: Display) -> int:
    _quiet_transformers()
    from mone_export.pipeline import export

    report = export(**_options(args), progress=display)
    display.close()
    if report is None:  # another process has it
        return 0
    if isinstance(display, JsonEvents):
        display.event("report", **_report_values(report))
    elif not args.quiet:
        _print_report(report)
    return 0


def _dry_run(args: argparse.Namespace, display: Display) -> int:
    _quiet_transformers()
    from mone_export.artifacts import Part
    from mone_export.deciding import decide, file_size, settle
    from mone_export.pruning.planning import plan_without_scores
    from mone_export.request import Request, prepare

    if args.sequential or args.allocate == "search":
        option = "--sequential" if args.sequential else "--allocate search"
        raise MoneError(f"{option} runs the model, --dry-run does not: leave one out")
    job = prepare(Request(**_options(args)), progress=display)
    if saved := job.saved:
        job = settle(job, saved) if job.candidates else job
        chosen, parts = decide(job, saved), saved.parts
        size = file_size(job, chosen)
    else:
        assert job.corpus is not None
        chosen = plan_without_scores(job.spec, ratio=job.ratio, min_kept=args.min_kept, method=args.method)
        parts, size = (Part(job.corpus.sha256, job.corpus.sources),), job.size
    decided = saved is not None or len(job.candidates) < 2  # without statistics none is better
    counted = saved is not None or (decided and (job.scope == "layer" or not job.ratio))
    if isinstance(display, JsonEvents):
        display.event(
            "plan",
            spec=asdict(job.spec),
            n_kept=chosen.n_kept if counted else None,
            pruned={layer.layer: layer.pruned for layer in chosen.layers} if saved else None,
            parts=[asdict(part) for part in parts],
            size=size if decided else None,
            size_unpruned=job.size_unpruned if decided else None,
            candidates=[_candidate_values(item) for item in job.candidates],
        )
        return 0
    _print_spec(job.spec)
    for layer in chosen.layers if counted else ():
        pruned = f": {' '.join(map(str, layer.pruned))}" if saved else ""
        print(f"layer {layer.layer:3}  keep {len(layer.kept)}, prune {len(layer.pruned)}{pruned}")
    if decided and not counted:
        kept = len(chosen.layers[0].kept)
        print(
            f"layers   keep {kept} of {job.spec.n_expert} experts on average, each how many is known after a "
            "calibration, or with saved --stats"
        )
    _print_text(parts)
    _print_candidates(job.candidates)
    if decided:
        _print_sizes(job.size_unpruned, size)
    else:
        print(
            "note     which of these does the least harm is known after a calibration, or with saved --stats"
        )
    return 0


def _size(text: str) -> int:
    """Return the bytes that `512M`, `1.5G`, `16GiB` (of 1024), `16GB` (of 1000) or a plain number mean."""
    match = re.fullmatch(r"([\d.]+) ?([KMGT]?)(I?B)?", text.upper())
    if not match or match[1].count(".") > 1:
        raise argparse.ArgumentTypeError(f"{text} is no size: write 12G, 16GiB or 16GB")
    return int(float(match[1]) * (1000 if match[3] == "B" else 1024) ** " KMGT".index(match[2] or " "))


def _print_spec(spec: "MoeSpec") -> None:
    print(
        f"{spec.arch}: {len(spec.moe_layers)} of {spec.n_layer} layers with {spec.n_expert} experts, "
        f"{spec.top_k} used per token"
    )


def _report_values(report: "Report") -> dict[str, Any]:
    """Return a report as JSON has it: paths as text, the stability with its mean."""
    values = asdict(report) | {"outfile": str(report.outfile)}
    values["candidates"] = [_candidate_values(item) for item in report.candidates]
    if report.stability:
        values["stability"] |= {"mean": report.stability.mean}
    return values


def _candidate_values(item: "Candidate") -> dict[str, Any]:
    return {key: value for key, value in asdict(item).items() if key != "types"}


def _print_report(report: "Report") -> None:
    print(f"wrote {report.outfile}")
    kept = report.n_kept.values()
    each = f"{min(kept)} to {max(kept)}" if min(kept) < max(kept) else f"{min(kept)}"
    print(f"experts  {each} kept in each of {len(kept)} layers, {sum(kept)} in all")
    _print_text(report.parts)
    if report.stability:
        found = report.stability
        print(
            f"stable   {found.mean:.2f} (least stable layer {found.lowest:.2f}): overlap of the experts "
            f"pruned at {found.n_token} tokens and at half of them"
        )
    _print_candidates(report.candidates)
    _print_sizes(report.size_unpruned, report.size)
    print(f"time     {_durations(report.seconds)}")
    for remark in report.remarks:
        print(f"note     {remark}")


def _print_text(parts: Sequence["Part"]) -> None:
    for part in parts:
        sources = ", ".join(f"{name} {n_token} tokens" for name, n_token in part.sources.items())
        print(f"text     {sources}{'' if part.weight == 1 else f', weighted {part.weight:.3g}'}")


def _print_candidates(fitting: Sequence["Candidate"]) -> None:
    from mone_export.fitting import answer, describe

    for item in fitting:
        print(f"fits     {describe(item)}: {item.size / 1e6:.1f} MB")
    if fitting and fitting[0].error is not None:
        print(f"answer   {answer(fitting)}")


def _print_sizes(unpruned: int, size: int) -> None:
    print(f"size     {size / 1e6:.1f} MB ({size} bytes), {size / unpruned:.0%} of {unpruned / 1e6:.1f} MB")


def _durations(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{stage} {duration:.1f} s" for stage, duration in seconds.items())


def _quiet_transformers() -> None:
    """Keep Hugging Face's own bars and notices off the terminal: errors reach the user as ours."""
    level = os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    from transformers.utils import logging as transformers_logging

    # The variable alone is read once, when transformers is first imported: perhaps before this.
    transformers_logging.set_verbosity(transformers_logging.log_levels.get(level, logging.ERROR))
    transformers_logging.disable_progress_bar()
