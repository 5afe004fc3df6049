"""The `mone-export` command: options, progress, exit codes."""

import argparse
import errno
import gc
import logging
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from mone_export import __version__
from mone_export.errors import MoneError, first_line
from mone_export.llama_options import LlamaOptions, add_llama_options
from mone_export.recipe import ALLOCATIONS, AUTO, METHODS, NOVICE_NAMES, SCORE_NAMES
from mone_export.terminal import (
    Display,
    JsonEvents,
    Output,
    ProgressLine,
    as_size,
    logging_to,
    printable,
    steady_output,
)

if TYPE_CHECKING:
    from mone_export.artifacts import Candidate, MoeSpec, Part, Report

_DESCRIPTION = """Prune the experts a mixture-of-experts model needs least, put a constant vector
(a novice) in the place of each, and write a GGUF for llama.cpp."""
_EPILOG = """examples:
  mone-export demo --ratio 0.5 -o demo.gguf
  mone-export allenai/OLMoE-1B-7B-0125 --ratio 0.5 -f my-text.txt --outtype q4_k_m -o olmoe.gguf
  mone-export ./my-model --fit 16GiB -o fits.gguf                  spends the bytes expert by expert
  mone-export ./my-model --ratio 0.25 --stats my-model.stats -o quarter.gguf    keeps the calibration
  mone-export ./my-model --ratio 0.5 --stats my-model.stats -o half.gguf        and uses it again

The files run in the llama.cpp that `mone-llama build` makes."""
_USAGE = "mone-export MODEL (--ratio R | --fit SIZE) -o PATH [options]"
_SCOPES = {"model": "--allocate model", "layer": "the default"}
_MOST_REMARKS, _LONGEST_REMARK = 8, 240  # lines and characters of a report on a terminal


class _Terminated(BaseException):
    """SIGTERM: everything is left as Ctrl-C leaves it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mone-export`; returns the exit status.

    0 done, 1 a problem (one line on stderr says which), 2 usage, 130 interrupted, 143 terminated.
    """
    with steady_output() as output:
        args = parse(argv)
        display: Display = ProgressLine(enabled=not args.quiet, verbose=args.verbose)
        if args.json:
            display = JsonEvents(enabled=not args.quiet)
        with _stoppable():  # until the frames of an interrupted run are gone, and what they hold
            status, message = _run(args, display, output)
        if status:
            if isinstance(display, JsonEvents):
                display.event("error", message=message, status=status)
            print(f"mone-export: {printable(message)}", file=sys.stderr)
    return status


def _run(args: argparse.Namespace, display: Display, output: Output) -> tuple[int, str]:
    """Do what was asked for; returns the exit status, and what to say unless that is 0."""
    try:
        with (
            _rare_collections(),
            _logging(display, verbose=args.verbose, quiet=args.quiet),
            closing(display),
        ):
            if args.made_by:
                _redo(args.made_by, display)
                output.check()
            elif args.restore_check:
                _restore_check(args, display)
                output.check()
            elif args.dry_run:
                _dry_run(args, display)
                output.check()
            else:
                _export(args, display)
        return 0, ""
    except MoneError as error:
        return 1, str(error)
    except KeyboardInterrupt:
        return 130, "interrupted; nothing was written"
    except _Terminated:
        return 143, "terminated; nothing was written"
    except Exception as error:  # a user gets one line of it all the same
        if args.verbose:
            traceback.print_exc()
        known = _known(error)
        return 1, known or f"unexpected {type(error).__name__}: {first_line(error)} (-v shows where)"


