#!/usr/bin/env python3
"""Write the tables of README.md and docs/*.md from docs/measurements/*.json.

    python tools/readme_tables.py            rewrite what stands between the markers
    python tools/readme_tables.py --check    change nothing; fail where a file differs

`<!-- table:NAME -->` ... `<!-- /table -->` holds the table of docs/measurements/NAME.json. No number of ours
is typed by hand.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MEASUREMENTS = ROOT / "docs" / "measurements"

Json = dict[str, Any]
Row = Sequence[str]

_TABLE = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def main() -> int:
    """Rewrite or check the files; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only say which files would change")
    check = parser.parse_args().check
    stale = [file for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if file.is_file()]
    stale = [file for file in stale if file.read_text() != filled(file.read_text())]
    for file in stale:
        print(f"{file.relative_to(ROOT)}: tables {'differ' if check else 'written'}")
        if not check:
            file.write_text(filled(file.read_text()))
    return 1 if check and stale else 0


def filled(text: str) -> str:
    """Return a document with every table rendered from its JSON; one not measured yet is left as it is."""

    def table(match: re.Match[str]) -> str:
        file = MEASUREMENTS / f"{match[2]}.json"
        if not file.is_file():
            print(f"{file.relative_to(ROOT)} does not exist: its table stays as it is", file=sys.stderr)
            return match[0]
        return f"{match[1]}{render(json.loads(file.read_text()))}\n{match[3]}"

    return _TABLE.sub(table, text)


def render(data: Json) -> str:
    """Return a measurement as a Markdown table, with a line on how it was taken."""
    header, *rows = TABLES[data["kind"]](data)
    machine, versions = data["machine"], data["versions"]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        [
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            f"{NOTES[data['kind']](data)} {data['date'][:10]}, {machine['cores']} cores of {machine['cpu']}, "
            f"load average {machine['load_average_before'][0]} before and "
            f"{machine['load_average_after'][0]} after; {versions['llama_cpp']}, torch {versions['torch']}.",
        ]
    )


def speed_table(data: Json) -> Iterable[Row]:
    """Yield sizes, speeds and CPU times of the files, then the ratios of speed."""
    tests = data["summary"]
    yield (
        "",
        "size",
        "share of slots kept",
        "prompt",
        "generation",
        "CPU per prompt token",
        "CPU per generated token",
    )
    for name in ("full", "novices", "hard"):
        size = f"{data['sizes'][name] / 1e6:.0f} MB"
        times = [tests[test]["times"][name] for test in ("prompt", "generation")]
        speeds = [f"{1000 / time['wall_ms']['median']:.1f} t/s" for time in times]
        share = data["share"].get(name, {"prompt": 1, "generation": 1})
        shares = f"{share['prompt']:.0%} / {share['generation']:.0%}"
        yield (
            _SPEED_NAMES[name],
            size,
            shares,
            *speeds,
            *(f"{time['cpu_ms']['median']:.2f} ms" for time in times),
        )
    for name in tests["prompt"]["speed_ratios"]:
        ratios = [tests[test]["speed_ratios"][name] for test in ("prompt", "generation")]
        wall, cpu = ([spread_of(ratio[key]) for ratio in ratios] for key in ("wall_ms", "cpu_ms"))
        yield f"speed, {name}", "", "", *wall, *cpu


_SPEED_NAMES = {"full": "full: all experts", "novices": "half novices", "hard": "hard: half removed"}


def speed_note(data: Json) -> str:
    """Say what was run."""
    settings = data["settings"]
    return (
        f"{settings['n_layer']} layers, {settings['n_kept']} of {settings['n_expert']} experts kept, "
        f"{settings['top_k']} used per token. llama-bench, {settings['threads']} threads, "
        f"{settings['n_prompt']} prompt and {settings['n_gen']} generated tokens, median of "
        f"{settings['rounds']} interleaved rounds (smallest to largest). Times without experts come "
        "from a router that skips all of them; for the ideal by use, from a model that uses half as many."
    )


