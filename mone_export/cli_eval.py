"""The `mone-eval` command: what a file is worth, beside its original and beside other files."""

import argparse
import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from mone_export import __version__
from mone_export.errors import MoneError
from mone_export.evaluation.results import percent, shown
from mone_export.llama_options import LlamaOptions, add_llama_options
from mone_export.paths import check_card, check_outputs, page_outputs
from mone_export.terminal import ProgressLine, as_size, logging_to, steady_output

if TYPE_CHECKING:
    from mone_export.evaluation.results import Evaluation, FileResult, Measured
    from mone_export.publishing.record import Record

_DESCRIPTION = """Measure GGUF files: perplexity, divergence from the original, use of constants and thin
experts, loops, speed, memory, multiple choice."""
_EPILOG = """examples:
  mone-eval half.gguf --against full.gguf
  mone-eval half.gguf fit.gguf --against full.gguf -f code=src.txt -f chat=talk.jsonl -o found.json
  mone-eval half.gguf --against full.gguf --tasks hellaswag_val_full.txt

docs/evaluation.md says what each number means."""
_BUILT_IN = "the built-in texts: Python's own sources, and prose (docstrings, manuals); pass yours with -f"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mone-eval`; returns the exit status: 0 done, 1 a MoneError, 2 usage, 130 interrupted."""
    with steady_output() as output:
        words = sys.argv[1:] if argv is None else list(argv)
        args = make_parser().parse_args(words)
        display = ProgressLine(enabled=not args.quiet, verbose=args.verbose)
        level = logging.DEBUG if args.verbose else logging.ERROR if args.quiet else logging.INFO
        found: Evaluation | None = None
        try:
            with logging_to(display, level=logging.ERROR, own_level=level):
                records = _checked(args)
                with closing(display):
                    found = _evaluated(args, shlex.join(["mone-eval", *words]), display)
                # it may have taken hours: what cannot fail comes first
                _print(found, built_in=not args.texts)
                if args.json:
                    found.save(args.json)
                if records:
                    _publish(found, records, args)
            output.check()
        except MoneError as error:
            print(f"mone-eval: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            left = "not everything was written" if found else "nothing was written"
            print(f"mone-eval: interrupted; {left}", file=sys.stderr)
            return 130
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(
        prog="mone-eval",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mone-eval {__version__}")
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="a GGUF, the first of several where it is split")
    add("--against", type=Path, metavar="ORIGINAL", help="the unpruned GGUF to compare with")
    add(
        *("-f", "--file"),
        dest="texts",
        action="append",
        default=[],
        metavar="[NAME=]TEXT",
        help="a text, repeatable: plain, or JSON of texts or chats (default: built-in Python, and prose)",
    )
    add("--field", default="text", metavar="NAME", help="where records hold their text (default text)")
    add(
        *("-c", "--ctx-size"),
        dest="n_ctx",
        type=int,
        default=512,
        metavar="N",
        help="tokens of a chunk (512)",
    )
    add(
        "--chunks", dest="n_chunk", type=int, default=40, metavar="N", help="chunks of each text (at most 40)"
    )
    add(
        *("-n", "--n-predict"),
        dest="n_predict",
        type=int,
        default=128,
        metavar="N",
        help="tokens of each continuation in which loops are looked for (default 128; 0: none are written)",
    )
    _add_tasks(add)
    add("--no-speed", dest="speed", action="store_false", help="do not measure speed and memory")
    add_llama_options(add)
    _add_outputs(add)
    add("-v", "--verbose", action="store_true", help="say more")
    add("-q", "--quiet", action="store_true", help="no progress")
    return parser


def _add_tasks(add: Callable[..., object]) -> None:
    add(
        "--tasks",
        nargs="+",
        default=[],
        metavar="[KIND=]TASK",
        help="questions in llama.cpp's formats; KIND is hellaswag, winogrande or multiple-choice",
    )
    add(
        "--lm-eval",
        type=lambda names: names.split(","),
        default=[],
        metavar="TASK[,TASK...]",
        help="tasks of lm-evaluation-harness, or a folder or YAML file of yours; paper: the nine of MoNE",
    )


def _add_outputs(add: Callable[..., object]) -> None:
    add("-o", "--json", type=Path, metavar="PATH", help="write all that was measured as JSON")
    add(
        "--report",
        type=Path,
        metavar="FILE.html",
        help="write it as a page, or into that of mone-export --report",
    )
    add("--card", type=Path, metavar="DIR", help="write it into a card, as of mone-export --card")
    add("--overwrite", action="store_true", help="let PATH be a file that exists")


def _checked(args: argparse.Namespace) -> "tuple[Record, Record] | None":
    """Check all places that are written to; returns the records of page and card."""
    read = {"FILE": args.files, **({"--against": args.against} if args.against else {})}
    outputs = {"-o": args.json} if args.json else {}
    outputs |= page_outputs(args.report, overwrite=args.overwrite) if args.report else {}
    args.json = check_outputs(outputs, read, overwrite=args.overwrite).get("-o")
    return _check_pages(args)


def _evaluated(args: argparse.Namespace, command: str, display: ProgressLine) -> "Evaluation":
    from mone_export.evaluation.evaluate import Wanted, evaluate

    names = ("texts", "field", "n_ctx", "n_chunk", "n_predict", "speed", "tasks", "lm_eval")
    wanted = Wanted(**{name: getattr(args, name) for name in names}, llama=LlamaOptions.of(vars(args)))
    return evaluate(args.files, wanted, against=args.against, command=command, progress=display)


def _publish(found: "Evaluation", records: "tuple[Record, Record]", args: argparse.Namespace) -> None:
    from mone_export.publishing.publishing import publish_evaluation

    publish_evaluation(found, records, page=args.report, card=args.card)


def _check_pages(args: argparse.Namespace) -> "tuple[Record, Record] | None":
    """Return the records of page and card that the first file's numbers go to; None where none is wanted."""
    if args.report is None and args.card is None:
        return None
    from mone_export.publishing.publishing import records_of

    if args.card is not None:
        check_card(args.card)
    return records_of(args.files[0], page=args.report, card=args.card)


def _print(found: "Evaluation", *, built_in: bool) -> None:
    files = [*([found.against] if found.against else []), *found.files]
    if built_in:
        print(f"texts    {_BUILT_IN}")
    for rows in (_text_rows(files), _slot_rows(found.files), _probe_rows(files, against=bool(found.against))):
        _print_rows(rows)
    _print_rows(_cost_rows(files))
    _print_rows(_task_rows(files))
    for pair in found.pairs:
        kl = f", KL divergence {_signed(pair.kl_mean)}" if pair.kl_mean else ""
        print(
            f"pair     {pair.first} less {pair.second} on {pair.text}: ln perplexity "
            f"{_signed(pair.log_perplexity)}{kl}"
        )
    for warning in found.warnings:
        print(f"note     {warning}")


def _text_rows(files: Sequence["FileResult"]) -> Iterator[list[str]]:
    yield ["text", "file", "perplexity", "KL divergence", "median", "99%", "99.9%", "same top"]
    for number in range(len(files[0].texts)):
        for file in files:
            text = file.texts[number]
            divergences = (text.kl_mean, text.kl_median, text.kl_99, text.kl_999)
            cells = [shown(each) for each in (text.perplexity, *divergences)]
            yield [text.name, file.file, *cells, percent(text.same_top)]


def _slot_rows(files: Sequence["FileResult"]) -> Iterator[list[str]]:
    yield ["routed slots", "text", "whole", "thin", "constant", "most constant"]
    for file in files:
        for text in file.texts:
            if not text.slots:
                continue
            shares = {layer: _by_kind(own) for layer, own in text.slots.items()}
            means = [
                sum(own[kind] for own in shares.values()) / len(shares)
                for kind in ("whole", "thin", "constant")
            ]
            layer = max(shares, key=lambda each: shares[each]["constant"])
            most = f"{shares[layer]['constant']:.1%} in layer {layer}" if means[2] else ""
            yield [file.file, text.name, *(f"{mean:.1%}" for mean in means), most]


def _by_kind(shares: Mapping[str, float]) -> dict[str, float]:
    found = {"whole": 0.0, "thin": 0.0, "constant": 0.0}
    for fate, share in shares.items():
        found[fate.split()[0] if fate.split()[0] in found else "thin"] += share
    return found


def _probe_rows(files: Sequence["FileResult"], *, against: bool) -> Iterator[list[str]]:
    if not any(file.probe for file in files):
        return
    yield ["continuations", "manner", "repeated", "distinct", "ended", "closed", "drift", "from the original"]
    for number, file in enumerate(files):
        if not (found := file.probe):
            continue
        verdict = ""
        if against and number:
            verdict = f"differs: {', '.join(found.differing)}" if found.differing else "not clearly different"
        for manner, own in (("greedy", found.greedy), ("sampled", found.sampled)):
            shares = [percent(each) for each in (own.repeated, own.distinct, own.ended, own.closed)]
            yield [file.file, manner, *shares, shown(own.drift), verdict]
            verdict = ""


def _cost_rows(files: Sequence["FileResult"]) -> Iterator[list[str]]:
    yield ["costs", "size", "resident", "prefill", "decode"]
    for file in files:
        speeds = [f"{shown(each)} tokens/s" if each else "" for each in (file.prefill, file.decode)]
        resident = as_size(file.resident) if file.resident else ""
        yield [file.file, as_size(file.size), resident, *speeds]


def _task_rows(files: Sequence["FileResult"]) -> Iterator[list[str]]:
    if not files[0].tasks:
        return
    yield ["task", "file", "questions", "right", "chance", ""]
    for number in range(len(files[0].tasks)):
        for file in files:
            task = file.tasks[number]
            right = percent(task.accuracy)
            chance = "" if task.chance is None else f"{task.chance:.1%}"
            remark = "the original is at chance: says nothing" if task.blind else ""
            yield [task.name, file.file, str(task.n_question), right, chance, remark]


def _print_rows(rows: Iterator[list[str]]) -> None:
    """Print rows of a table under its heading, columns aligned; of a table without rows nothing."""
    table = list(rows)
    if len(table) < 2:
        return
    used = [column for column in range(len(table[0])) if any(row[column] for row in table[1:])]
    widths = [max(len(row[column]) for row in table) for column in used]
    for row in table:
        print("  ".join(row[at].ljust(width) for at, width in zip(used, widths, strict=True)).rstrip())
    print()


def _signed(number: "Measured | None") -> str:
    return ("+" if number and number.value >= 0 else "") + shown(number)


if __name__ == "__main__":
    sys.exit(main())