def _known(error: Exception) -> str:
    """Return what to do about an error that may come from anywhere: no memory, no space, a changing file."""
    # Python's threads and PyTorch's allocator have their own words for it
    words = ("can't start new thread", "can't allocate memory", "not enough memory")
    without_memory = isinstance(error, RuntimeError) and any(each in str(error) for each in words)
    if without_memory or isinstance(error, MemoryError):
        return "out of memory: free some, pass --stream on, or shorter rows with --ctx-size"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return f"cannot write any more ({error.strerror}): free some space where outputs and $TMPDIR are"
    if type(error).__name__ == "SafetensorError":
        return f"a safetensors file cannot be read any more ({first_line(error)}): get it anew"
    return ""


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C for the length of the block; a second one does not disturb the first.

    What is cleaned up then would be left half removed otherwise. One that comes while an object is finalised
    waits for the end of that: Python would report what is raised there, and go on.
    """
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if _finalises(frame):
            threading.Timer(0.05, _send, (number,)).start()
        elif not stopped:
            stopped = True
            raise _Terminated if number == signal.SIGTERM else KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, stop)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as by nohup
        before[signal.SIGINT] = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(number: int) -> None:
    """Send a signal to the main thread, which may be asleep."""
    if sys.platform == "win32":
        signal.raise_signal(number)
    else:
        signal.pthread_kill(threading.main_thread().ident or 0, number)


def _finalises(frame: FrameType | None) -> bool:
    """Say whether a frame is part of a `__del__`, or of a finaliser of the module `weakref`."""
    while frame is not None:
        name = frame.f_code.co_name
        if name == "__del__" or (name == "__call__" and frame.f_globals.get("__name__") == "weakref"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Let Python look for garbage more rarely: a large model's tensors are many small objects, all in use.

    At its usual pace that took a fourth of the time of a dry run with 19,000 tensors.
    """
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser()
    args = parser.parse_args(argv)
    args.command = shlex.join(["mone-export", *(sys.argv[1:] if argv is None else argv)])
    if args.made_by:
        if beside := {"MODEL": args.model, "-o": args.outfile, "--ratio": args.ratio, "--fit": args.fit}:
            for name in (name for name, value in beside.items() if value is not None):
                parser.error(f"--from prints the command that made a file, and makes none: leave out {name}")
        return args
    if args.model is None:
        parser.error("which model? pass MODEL: a GGUF, a folder, a Hugging Face id, or demo")
    if args.restore_check:
        return args
    if args.ratio is None and args.fit is None and args.plan is None and not _has_novices(args.model):
        parser.error("how many experts should go? pass --ratio, such as 0.5, or a size with --fit")
    if args.outfile is None and args.hf_out is None and not args.dry_run:
        parser.error("where to? pass -o FILE, or -o FOLDER")
    if args.scope:
        if args.allocation not in (None, "model") or (args.scope == "layer" and args.allocation):
            parser.error(f"--scope {args.scope} with --allocate {args.allocation}: leave one of them out")
        args.allocation = "model" if args.scope == "model" else None
        print(f"mone-export: --scope {args.scope} is now {_SCOPES[args.scope]}", file=sys.stderr)
    args.quiet |= os.environ.get("RANK", "0") != "0"  # of torchrun's processes the first one speaks
    return args


def _has_novices(model: str) -> bool:
    from mone_export.source.substituted import has_novices  # longer than all that most command lines need

    return has_novices(model)


def _logging(display: Display, *, verbose: bool, quiet: bool) -> AbstractContextManager[None]:
    """Say what we do, and with -v in detail, and what transformers and llama.cpp's converter say, too."""
    own = logging.DEBUG if verbose else logging.INFO
    return logging_to(
        display,
        level=logging.INFO if verbose else logging.ERROR,
        own_level=logging.ERROR if quiet else own,
    )


class _Group:
    """A group of options; the rarely used ones are listed by `--help-all` only."""

    def __init__(self, parser: argparse.ArgumentParser, title: str, *, everything: bool) -> None:
        self._group, self._everything = parser.add_argument_group(title), everything

    def add(self, *names: str, **options: Any) -> None:
        """Add an option that `--help` lists."""
        self._group.add_argument(*names, **options)

    def add_rare(self, *names: str, **options: Any) -> None:
        """Add an option that `--help-all` lists."""
        self._group.add_argument(
            *names, **options if self._everything else options | {"help": argparse.SUPPRESS}
        )