def calibrate_table(data: Json) -> Iterable[Row]:
    """Yield speeds of the forward passes, and CPU time relative to the plain one, by number of threads."""
    summary = data["summary"]
    columns = [f"{text}, {part['threads']} thr." for part in summary for text in ("tokens/s", "CPU", "wall")]
    yield "forward pass", *columns
    for name in summary[0]["competitors"]:
        cells: list[str] = []
        for part in summary:
            row = part["competitors"][name]
            cells.append(f"{row['tokens_per_second']['median']:.0f}")
            cells += [spread_of(row[f"{key}_ratio"]) for key in ("cpu", "wall")]
        yield name, *cells


def calibrate_note(data: Json) -> str:
    """Say what was run."""
    settings = data["settings"]
    return (
        f"{settings['model']}: {settings['num_hidden_layers']} layers of {settings['num_experts']} experts, "
        f"{settings['num_experts_per_tok']} used, hidden size {settings['hidden_size']}, expert size "
        f"{settings['moe_intermediate_size']}; {settings['tokens']} tokens, {settings['batch_tokens']} at a "
        f"time; the plain pass with transformers' {settings['experts_implementation']} experts, the fastest "
        "here. CPU and wall: time relative to the plain pass, median of "
        f"{settings['rounds']} interleaved rounds (smallest to largest)."
    )


def quality_table(data: Json) -> Iterable[Row]:
    """Yield size and perplexity by ratio, score and novice; seeds of one kind in one row."""
    kinds: dict[tuple[float, str, str], list[Json]] = {}
    for run in data["runs"]:
        kinds.setdefault((run["ratio"], run["score"], run["novice"]), []).append(run)
    full = data["runs"][0]["perplexity"]
    yield "experts pruned", "score", "novice", "size (announced)", "perplexity", "against unpruned"
    for (ratio, score, novice), runs in kinds.items():
        values = [run["perplexity"] for run in runs]
        size = f"{runs[0]['size'] / 1e6:.2f} MB ({runs[0]['size_announced'] / 1e6:.2f})"
        mean = statistics.mean(values)
        if len(values) > 1:
            error = f"({min(values):.2f} to {max(values):.2f})"
        else:
            error = f"± {runs[0]['standard_error']:.2f}"
        names = (score, novice) if ratio else ("", "")
        yield f"{ratio:.0%}", *names, size, f"{mean:.2f} {error}", f"{mean / full - 1:+.1%}"


def quality_note(data: Json) -> str:
    """Say what was run."""
    settings = data["settings"]
    return (
        f"Model {settings['model']}, {settings['outtype'].upper()}; calibration: {settings['calibration']}; "
        f"text: {settings['held_out']} (llama-perplexity -c 512). Random: mean of the seeds (range)."
    )


def memory_table(data: Json) -> Iterable[Row]:
    """Yield the peak memory of writing against the bar."""
    yield "checkpoint's experts", "outtype", "largest layer", "bar", "peak", "before", "time"
    for run in data["runs"]:
        sizes = (data["largest_layer_experts"], data["bar"], run["peak"], run["before"])
        cells = [f"{size / 1e6:.0f} MB" for size in sizes]
        yield run["form"], run["outtype"], *cells, f"{run['seconds']:.1f} s"


def memory_note(data: Json) -> str:
    """Say what was run."""
    settings = data["settings"]
    return (
        f"Random BF16 Qwen3-MoE, {settings['n_layer']} layers of {settings['n_expert']} experts of "
        f"{settings['hidden']} x {settings['expert']}, a quarter pruned. Anonymous memory of the writing "
        "process; the bar is 1.5 times the largest layer's experts plus 500 MB."
    )


def spread_of(ratio: Json) -> str:
    """Format a ratio and its spread."""
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"


TABLES: dict[str, Callable[[Json], Iterable[Row]]] = {
    "speed": speed_table,
    "calibrate": calibrate_table,
    "quality": quality_table,
    "memory": memory_table,
}
NOTES: dict[str, Callable[[Json], str]] = {
    "speed": speed_note,
    "calibrate": calibrate_note,
    "quality": quality_note,
    "memory": memory_note,
}

if __name__ == "__main__":
    sys.exit(main())
