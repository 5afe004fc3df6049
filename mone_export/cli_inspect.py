"""The `mone-inspect` command: what a file is, what is in it, what it needs; nothing heavy is imported."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from mone_export.errors import MoneError
from mone_export.terminal import as_size, printable, steady_output

if TYPE_CHECKING:
    from mone_export.inspection.anatomy import Anatomy, LayerAnatomy, Saving

_DESCRIPTION = """Say what a file is: a GGUF of any kind, a model's folder or Hugging Face id, statistics
(--stats) or a plan (--plan-out) of mone-export. Only heads are read."""
_EPILOG = """examples:
  mone-inspect model.gguf
  mone-inspect model.gguf -c 32768 --json
  mone-inspect allenai/OLMoE-1B-7B-0125
  mone-inspect model.stats"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mone-inspect`; returns the exit status: 0 done, 1 a MoneError, 2 usage, 130 interrupted."""
    with steady_output() as output:
        args = _parser().parse_args(argv)
        from mone_export.inspection.inspecting import examine  # with NumPy, which --help need not wait for

        try:
            anatomy = examine(args.file, n_ctx=args.ctx_size, revision=args.revision)
            told = map(printable, _lines(anatomy))
            lines = [json.dumps(anatomy.as_json(), indent=1)] if args.json else told
            print(*lines, sep="\n")
            output.check()
        except MoneError as error:
            print(f"mone-inspect: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mone-inspect",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", help="GGUF, folder, Hugging Face id, statistics or plan")
    parser.add_argument(
        "-c",
        "--ctx-size",
        type=_tokens,
        metavar="N",
        help="tokens of context to reckon memory for (default: what the model was made for)",
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hugging Face id")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def _tokens(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**40:
        raise argparse.ArgumentTypeError(f"{text} is no number of tokens: write 8192, for example")
    return int(text)


def _lines(of: "Anatomy") -> Iterator[str]:
    """Yield what to print."""
    kind = f", {of.file_type}" if of.file_type else ""
    arch = f"{of.arch}, " if of.arch else ""
    yield f"{of.kind:10} {of.name}: {arch}{of.n_layer} layers{kind}, {as_size(of.size)}"
    if not of.n_expert:
        yield "experts    none: only mixture-of-experts models can be pruned"
    else:
        used = f", {of.top_k} used per token" if of.top_k else ""
        width = f", {of.expert_size} channels each" if of.expert_size else ""
        yield f"experts    {of.n_expert} in each of {len(of.layers)} layers{used}{width}"
        if of.fates.keys() != {"whole"}:
            yield f"fates      {_fates(of.fates)}"
    if of.needs:
        yield f"runs on    {_runtime(of)}"
    if of.memory:
        at = of.memory
        windows = f", {at.n_window} of them a window" if at.n_window else ""
        most = "at most" if at.is_upper else "about"
        cache = (
            f"{most} {as_size(at.cache)} of cache for {at.n_ctx} tokens ({at.n_layer} layers{windows}; F16)"
        )
        yield f"memory     {as_size(at.weights)} of weights, {cache if at.n_layer else 'cache not known'}"
    for number, (use, size) in enumerate(of.n_byte.items()):
        yield f"{'' if number else 'bytes':10} {use:15} {as_size(size):>10}  {_share(size, of)}"
    if of.types:
        yield f"types      {', '.join(f'{kind} {_share(size, of)}' for kind, size in of.types.items())}"
    yield from (f"{'made' if not number else '':10} {line}" for number, line in enumerate(_made(of.made)))
    if of.command:
        yield f"again      {of.command}"
    yield from _table(of)
    yield from _saved(of.savings)


def _runtime(of: "Anatomy") -> str:
    if of.needs == "any":
        return "any llama.cpp that knows the architecture"
    return "the patched llama.cpp: `mone-llama build`, once, then $(mone-llama path)/llama-cli -m FILE"


def _made(made: Mapping[str, object]) -> Iterator[str]:
    for name, value in made.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        yield f"{name.removeprefix('mone.')}: {shown}"


def _table(of: "Anatomy") -> Iterator[str]:
    """Yield a line for each layer, where they differ in anything from `all whole`."""
    layers = [at for at in of.layers if at.fates.keys() != {"whole"} or at.seen is not None]
    for at in layers:
        yield f"layer {at.layer:4}  {', '.join(_of_layer(at))}"


def _of_layer(at: "LayerAnatomy") -> Iterator[str]:
    yield f"{at.seen} of {at.fates['whole']} experts seen" if at.seen is not None else _fates(at.fates)
    if at.norms:
        least, middle, most = at.norms
        yield f"norms of novices {least:.3g} to {most:.3g}, median {middle:.3g}"


def _saved(savings: "Sequence[Saving]") -> Iterator[str]:
    """Yield a table of what other types and ratios would make of the file."""
    ratios = sorted({saving.ratio for saving in savings})
    if not ratios:
        return
    yield "what would be left, about:"
    heads = [f"{ratio:.0%} pruned" if ratio else "all experts" for ratio in ratios]
    yield f"{'type':10} " + "  ".join(f"{head:>11}" for head in heads)
    by_type: dict[str, dict[float, int]] = {}
    for saving in savings:
        by_type.setdefault(saving.outtype, {})[saving.ratio] = saving.size
    for outtype, sizes in by_type.items():
        cells = [as_size(sizes[ratio]) if ratio in sizes else "" for ratio in ratios]
        yield f"{outtype:10} " + "  ".join(f"{cell:>11}" for cell in cells)


def _fates(fates: Mapping[str, int]) -> str:
    from mone_export.artifacts import in_order

    return ", ".join(f"{fates[fate]} {'of ' if fate[0].isdigit() else ''}{fate}" for fate in in_order(fates))


def _share(size: int, of: "Anatomy") -> str:
    return f"{size / max(1, sum(of.n_byte.values())):.1%}"


if __name__ == "__main__":
    sys.exit(main())