class _HelpAll(argparse.Action):
    """Prints all options."""

    def __call__(self, *_: Any) -> None:
        make_parser(everything=True).print_help()
        raise SystemExit(0)


def make_parser(*, everything: bool = False) -> argparse.ArgumentParser:
    """Return the command's parser, whose help lists the usual options or all of them."""
    parser = argparse.ArgumentParser(
        prog="mone-export",
        usage=None if everything else _USAGE,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--help-all", action=_HelpAll, nargs=0, help="list every option")
    parser.add_argument("--version", action="version", version=f"mone-export {__version__}")
    _add_input_options(_Group(parser, "input", everything=everything))
    _add_pruning_options(_Group(parser, "pruning", everything=everything))
    _add_output_options(_Group(parser, "output", everything=everything))
    _add_run_options(_Group(parser, "run", everything=everything))
    return parser


def _add_input_options(group: _Group) -> None:
    group.add(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a GGUF, a checkpoint's folder, a Hugging Face id (org/name[@revision]), or demo (built in)",
    )
    group.add(
        "-f",
        "--file",
        dest="files",
        action="append",
        default=[],
        metavar="TEXT[=WEIGHT]",
        help="calibration text, repeatable: plain, or JSON of texts or chats (default: built-in text)",
    )
    group.add_rare(
        "--dataset",
        dest="datasets",
        action="append",
        default=[],
        metavar="ID[:CONFIG][:SPLIT][=WEIGHT]",
        help="calibration text from a Hugging Face dataset, id or folder; repeatable, with or without -f",
    )
    group.add_rare(
        "--field", default="text", metavar="NAME", help="where records hold their text (default text)"
    )
    group.add("--chunks", dest="n_row", type=int, metavar="N", help="rows of text (default 100; demo 64)")
    group.add_rare(
        "-c",
        "--ctx-size",
        dest="seq_len",
        type=int,
        metavar="N",
        help="tokens per row (default 2048; demo 512)",
    )
    group.add_rare(
        "--until-stable",
        type=float,
        metavar="X",
        help="stop reading text when this much of the decision stands while the text doubles, e.g. 0.95",
    )
    group.add(
        "--stats",
        type=Path,
        metavar="FILE",
        help="keep the calibration in FILE, or take it from there if it exists",
    )
    group.add_rare("--revision", metavar="REV", help="branch, tag or commit of a Hugging Face id")
    group.add_rare("--trust-remote-code", action="store_true", help="let code that comes with the model run")


def _add_pruning_options(group: _Group) -> None:
    group.add("--ratio", type=_ratio, metavar="R", help="share of the experts to prune, e.g. 0.5 or 50%%")
    group.add(
        "--fit",
        "--target-size",
        type=_fit,
        metavar="SIZE",
        help="largest size of the file, e.g. 16GiB: spent expert by expert, the types of weights included; "
        "auto: what this machine holds with a text of 8192 tokens, auto:N of N",
    )
    group.add(
        "--stock",
        action="store_true",
        help="write a file that unpatched llama.cpp runs: --method narrow where possible, else drop",
    )
    group.add_rare(
        "--method",
        choices=METHODS,
        help="mone: novices stand in (default); drop: the router loses them, too; dern: others absorb parts; "
        "narrow: few go, and all others have fewer channels, fitted again",
    )
    group.add_rare(
        "--score",
        choices=SCORE_NAMES,
        help="which experts stay: the best by this score (default error; with drop reap, with dern gate)",
    )
    group.add_rare(
        "--novice",
        choices=(AUTO, *NOVICE_NAMES),
        help="what stands in for a pruned expert: with thin, the channels of it that are worth their bytes "
        "(the text runs twice), else a constant, such as least-squares; auto: thin where possible (default)",
    )
    group.add_rare(
        "--allocate",
        dest="allocation",
        choices=ALLOCATIONS,
        help="how many experts each layer keeps: more where errors do more harm (sensitivity, the "
        "default), the same number (even, the default with drop and dern), the best of the whole model by "
        "relative score (model), or by trying (search: starts at sensitivity)",
    )
    _add_plan_options(group)
    group.add_rare("--scope", choices=("layer", "model"), help="model: what --allocate model is called now")
    _add_staying_options(group)
    group.add_rare(
        "--sequential",
        action="store_true",
        help="calibrate each layer after the pruned ones before it: two more passes over the text",
    )
    group.add_rare(
        "--seed", type=int, default=0, metavar="N", help="for --dataset and --score random (default 0)"
    )


def _add_plan_options(group: _Group) -> None:
    group.add_rare(
        "--plan", type=Path, metavar="FILE", help="prune what --plan-out chose, on this or another copy of it"
    )
    group.add_rare("--plan-out", type=Path, metavar="FILE", help="keep which experts were chosen, as JSON")


def _add_staying_options(group: _Group) -> None:
    """Add what keeps experts whatever their score."""
    group.add_rare(
        "--min-kept",
        type=int,
        metavar="N",
        help="experts that must stay in a layer (default: as many as a token uses)",
    )
    group.add_rare(
        "--protect",
        action="append",
        default=[],
        metavar="FILE=N",
        help="the N experts of each layer that this text needs most stay whole, whatever -f says; repeatable",
    )
    group.add_rare(
        "--no-guard",
        dest="guarded",
        action="store_false",
        help="let experts of extreme outputs be pruned like others",
    )


def _add_output_options(group: _Group) -> None:
    group.add(
        "-o",
        "--outfile",
        type=_outfile,
        metavar="PATH",
        help="the GGUF to write; in a folder it is named after model, ratio and type",
    )
    group.add_rare(
        "--hf-out",
        type=Path,
        metavar="DIR",
        help="write the pruned model as a checkpoint, beside -o or alone: with novices as vLLM and the MoNE "
        "authors have them, with --method drop or dern an ordinary one",
    )
    group.add(
        "--outtype",
        default="auto",
        metavar="TYPE",
        help="f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, iq4_xs, ... (default auto: the checkpoint's own)",
    )
    group.add_rare(
        "--overwrite", action="store_true", help="replace an existing file that is no file of mone-export"
    )
    group.add_rare(
        "--imatrix",
        type=Path,
        metavar="FILE",
        help="keep the importance matrix that the file is rounded with, in llama.cpp's format",
    )
    group.add_rare(
        "--no-imatrix",
        dest="with_imatrix",
        action="store_false",
        help="round without one (the calibration sees on the way what it is made of)",
    )
    _add_page_options(group)
    _add_reading_options(group)
    group.add_rare(
        "--split-max-size",
        type=_size,
        metavar="SIZE",
        help="write several files of at most this size, NAME-00001-of-0000N.gguf, e.g. 4G",
    )
    group.add_rare(
        "--mtp",
        choices=("keep", "drop"),
        help="blocks that predict further tokens (default keep; an ordinary file of fewer experts has none)",
    )
    group.add(
        "--dry-run",
        action="store_true",
        help="print plan and sizes, write nothing; without saved --stats the plan has no expert ids",
    )


def _add_reading_options(group: _Group) -> None:
    """Add what reads a file that is there, and writes none."""
    group.add_rare(
        "--restore-check",
        type=Path,
        metavar="ORIGINAL",
        help="write nothing: compare every expert that MODEL, a pruned GGUF, keeps with the ORIGINAL's bytes",
    )
    group.add_rare(
        "--from",
        dest="made_by",
        type=Path,
        metavar="FILE.gguf",
        help="write nothing: print the command that made a file, by what the file says itself",
    )


def _add_page_options(group: _Group) -> None:
    group.add_rare(
        "--report",
        type=Path,
        metavar="FILE.html",
        help="write a page about what was pruned and why, with its figures and its numbers as JSON beside it",
    )
    group.add_rare(
        "--card",
        type=Path,
        metavar="DIR",
        help="write what is published with the file: README.md for the hub, selection.json, SHA256SUMS",
    )


def _add_run_options(group: _Group) -> None:
    group.add(
        "--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps (default auto)"
    )
    group.add_rare(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="precision of the calibration (default auto: the checkpoint's, on a CPU float32 where it fits)",
    )
    group.add_rare(
        "--stream",
        choices=("auto", "on", "off"),
        default="auto",
        help="bring the model's layers into memory one at a time (default auto: if they do not fit together)",
    )
    add_llama_options(group.add_rare)
    group.add_rare(
        "--memory",
        type=_size,
        metavar="SIZE",
        help="memory the calibration may use, e.g. 12G (default: what is free)",
    )
    group.add(
        "--workdir",
        type=Path,
        metavar="DIR",
        help="keep unfinished work in DIR: the same command goes on where it was stopped",
    )
    group.add("-v", "--verbose", action="store_true", help="say more: a line for every stage, too")
    group.add_rare("-q", "--quiet", action="store_true", help="no progress, no report")
    group.add_rare(
        "--json", action="store_true", help="progress and report as JSON on stdout, one event per line"
    )


def request_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of a request: options have their names."""
    from mone_export.request import Request

    values = vars(args)
    values["llama"] = LlamaOptions.of(values)
    return {field.name: values[field.name] for field in fields(Request)}


def _export(args: argparse.Namespace, display: Display) -> None:
    _quiet_transformers(args.model)
    from mone_export.pipeline import export

    report = export(**request_options(args), progress=display)
    display.close()
    if report is None:  # another process has it
        return
    if isinstance(display, JsonEvents):
        display.event("report", **_report_values(report))
    elif not args.quiet:
        _print_report(report)
        for option in ("report", "card"):
            if (place := getattr(args, option)) is not None:
                print(f"{option:8} {place}")


def _redo(file: Path, display: Display) -> None:
    """Print the command alone on stdout, and on stderr what has to be the same beside it."""
    from mone_export.output.redoing import redo

    found = redo(file)
    display.close()
    if isinstance(display, JsonEvents):
        display.event("redo", command=found.command, arguments=found.arguments, notes=found.notes)
        return
    for note in found.notes:
        print(f"# {printable(note)}", file=sys.stderr)
    print(found.command)


def _restore_check(args: argparse.Namespace, display: Display) -> None:
    from mone_export.output.restore_check import restore_check

    n_expert, n_layer = restore_check(Path(args.model), args.restore_check, progress=display)
    display.close()
    if isinstance(display, JsonEvents):
        display.event("restored", n_expert=n_expert, n_layer=n_layer)
        return
    print(f"all {n_expert} experts in {n_layer} layers equal those of {args.restore_check}, byte for byte")


def _dry_run(args: argparse.Namespace, display: Display) -> None:
    _quiet_transformers(args.model)
    from mone_export.artifacts import Part
    from mone_export.cautions import cautions
    from mone_export.pipeline import rehearse

    if args.sequential or args.allocation == "search":
        option = "--sequential" if args.sequential else "--allocate search"
        raise MoneError(f"{option} runs the model, --dry-run does not: leave one out")
    job, chosen = rehearse(**request_options(args), progress=display)
    display.close()
    saved = job.saved
    parts = saved.parts if saved else (Part(job.corpus.sha256, job.corpus.sources),) if job.corpus else ()
    remarks = cautions(job, chosen)
    even = chosen.recipe.allocation == "even" or not job.recipe.ratio
    thin = chosen.recipe.novice == "thin" and not even  # only a second pass knows
    real = job.plan is not None or (saved is not None and not thin)
    decided = real or len(job.candidates) < 2  # without statistics none is better
    counted = real or (decided and even)
    if isinstance(display, JsonEvents):
        display.event(
            "plan",
            spec=asdict(job.source.spec),
            recipe=asdict(chosen.recipe),
            n_kept=chosen.n_kept if counted else None,
            fates=chosen.fates if counted else None,
            pruned={layer.layer: layer.pruned for layer in chosen.layers} if real else None,
            parts=[asdict(part) for part in parts],
            size=job.size if decided else None,
            size_is_exact=counted,
            size_unpruned=job.size_unpruned if decided else None,
            candidates=[_candidate_values(item) for item in job.candidates],
            remarks=remarks,
        )
        return
    _print_spec(job.source.spec)
    for layer in chosen.layers if counted else ():
        pruned = f": {' '.join(map(str, layer.pruned))}" if real and layer.pruned else ""
        counts = f"keep {len(layer.kept)}, prune {len(layer.pruned)}"
        if chosen.n_tier or chosen.mixes_types:
            counts = _listed(chosen.fates[layer.layer])
        print(f"layer {layer.layer:3}  {counts}{pruned}")
    if decided and not counted:
        kept = len(chosen.layers[0].kept)
        known = "after a second pass" if thin else "after a calibration, or with saved --stats"
        print(
            f"layers   keep {kept} of {job.source.spec.n_expert} experts on average; which layer how many is "
            f"known {known}"
        )
    _print_text(parts)
    _print_candidates(job.candidates)
    if decided:
        _print_sizes(job.size_unpruned, job.size, about=not counted)
    else:
        print("note     which of these does least harm is known after a calibration, or with saved --stats")
    for remark in remarks:
        print(f"note     {_cut(remark)}")


def _ratio(text: str) -> float:
    """Return the share that `0.5` or `50%` means."""
    number = text.removesuffix("%")
    try:
        return float(number) / (100 if number != text else 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no share: write 0.5 or 50%") from None


def _outfile(text: str) -> Path:
    """Return the path of a file, or of a folder that is there."""
    if text.endswith(("/", os.sep)) and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}: make it, or name a file")
    return Path(text)


def _fit(text: str) -> int | str:
    return text if text.startswith("auto") else _size(text)


def _size(text: str) -> int:
    """Return the bytes that `512M`, `1.5G`, `16GiB` (of 1024), `16GB` (of 1000) or a plain number mean."""
    match = re.fullmatch(r"([\d.]+) ?([KMGT]?)(I?B)?", text.upper())
    if not match or not any(digit.isdigit() for digit in match[1]) or match[1].count(".") > 1:
        raise argparse.ArgumentTypeError(f"{text} is no size: write 12G, 16GiB or 16GB")
    size = int(float(match[1]) * (1000 if match[3] == "B" else 1024) ** " KMGT".index(match[2] or " "))
    if not size:
        raise argparse.ArgumentTypeError(f"{text} holds nothing: write 12G, 16GiB or 16GB")
    return size


def _print_spec(spec: "MoeSpec") -> None:
    print(
        f"{spec.arch}: {len(spec.moe_layers)} of {spec.n_layer} layers with {spec.n_expert} experts, "
        f"{spec.top_k} used per token"
    )


def _report_values(report: "Report") -> dict[str, Any]:
    """Return a report as JSON has it: paths as text, the stability with its mean."""
    values = asdict(report) | {"outfile": str(report.outfile)}
    values["checkpoint"] = None if report.checkpoint is None else str(report.checkpoint)
    values["candidates"] = [_candidate_values(item) for item in report.candidates]
    if report.stability:
        values["stability"] |= {"mean": report.stability.mean}
    return values


def _candidate_values(item: "Candidate") -> dict[str, Any]:
    return {key: value for key, value in asdict(item).items() if key != "types"}


def _print_report(report: "Report") -> None:
    for path in dict.fromkeys((report.outfile, report.checkpoint or report.outfile)):
        print(f"wrote {path}")
    print(f"experts  {_fates(report)}")
    _print_text(report.parts)
    if report.stability:
        found = report.stability
        print(
            f"stable   {found.mean:.2f} (least stable layer {found.lowest:.2f}): overlap of the experts "
            f"pruned at {found.n_token} tokens and at half of them"
        )
    if spread := report.spread.values():
        print(
            f"spread   {min(spread):.1f} to {max(spread):.1f} bits by layer that unequal treatment can gain"
        )
    _print_candidates(report.candidates)
    _print_sizes(report.size_unpruned, report.size)
    print(f"time     {_durations(report.seconds)}")
    for remark in report.remarks[:_MOST_REMARKS]:
        print(f"note     {_cut(remark)}")
    if (n_more := len(report.remarks) - _MOST_REMARKS) > 0:
        print(f"note     {n_more} more notes like these: --json has them all")
    if report.sha256:
        print(f"sha256   {report.sha256}")
    print(f"run      {_how_to_run(report)}")


def _fates(report: "Report") -> str:
    """Say what became of the experts: how many are kept, or all that there is between that and a constant."""
    counts = sum(map(Counter, report.fates.values()), Counter[str]())
    if not counts.keys() <= {"whole", "constant"}:
        return f"{_listed(counts)} in {len(report.fates)} layers"
    kept = report.n_kept.values()
    each = f"{min(kept)} to {max(kept)}" if min(kept) < max(kept) else f"{min(kept)}"
    return f"{each} kept in each of {len(kept)} layers, {sum(kept)} in all"


def _listed(fates: Mapping[str, int]) -> str:
    """List how many experts have which fate."""
    from mone_export.artifacts import in_order

    return ", ".join(f"{fates[fate]} {'of ' if fate[0].isdigit() else ''}{fate}" for fate in in_order(fates))


def _cut(remark: str) -> str:
    """Return the beginning of a long remark, and how much is missing."""
    if len(remark) <= _LONGEST_REMARK:
        return remark
    return f"{remark[:_LONGEST_REMARK]}... ({len(remark) - _LONGEST_REMARK} characters more with --json)"


def _how_to_run(report: "Report") -> str:
    """Return the command that runs the file."""
    file = shlex.quote(str(report.outfile))
    if report.outfile == report.checkpoint:
        loader = "mone_export.load_pruned" if report.recipe.method == "mone" else "from_pretrained"
        return f"vllm serve {file}    (or with transformers: {loader})"
    ordinary = all(fates.keys() <= {"whole"} for fates in report.fates.values())
    if report.recipe.method == "mone" and not ordinary:
        return f"$(mone-llama path)/llama-cli -m {file}{_once()}"
    return f"llama-cli -m {file}    (any llama.cpp runs it)"


def _once() -> str:
    """Return what has to be done before, once."""
    from mone_export import runtime

    try:
        runtime.path()
    except MoneError:
        return "    (after `mone-llama build`, once)"
    return ""


def _print_text(parts: Sequence["Part"]) -> None:
    for part in parts:
        sources = ", ".join(f"{name} {n_token} tokens" for name, n_token in part.sources.items())
        print(f"text     {sources}{'' if part.weight == 1 else f', weighted {part.weight:.3g}'}")


def _print_candidates(fitting: Sequence["Candidate"]) -> None:
    from mone_export.fitting import answer, describe

    for item in fitting:
        print(f"fits     {describe(item)}: {as_size(item.size)}")
    if fitting and fitting[0].error is not None:
        print(f"answer   {answer(fitting)}")


def _print_sizes(unpruned: int, size: int, *, about: bool = False) -> None:
    exactly = "about " if about else ""
    whole = "" if about else f" ({size} bytes)"
    of = "" if size == unpruned else "about "
    print(f"size     {exactly}{as_size(size)}{whole}, {size / unpruned:.0%} of {of}{as_size(unpruned)}")


def _durations(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{stage} {duration:.1f} s" for stage, duration in seconds.items())


def _quiet_transformers(model: str) -> None:
    """Keep Hugging Face's own bars and notices off the terminal: errors reach the user as ours."""
    level = os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    if Path(model).is_file():  # a GGUF, of which it loads nothing
        return
    from transformers.utils import logging as transformers_logging

    # The variable alone is read once, when transformers is first imported: perhaps before this.
    transformers_logging.set_verbosity(transformers_logging.log_levels.get(level, logging.ERROR))
    transformers_logging.disable_progress_bar()
