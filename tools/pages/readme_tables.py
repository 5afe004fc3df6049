#!/usr/bin/env python3
"""Write the tables of README.md and docs/*.md from docs/measurements/*.json.

    python tools/pages/readme_tables.py            rewrite what stands between the markers
    python tools/pages/readme_tables.py --check    change nothing; fail where a file differs

`<!-- table:NAME -->` ... `<!-- /table -->` holds the table of docs/measurements/NAME.json, `table:NAME/VIEW`
another table of the same numbers. The long ones have pages of their own in docs/tables, which are written
whole (`PAGES`). No number of ours is typed by hand.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import trust_tables

ROOT = Path(__file__).resolve().parents[2]
MEASUREMENTS = ROOT / "docs" / "measurements"
TABLE_PAGES = ROOT / "docs" / "tables"

Json = dict[str, Any]
Row = Sequence[str]
ByWay = dict[tuple[Any, ...], dict[int, Json]]  # runs by (model, ratio, way), each by calibration sample

_TABLE = re.compile(r"(<!-- table:([\w-]+)(?:/(\w+))? -->\n).*?(<!-- /table -->)", re.DOTALL)


def main() -> int:
    """Rewrite or check the files; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only say which files would change")
    check = parser.parse_args().check
    texts = {file: filled(file.read_text()) for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
    texts |= {TABLE_PAGES / name: page(name) for name in PAGES}
    stale = sorted(file for file, text in texts.items() if not file.is_file() or file.read_text() != text)
    for file in stale:
        print(f"{file.relative_to(ROOT)}: tables {'differ' if check else 'written'}")
        if not check:
            file.parent.mkdir(exist_ok=True)
            file.write_text(texts[file])
    return 1 if check and stale else 0


def page(name: str) -> str:
    """Return a page of docs/tables: what its tables are, then the tables."""
    title, text, tables = PAGES[name]
    parts = [f"# {title}", "Written by `tools/pages/readme_tables.py`; not to be edited.", text]
    for table, heading in tables.items():
        parts += [f"## {heading}"] * bool(heading) + [f"<!-- table:{table} -->\n<!-- /table -->"]
    return filled("\n\n".join(parts) + "\n")


def filled(text: str) -> str:
    """Return a document with every table rendered from its JSON; one not measured yet is left as it is."""

    def table(match: re.Match[str]) -> str:
        file = MEASUREMENTS / f"{match[2]}.json"
        if not file.is_file():
            print(f"{file.relative_to(ROOT)} does not exist: its table stays as it is", file=sys.stderr)
            return match[0]
        return f"{match[1]}{render(json.loads(file.read_text()), match[3])}\n{match[4]}"

    return _TABLE.sub(table, text)


def render(data: Json, view: str | None = None) -> str:
    """Return a measurement as a Markdown table, with a line on how it was taken."""
    name = f"{data['kind']}/{view}" if view else data["kind"]
    header, *rows = TABLES[name](data)
    lines = [header, ["---"] * len(header), *rows]
    note = BRIEF.get(name) or f"{NOTES.get(name, NOTES[data['kind']])(data)} {where(data)}"
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", note])


def where(data: Json) -> str:
    """Say when, on what and with what a measurement was taken."""
    versions = data["versions"]
    if "machine" not in data:
        programs = ", ".join(f"{name} {version}" for name, version in versions.items())
        return f"{data['date'][:10]}; {programs}."
    machine = data["machine"]
    return (
        f"{data['date'][:10]}, {machine['cores']} cores of {machine['cpu']}, load average "
        f"{machine['load_average_before'][0]} before and {machine['load_average_after'][0]} after; "
        f"{versions['llama_cpp']}, torch {versions['torch']}."
    )


def speed_table(data: Json) -> Iterable[Row]:
    """Yield how many times less time novices take than others: CPU time, with a GPU time on the clock."""
    key = "wall_ms" if data["settings"].get("gpu") else "cpu_ms"
    columns = (
        f"{base}, {test}"
        for base in ("than all experts", "than hard-pruned", "than the ideal")
        for test in SPEED_TESTS
    )
    yield "shape", "type", "pruned", "size", "slots kept", *columns
    for case, ratio in speed_cases(data):
        novices = f"novices {ratio:.0%}"
        cells = [
            f"{case['summary'][test]['speed_ratios'][f'{novices} / {base}'][key]['median']:.2f}"
            for base in ("full", f"hard {ratio:.0%} on stock", f"ideal {ratio:.0%}")
            for test in SPEED_TESTS
        ]
        size = f"{case['sizes']['full'] / 1e6:.0f} → {case['sizes'][novices] / 1e6:.0f} MB"
        share = "{prompt:.0%} / {generation:.0%}".format(**case["share"][novices])
        yield case["shape"], case["weights"], f"{ratio:.0%}", size, share, *cells


def speed_short(data: Json) -> Iterable[Row]:
    """Yield how many times less CPU time a token takes with half of the experts pruned."""
    yield "shape", "type", "size", *(f"{test}, times as fast" for test in SPEED_TESTS)
    for case in data["cases"]:
        size = f"{case['sizes']['full'] / 1e6:.0f} → {case['sizes']['novices 50%'] / 1e6:.0f} MB"
        ratios = (case["summary"][test]["speed_ratios"]["novices 50% / full"] for test in SPEED_TESTS)
        yield case["shape"], case["weights"], size, *(f"{ratio['cpu_ms']['median']:.2f}" for ratio in ratios)


def speed_spread_table(data: Json) -> Iterable[Row]:
    """Yield every ratio of speed with its spread, in wall time and in CPU time."""
    yield (
        "shape",
        "type",
        "speed ratio",
        *(f"{test}, {key}" for key in ("wall", "CPU") for test in SPEED_TESTS),
    )
    for case in data["cases"]:
        for name in case["summary"]["prompt"]["speed_ratios"]:
            ratios = [case["summary"][test]["speed_ratios"][name] for test in SPEED_TESTS]
            cells = (spread_of(ratio[key]) for key in ("wall_ms", "cpu_ms") for ratio in ratios)
            yield case["shape"], case["weights"], name, *cells


def speed_thin(data: Json) -> Iterable[Row]:
    """Yield how many times less CPU time files with tiers of experts take than others."""
    yield "shape", "type", "file, to", "size", *(f"{test}, times as fast" for test in SPEED_TESTS)
    for case in data["cases"]:
        for name in case["summary"]["prompt"]["speed_ratios"]:
            thin, _, other = name.partition(" / ")
            if thin.startswith(("thin", "tiers")):
                ratios = [case["summary"][test]["speed_ratios"][name]["cpu_ms"] for test in SPEED_TESTS]
                size = f"{case['sizes'][other] / 1e6:.0f} → {case['sizes'][thin] / 1e6:.0f} MB"
                yield case["shape"], case["weights"], f"{thin}, to {other}", size, *map(spread_of, ratios)


def speed_unpruned(data: Json) -> Iterable[Row]:
    """Yield the unpruned file's speed with the patches, relative to without them, and to itself."""
    yield "shape", "type", "test", "with the patches, to without", "a copy of the file, to the file"
    for case in data["cases"]:
        for test in SPEED_TESTS:
            ratios = case["summary"][test]["speed_ratios"]
            cells = (spread_of(ratios[name]["cpu_ms"]) for name in ("full / full on stock", "copy / full"))
            yield case["shape"], case["weights"], test, *cells


def speed_cases(data: Json) -> Iterator[tuple[Json, float]]:
    """Yield every shape and type with every ratio."""
    for case in data["cases"]:
        for ratio in data["settings"]["ratios"]:
            yield case, ratio


SPEED_TESTS = ("prompt", "generation")


def speed_note(data: Json) -> str:
    """Say what was run."""
    settings = data["settings"]
    shapes = "; ".join(
        f"{name}: {shape['n_layer']} layers of {shape['n_expert']} experts, {shape['top_k']} used, "
        f"{shape['n_embd']} wide, experts {shape['n_ff']}"
        for name, shape in data["shapes"].items()
    )
    n_token = f"{settings['n_prompt']} tokens of prompt and {settings['n_gen']} generated"
    gpu = f"{settings['gpu']}, " if settings.get("gpu") else ""
    return (
        f"Random weights. {shapes}. llama-bench, {gpu}{settings['threads']} threads, {n_token}, medians of "
        f"{settings['rounds']} interleaved rounds. Hard-pruned files run on llama.cpp without the patches. "
        "The ideal is the time without experts plus the experts' time times the share of slots kept."
        f"{_speed_noise(data) if gpu else ''}"
    )


def _speed_noise(data: Json) -> str:
    """Say how the unpruned file fared on both builds, and what one build makes of two files."""
    first = f"hard {min(data['settings']['ratios']):.0%} on stock"

    def compared(case: Json, slower: str) -> str:
        times = (case["summary"][test]["times"] for test in SPEED_TESTS)
        medians = [{name: own["wall_ms"]["median"] for name, own in of.items()} for of in times]
        return " / ".join(f"{own['full on stock'] / own[slower]:.2f}" for own in medians)

    cases = "; ".join(
        f"{case['shape']} {case['weights']}, the same file on the patched build {compared(case, 'full')}, "
        f"the smaller hard-pruned one on stock {compared(case, first)}"
        for case in data["cases"]
    )
    return f" Speed relative to the unpruned file on stock llama.cpp, prompt / generation: {cases}."


def speed_thin_note(data: Json) -> str:
    """Say what was run, of the view with thin experts."""
    return speed_note(data).partition(" Hard-pruned")[0]


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


def methods_table(data: Json) -> Iterable[Row]:
    """Yield KL divergences per variant, best first, each also as a multiple of the paper's combination."""
    ratios = sorted({run["ratio"] for run in data["runs"] if run["ratio"]})
    cells: dict[tuple[str, ...], dict[tuple[float, str], list[float]]] = {}
    for run in runs_after(data):
        method = f"{run['method']}, {run['way']}" if run.get("way") else run["method"]
        row = cells.setdefault((run["model"], method, run["score"], run["novice"]), {})
        for text in ("like", "unlike"):
            row.setdefault((run["ratio"], text), []).append(run[text]["kl"])
    columns = [(ratio, text) for ratio in ratios for text in ("like", "unlike")]
    yield "model", "method", "score", "novice", *(f"{ratio:.0%}, {text}" for ratio, text in columns)
    order = (0.5, "like") if (0.5, "like") in columns else columns[0]
    for key in sorted(cells, key=lambda key: (key[0], statistics.mean(cells[key].get(order, [math.inf])))):
        paper = cells[key[0], "mone", "mone", "mean"]
        yield *key, *(_divergence(cells[key].get(column, ()), paper[column]) for column in columns)


DEFAULT = ("mone", "error", "least-squares", "sensitivity")
SHORT = {
    ("mone", "error", "least-squares", ""): "--allocate even",
    ("mone", "mone", "mean", "sensitivity"): "--score mone --novice mean",
    ("mone", "mone", "mean", ""): "the paper's: --score mone --novice mean --allocate even",
    ("mone", "error", "zero", "sensitivity"): "--novice zero: no novices",
    ("mone", "error", "joint", "sensitivity"): "--novice joint",
    ("mone", "error", "least-squares", "sequential"): "--sequential",
    ("mone", "error", "least-squares", "search"): "--allocate search",
    ("drop", "reap", "none", ""): "REAP (--method drop)",
    ("dern", "gate", "none", ""): "DERN",
}


def methods_short(data: Json) -> Iterable[Row]:
    """Yield the default's divergences, and how many times as far others stray from the unpruned model."""
    ratios = sorted({run["ratio"] for run in data["runs"] if run["ratio"]})
    columns = [(ratio, text) for ratio in ratios for text in ("like", "unlike")]
    by_way = _by_way(data)
    yield "model", "way", *(f"{ratio:.3g}, {text}" for ratio, text in columns)
    for model in data["settings"]["models"]:
        yield model, "**default**: KL divergence", *(_mean(by_way, model, *column) for column in columns)
        for way, name in SHORT.items():
            yield model, name, *(_times(by_way, model, *column, way) for column in columns)


def methods_against(data: Json) -> Iterable[Row]:
    """Yield the default's divergence at a quarter and a half, and what those known before stray by."""
    yield (
        "model",
        "experts pruned",
        "text",
        "KL divergence",
        "the MoNE paper's",
        "REAP",
        "default without novices",
    )
    by_way = _by_way(data)
    others = ("mone", "mone", "mean", ""), ("drop", "reap", "none", ""), (*DEFAULT[:2], "zero", DEFAULT[3])
    for model in data["settings"]["models"]:
        for ratio in (0.25, 0.5):
            for text in ("like", "unlike"):
                cells = (_times(by_way, model, ratio, text, way) for way in others)
                yield model, f"{ratio:.0%}", text, _mean(by_way, model, ratio, text), *cells


THIRD = {
    ("mone", "reap", "least-squares", "sensitivity"): "--score reap",
    ("mone", "reap", "least-squares", ""): "--score reap --allocate even",
    ("drop", "reap", "none", ""): "REAP (--method drop)",
}


def methods_third(data: Json) -> Iterable[Row]:
    """Yield the default's divergences on three kinds of text by length of calibration, and REAP's."""
    ratios = sorted({run["ratio"] for run in data["runs"] if run["ratio"]})
    yield "model", "calibration", "experts pruned", "text", "**default**: KL divergence", *THIRD.values()
    for model in data["settings"]["models"]:
        for n_token in data["settings"]["calibration_tokens"]:
            by_way = _by_way(data, n_token)
            for ratio, text in product(ratios, ("like", "unlike", "rare")):
                cells = (_times(by_way, model, ratio, text, way) for way in THIRD)
                own = [run[text]["kl"] for run in by_way[model, ratio, DEFAULT].values()]
                mean = f"{statistics.mean(own):.2g}"
                yield model, f"{n_token} tokens", f"{ratio:.0%}", text, mean, *cells


def methods_third_short(data: Json) -> Iterable[Row]:
    """Yield the same after the longer calibration, at a quarter and a half."""
    wanted = (0, 2, 3, 4, 5, 7)
    header, *rows = methods_third(data)
    yield tuple(header[column] for column in wanted)
    for row in rows:
        if row[1] == f"{_lengths(data)[-1]} tokens" and row[2] in ("25%", "50%"):
            yield tuple(row[column] for column in wanted)


THIN = ("mone", "error", "thin", "budget")


def methods_thin(data: Json) -> Iterable[Row]:
    """Yield how far thin experts, constants and REAP's files of the same size stray, by ratio and text."""
    yield "model", "experts' bytes gone", "text", "REAP", "constants", "thin", "thin to constants"
    by_way = _by_way(data)
    for model in data["settings"]["models"]:
        for ratio in sorted({run["ratio"] for run in runs_after(data)}):
            for text in ("like", "unlike", "rare"):
                ways = (("drop", "reap", "none", ""), DEFAULT, THIN)
                means = (
                    statistics.mean(r[text]["kl"] for r in by_way[model, ratio, way].values()) for way in ways
                )
                times = _times(by_way, model, ratio, text, THIN, digits=3)
                yield model, f"{ratio:.0%}", text, *(f"{mean:.2g}" for mean in means), times


def methods_controls(data: Json) -> Iterable[Row]:
    """Yield how many times as far the same widths stray when other experts have them."""
    yield "model", "experts' bytes gone", "text", "thin", "widths inverted", "widths shuffled"
    by_way = _by_way(data)
    for model in data["settings"]["models"]:
        for ratio in sorted({run["ratio"] for run in runs_after(data)}):
            for text in ("like", "unlike"):
                runs = [by_way[model, ratio, (*THIN[:3], way)] for way in ("budget", "inverted", "shuffled")]
                own, *others = ([run[text]["kl"] for run in each.values()] for each in runs)
                times = (statistics.median(a / b for a, b in zip(each, own, strict=True)) for each in others)
                cells = (f"x {each:.0f}" for each in times)
                yield model, f"{ratio:.0%}", text, f"{statistics.mean(own):.2g}", *cells


def methods_thin_short(data: Json) -> Iterable[Row]:
    """Yield the same at a quarter, a half and three quarters, on two kinds of text."""
    header, *rows = methods_thin(data)
    yield header
    yield from (row for row in rows if row[1] in ("25%", "50%", "75%") and row[2] != "rare")


def methods_thin_half(data: Json) -> Iterable[Row]:
    """Yield the same at a half, in few columns."""
    header, *rows = methods_thin(data)
    wanted = (0, 2, 3, 4, 5)
    yield tuple(header[column] for column in wanted)
    yield from (
        tuple(row[column] for column in wanted) for row in rows if row[1] == "50%" and row[2] != "rare"
    )


REAP = ("drop", "reap", "none", "")
STOCK = {
    ("narrow", "error", "none", ""): "**narrow**",
    ("drop", "error", "none", ""): "dropped by error",
    ("dern", "gate", "none", ""): "DERN",
    ("merge", "frequency", "none", ""): "MC-SMoE",
    THIN: "thin, patched runtime",
}
SYSTEMS = {
    DEFAULT: "constants",
    ("mone", "mone", "mean", ""): "the MoNE paper's",
    REAP: "REAP",
    ("dern", "gate", "none", ""): "DERN",
    ("merge", "frequency", "none", ""): "MC-SMoE",
    ("flap", "fluctuation", "none", ""): "FLAP in experts",
    ("layers", "angle", "none", ""): "whole layers",
}
MENDED = {
    "REAP": REAP,
    "dropped by error": ("drop", "error", "none", ""),
    "narrow": ("narrow", "error", "none", ""),
}


def methods_stock(data: Json) -> Iterable[Row]:
    """Return REAP's divergence in an ordinary file, and how many times as far others of its size stray."""
    return _compared(data, REAP, "REAP", STOCK, digits=3)


def methods_systems(data: Json) -> Iterable[Row]:
    """Return the divergence of thin experts, and how many times as far other systems stray."""
    return _compared(data, THIN, "**thin experts**", SYSTEMS, digits=0)


def _compared(
    data: Json, base: tuple[str, ...], name: str, others: dict[tuple[str, ...], str], *, digits: int
) -> Iterable[Row]:
    yield "model", "experts' bytes gone", "text", name, *others.values()
    by_way = _by_way(data)
    for model, ratio, text in _stock_cells(data):
        own = [run[text]["kl"] for run in by_way[model, ratio, base].values()]
        cells = (_times(by_way, model, ratio, text, way, digits=digits, base=base) for way in others)
        yield model, f"{ratio:.0%}", text, f"{statistics.mean(own):.2g}", *cells


def methods_mended(data: Json) -> Iterable[Row]:
    """Yield what a gain for each expert, and one for each layer, does to ordinary files: times as far."""
    names = (f"{name}, {way}" for name in MENDED for way in ("one scale a layer", "a gain for each expert"))
    yield "model", "experts' bytes gone", "text", *names
    by_way = _by_way(data)
    for model, ratio, text in _stock_cells(data):
        cells = (
            _times(by_way, model, ratio, text, (*base[:3], way), base=base)
            for base in MENDED.values()
            for way in ("scale", "gains")
        )
        yield model, f"{ratio:.0%}", text, *cells


def _stock_cells(data: Json) -> Iterable[tuple[str, float, str]]:
    ratios = sorted({run["ratio"] for run in runs_after(data)})
    return product(data["settings"]["models"], ratios, ("like", "unlike", "rare"))


def runs_after(data: Json, n_token: int | None = None) -> list[Json]:
    """Return the runs with pruned experts after a calibration of so many tokens (default: the longest)."""
    n_token = n_token or _lengths(data)[-1]
    return [run for run in data["runs"] if run["ratio"] and run.get("calibration_tokens", n_token) == n_token]


def _lengths(data: Json) -> list[int]:
    """Return the lengths of calibration in tokens, ascending."""
    lengths = data["settings"]["calibration_tokens"]
    return sorted(lengths) if isinstance(lengths, list) else [lengths]


def _by_way(data: Json, n_token: int | None = None) -> ByWay:
    """Return the runs of `runs_after` by (model, ratio, way), and in each by calibration sample."""
    found: ByWay = {}
    for run in runs_after(data, n_token):
        way = (run["method"], run["score"], run["novice"], run.get("way", ""))
        found.setdefault((run["model"], run["ratio"], way), {})[run["sample"]] = run
    return found


def _mean(by_way: ByWay, model: str, ratio: float, text: str) -> str:
    """Format the mean over the samples of the default's divergence."""
    return f"{statistics.mean(run[text]['kl'] for run in by_way[model, ratio, DEFAULT].values()):.4f}"


def _times(
    by_way: ByWay, model: str, ratio: float, text: str, way: Row, digits: int = 2, base: Row = DEFAULT
) -> str:
    """Format a way's divergence as a multiple of the default's on the same sample: median and range."""
    own, default = by_way.get((model, ratio, way), {}), by_way[model, ratio, base]
    times = [run[text]["kl"] / default[sample][text]["kl"] for sample, run in own.items()]
    low, middle, high = (f"{f(times):.{digits}f}" for f in (min, statistics.median, max)) if times else "---"
    return f"x {middle} ({low} to {high})" if times else "-"


def _divergence(values: Sequence[float], paper: Sequence[float]) -> str:
    """Format mean and deviation, and the multiples of the paper's values sample by sample."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    times = [value / other for value, other in zip(values, paper, strict=True)]
    multiples = f"x {statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"
    return f"{statistics.mean(values):.4f}{deviation}, {multiples}"


def methods_note(data: Json) -> str:
    """Say what was run."""
    settings = data["settings"]
    lengths, kinds = _texts(data)
    return (
        "KL divergence from the unpruned model in nats per token, mean over "
        f"{settings['samples']} calibration samples of {lengths} tokens ± their standard deviation, on "
        f"{settings['evaluation_tokens']} held-out tokens of each kind; x: times as much on the same sample "
        f"as the default, median (smallest to largest). Float32 in PyTorch. {kinds}."
    )


def methods_paper_note(data: Json) -> str:
    """Say what was run, of the view that has multiples of the paper's combination."""
    return methods_note(data).replace("as the default", "as the paper's combination")


def _texts(data: Json) -> tuple[str, str]:
    """Return how much text was calibrated on, and of which kind, model by model."""
    kinds = (
        f"{name} calibrated on {kinds['like']}, unlike it is {kinds['unlike']}"
        for name, kinds in data["settings"]["models"].items()
    )
    return " or ".join(map(str, _lengths(data))), "; ".join(kinds)


def methods_thin_note(data: Json) -> str:
    """Say what was run, of the views with thin experts."""
    settings = data["settings"]
    lengths, kinds = _texts(data)
    return (
        "KL divergence from the unpruned model in nats per token, mean over "
        f"{settings['samples']} calibration samples of {lengths} tokens, on {settings['evaluation_tokens']} "
        "held-out tokens of each kind; x: times as much on the same sample, median (smallest to largest). "
        f"Float32 in PyTorch. {kinds}."
    )


def protect_table(data: Json) -> Iterable[Row]:
    """Yield what each pruned model strays on the protected text and on the calibration's, by number held."""
    numbers = sorted({run["n"] for run in data["runs"]} - {0})
    held = (f"--protect, {n} a layer" for n in numbers)
    yield "model", "pruned by", "protected", "text", "not protected", *held, "calibrated on it too"
    runs: dict[tuple[Any, ...], dict[int, Json]] = defaultdict(dict)
    for run in data["runs"]:
        arm = (run["protected"], run.get("protected_tokens"), run["n"], run["mixed"])
        runs[run["model"], run["way"], arm][run["sample"]] = run
    ways = dict.fromkeys(run["way"] for run in data["runs"])
    lengths = data["settings"]["protected_tokens"]
    for model, way, kind, length in product(data["settings"]["models"], ways, ("unlike", "rare"), lengths):
        own = runs[model, way, ("", None, 0, False)]
        arms = [(kind, length, n, False) for n in numbers] + [(kind, length, 0, True)]
        for text in (kind, "like"):
            mean = f"{statistics.mean(run[text]['kl'] for run in own.values()):.2g}"
            cells = (_ratio_to(own, runs[model, way, arm], text) for arm in arms)
            yield model, way, f"{kind}, {length} tokens", text, mean, *cells


def protect_short(data: Json) -> Iterable[Row]:
    """Yield the longest protected text's rows, of what happens on such text."""
    header, *rows = protect_table(data)
    longest = f" {max(data['settings']['protected_tokens'])} tokens"
    yield (*header[:3], *header[4:])
    for row in rows:
        kind, _, length = str(row[2]).partition(",")
        if length == longest and row[3] == kind:
            yield (*row[:3], *row[4:])


def _ratio_to(base: dict[int, Json], runs: dict[int, Json], text: str) -> str:
    """Format divergences as multiples of others, sample by sample: median and range."""
    times = [runs[sample][text]["kl"] / run[text]["kl"] for sample, run in base.items()]
    return f"x {statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"


def protect_note(data: Json) -> str:
    """Say what was run."""
    settings = data["settings"]
    _, kinds = _texts(data)
    return (
        f"KL divergence from the unpruned model in nats per token, {settings['ratio']:.0%} of the experts or "
        f"of their bytes gone: mean over {settings['samples']} calibration samples of "
        f"{settings['calibration_tokens']} tokens, on {settings['evaluation_tokens']} held-out tokens of "
        "each kind; x: times as much on the same sample, median (smallest to largest). Float32 in PyTorch. "
        f"{kinds}."
    )


def bytes_table(data: Json) -> Iterable[Row]:
    """Yield what each way to a size costs, and what --fit's file does as a multiple of others."""
    columns = ("only quantised", "REAP", "constants", "--fit", "to only quantised", "inverted")
    yield "model", "size", "text", *columns
    for (model, fraction), arms in _arms(data).items():
        for text in ("like", "unlike"):
            quantised = min(arms["only quantised"], key=lambda run: run[text]["kl"], default=None)
            best = [quantised] if quantised else []
            others = (best, arms["REAP"], arms["constants"], arms["fit"])
            cells = [_way(way, text) for way in others]
            ratio = _multiple(arms["fit"], quantised, text)
            control = _multiple(arms["inverted"], arms["fit"][0], text)
            yield model, f"{fraction:.0%}", text, *cells, ratio, control


def bytes_short(data: Json) -> Iterable[Row]:
    """Yield some sizes, and the ways that other tools have."""
    wanted = (0, 1, 2, 3, 4, 6, 7)
    header, *rows = bytes_table(data)
    yield tuple(header[column] for column in wanted)
    for row in rows:
        if row[1] in ("45%", "35%", "26%"):
            yield tuple(row[column] for column in wanted)


def bytes_half(data: Json) -> Iterable[Row]:
    """Yield two sizes, text like the calibration's, and what there is without this tool."""
    wanted = (0, 1, 3, 6, 7)
    header, *rows = bytes_table(data)
    yield tuple(header[column] for column in wanted)
    for row in rows:
        if row[1] in ("35%", "26%") and row[2] == "like":
            yield tuple(row[column] for column in wanted)


def speed_q4(data: Json) -> Iterable[Row]:
    """Yield one type, and the two speeds."""
    header, *rows = speed_short(data)
    yield header
    yield from (row for row in rows if row[1] == "Q4_K")


def _arms(data: Json) -> dict[tuple[str, float], dict[str, list[Json]]]:
    """Return the runs by model and size, then by arm; what is only quantised counts where it fits."""
    found: dict[tuple[str, float], dict[str, list[Json]]] = {}
    for run in data["runs"]:
        if run["arm"] != "only quantised":
            arms = found.setdefault((run["model"], run["fraction"]), defaultdict(list))
            arms[run["arm"]].append(run)
    for (model, _), arms in found.items():
        limit = arms["fit"][0]["limit"]
        arms["only quantised"] = [
            run
            for run in data["runs"]
            if run["arm"] == "only quantised" and run["model"] == model and run["size"] <= limit
        ]
    return found


def _way(runs: Sequence[Json], text: str) -> str:
    """Format the mean and the range of a way's divergences, and its type."""
    if not runs:
        return "-"
    values = [run[text]["kl"] for run in runs]
    spread = f" ({min(values):.2g} to {max(values):.2g})" if max(values) > min(values) else ""
    names = dict.fromkeys(run["outtype"].upper() for run in runs)
    return f"{statistics.mean(values):.2g}{spread}: {' or '.join(names)}"


def _multiple(runs: Sequence[Json], other: Json | None, text: str) -> str:
    """Format how many times as much some runs cost as another one, on the average."""
    if not runs or other is None:
        return "-"
    return f"x {statistics.mean(run[text]['kl'] for run in runs) / other[text]['kl']:.2g}"


def bytes_note(data: Json) -> str:
    """Say what was run, how --fit compares over all cells, and how well it chose among its candidates."""
    settings, ratios, chose = data["settings"], [], []
    for arms in _arms(data).values():
        for text in ("like", "unlike"):
            own = statistics.mean(run[text]["kl"] for run in arms["fit"])
            if arms["only quantised"]:
                ratios.append(own / min(run[text]["kl"] for run in arms["only quantised"]))
            first = [run for run in arms["fit"] if run["sample"] == 0]
            best = min(run[text]["kl"] for run in (*first, *arms["other candidate"]))
            chose.append(first[0][text]["kl"] / best)
    return (
        "KL divergence from the unpruned model in nats per token, mean over "
        f"{settings['samples']} calibration samples of {settings['calibration_tokens']} tokens (range; of "
        "REAP, inverted and only quantised the first), on "
        f"{settings['evaluation_tokens']} held-out tokens; after it the type of the file, for --fit of all "
        "but the experts. Sizes relative to the unpruned file in the checkpoint's own type. Only quantised: "
        "the best of all types and mixed recipes that fit, with an importance matrix. inverted: the same "
        "fates, given to the experts of each layer in reverse order, to --fit. The files of --fit stray "
        f"{statistics.median(ratios):.2f} times as far as the best that is only quantised (median of "
        f"{len(ratios)} cells, {min(ratios):.2f} to {max(ratios):.2f}), and "
        f"{statistics.median(chose):.2f} times as far as the best measured of its candidates (median, at "
        f"most {max(chose):.2f})."
    )


def roads_table(data: Json) -> Iterable[Row]:
    """Yield the divergences by road."""
    yield "model", "experts pruned", "road", "size", "like", "unlike"
    for run in data["runs"]:
        size, pruned = f"{run['size'] / 1e6:.2f} MB", f"{run['ratio']:.0%}"
        yield (
            run["model"],
            pruned,
            run["road"],
            size,
            *(f"{run[text]['kl']:.4f}" for text in ("like", "unlike")),
        )


def roads_note(data: Json) -> str:
    """Say what was run, and how fast it was."""
    settings, writing = data["settings"], data["writing"]
    return (
        f"KL divergence from the unpruned, unquantised model in nats per token, by llama-perplexity on "
        f"{settings['evaluation_tokens']} held-out tokens of each kind, after "
        f"{settings['calibration_tokens']} tokens of calibration. Calibrating a random {settings['shape']} "
        f"in {settings['weights']} through llama.cpp runs at {spread_of(data['calibrating']['ratio'])} of "
        f"llama-perplexity's speed, {settings['threads']} threads, 512 tokens; writing "
        f"{writing['size'] / 1e6:.0f} MB at {spread_of(writing['ratio'])} of the speed of `cp` and `sync`, "
        f"resident memory {writing['resident_before'] / 1e6:.0f} MB before and "
        f"{writing['resident_peak'] / 1e6:.0f} MB at most (median, smallest and largest of "
        f"{settings['rounds']} rounds)."
    )


def dry_table(data: Json) -> Iterable[Row]:
    """Yield the seconds of a dry run by model."""
    yield "model", "size", "tokens in its vocabulary", "dry run"
    for name, seconds in data["seconds"].items():
        size = f"{data['sizes'][name] / 1e9:.1f} GB"
        yield name, size, f"{data['tokens'][name]:,}", f"{spread_of(seconds)} s"


def dry_note(data: Json) -> str:
    """Say what was run."""
    settings = data["settings"]
    return (
        f"`mone-export FILE --ratio 0.5 --dry-run` from start to end, median of {settings['rounds']} "
        f"(smallest to largest). Files with the shape and head of these models in {settings['weights']}, a "
        "vocabulary made up, and holes in place of weights."
    )


def writing_table(data: Json) -> Iterable[Row]:
    """Yield the speed and the peak memory of writing by type and by what is read."""
    yield "from", "type", "speed, relative to llama-quantize", "memory before", "at peak", "bar"
    for outtype in dict.fromkeys(run["outtype"] for run in data["runs"]):
        for form in dict.fromkeys(run["name"] for run in data["runs"] if "peak" in run):
            speed = data["speed"].get(outtype, {}).get(form)
            own = [run for run in data["runs"] if (run["outtype"], run["name"]) == (outtype, form)]
            sizes = (max(run["before"] for run in own), max(run["peak"] for run in own), data["bar"])
            cells = [f"{size / 1e6:.0f} MB" for size in sizes]
            yield form, outtype, spread_of(speed) if speed else "", *cells


def writing_note(data: Json) -> str:
    """Say what was run."""
    settings = data["settings"]
    return (
        f"Random BF16 Qwen3-MoE, {settings['n_layer']} layers of {settings['n_expert']} experts of "
        f"{settings['hidden']} x {settings['expert']}, a quarter of them left out; without an importance "
        f"matrix. Speed: seconds of llama-quantize, on the file of type auto, over those of writing, on all "
        f"cores, until the disk has it; median of {settings['rounds']} rounds (smallest to largest). Memory: "
        "anonymous; the bar is the largest stack of experts plus 500 MB."
    )


def server_table(data: Json) -> Iterable[Row]:
    """Yield file size and resident memory, then what novices save of either."""
    yield "file", "size", "resident memory of llama-server", "memory / size"
    for name, run in (*data["runs"].items(), ("full less novices", data["saved"])):
        sizes = (f"{run[key] / 1e6:.0f} MB" for key in ("size", "resident"))
        yield name, *sizes, f"{run['resident'] / run['size']:.3f}"


def server_note(data: Json) -> str:
    """Say what was run."""
    settings = data["settings"]
    return (
        f"Random {settings['weights']} weights in the shape of {settings['shape']}, {settings['n_layer']} "
        f"layers, {settings['ratio']:.0%} of the experts pruned; no memory mapping, context "
        f"{settings['ctx']}, one slot."
    )


def wheel_table(data: Json) -> Iterable[Row]:
    """Yield CPU times per token of both builds, and how many times as fast the wheel's is."""
    yield (
        "type",
        *(f"{test}, {name}" for test in SPEED_TESTS for name in ("native", "wheel", "times as fast")),
    )
    for case in data["cases"]:
        cells = []
        for test in SPEED_TESTS:
            found = case["summary"][test]
            times = (found["cpu_ms"][name]["median"] for name in ("native", "wheel"))
            cells += [*(f"{time:.2f} ms" for time in times), spread_of(found["speed_ratio"])]
        yield case["weights"], *cells


def wheel_note(data: Json) -> str:
    """Say what was run."""
    settings = data["settings"]
    return (
        f"CPU time per token, {settings['threads']} thread; random weights of two layers in the shape of "
        f"{settings['shape']}, {settings['ratio']:.0%} of the experts novices; prompts of "
        f"{settings['n_prompt']} tokens, {settings['n_gen']} generated; the builds in turns, "
        f"{settings['rounds']} rounds: median of the ratios (smallest to largest)."
    )


def large_table(data: Json) -> Iterable[Row]:
    """Yield what the 6 GB model took, streamed and not."""
    yield (
        "--stream",
        "model",
        "peak memory",
        "GGUF",
        *(f"{stage}" for stage in data["runs"][0]["seconds"]),
        "CPU",
    )
    for run in data["runs"]:
        sizes = [f"{size / 1e9:.2f} GB" for size in (data["model"]["bytes"], run["peak"], run["size"])]
        times = [f"{run['seconds'].get(stage, 0):.0f} s" for stage in data["runs"][0]["seconds"]]
        yield run["stream"], *sizes, *times, f"{run['cpu_s']:.0f} s"


def large_estimates(data: Json) -> Iterable[Row]:
    """Yield estimates for published models on a consumer machine."""
    yield "model", "in BF16", "memory", "disk", "calibration", "with fingerprint and writing"
    for row in data["estimates"]:
        sizes = [f"{row[key] / 1e9:.1f} GB" for key in ("bytes", "memory", "disk")]
        yield row["name"], *sizes, *(f"{row[key] / 60:.1f} min" for key in ("calibrate_s", "total_s"))


def large_note(data: Json) -> str:
    """Say what was run, and what the estimates assume."""
    settings, model = data["settings"], data["model"]
    machine = settings["machine"]
    return (
        f"Measured: random BF16 Qwen3-MoE, {settings['n_token']} tokens, hidden states of "
        f"{2 * settings['n_token'] * model['hidden_size'] / 1e6:.0f} MB, ratio 0.5. Estimated: "
        f"{settings['n_token_large']} tokens, {settings['overhead'] / 1e6:.0f} MB besides what is counted, "
        f"{machine['name']} reading {machine['read'] / 1e9:.0f} GB/s and reaching {machine['share']:.0%} of "
        f"{machine['flops'] / 1e12:.0f} TFLOP/s."
    )


def gpu_table(data: Json) -> Iterable[Row]:
    """Yield what was run on a GPU, and what came of it."""
    yield "what", "result"
    build, ops = data["build"], data["ops"]
    yield "the whole backend, compiled", f"{build['seconds']:.0f} s, {build['cpu_minutes']:.0f} CPU minutes"
    cases = (
        f"{ops['passed']} passed, {ops['with_skipped_ids']} of them with skipped ids; {ops['failed']} failed"
    )
    yield f"test-backend-ops -o MUL_MAT_ID for {ops['seconds']} s", cases
    check = data["memcheck"]
    yield "cases with skipped ids in compute-sanitizer", f"{check['passed']} passed, {check['errors']} errors"
    for name in dict.fromkeys(run["outtype"] for run in data["logits"]):
        runs = [f"{run['nmse']:.0e}" for run in data["logits"] if run["outtype"] == name]
        yield (
            f"demo at ratio 0.5, {name.upper()}: NMSE of logits, one batch / token by token",
            " / ".join(runs),
        )
    yield (
        "statistics of a calibration, against the CPU's",
        f"equal up to {data['statistics']['largest_error']:.0e}",
    )


def gpu_note(data: Json) -> str:
    """Say where it was run."""
    return f"{data['machine']['gpu']}; statistics in float32."


def spread_of(ratio: Json) -> str:
    """Format a ratio and its spread."""
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"


TABLES: dict[str, Callable[[Json], Iterable[Row]]] = {
    **trust_tables.TABLES,
    "speed": speed_table,
    "speed/short": speed_short,
    "speed/q4": speed_q4,
    "speed/spread": speed_spread_table,
    "speed/thin": speed_thin,
    "speed/unpruned": speed_unpruned,
    "calibrate": calibrate_table,
    "quality": quality_table,
    "methods": methods_table,
    "methods/short": methods_short,
    "methods/against": methods_against,
    "methods/third": methods_third,
    "methods/thirdshort": methods_third_short,
    "protect": protect_table,
    "protect/short": protect_short,
    "methods/thin": methods_thin,
    "methods/controls": methods_controls,
    "methods/stock": methods_stock,
    "methods/systems": methods_systems,
    "methods/mended": methods_mended,
    "methods/thinshort": methods_thin_short,
    "methods/thinhalf": methods_thin_half,
    "gpu": gpu_table,
    "bytes": bytes_table,
    "bytes/short": bytes_short,
    "bytes/half": bytes_half,
    "writing": writing_table,
    "roads": roads_table,
    "dry": dry_table,
    "server": server_table,
    "wheel": wheel_table,
    "large": large_table,
    "large/estimates": large_estimates,
}
NOTES: dict[str, Callable[[Json], str]] = {
    **trust_tables.NOTES,
    "speed": speed_note,
    "calibrate": calibrate_note,
    "quality": quality_note,
    "methods": methods_paper_note,
    **dict.fromkeys(
        (f"methods/{view}" for view in ("short", "against", "third", "thirdshort")), methods_note
    ),
    "protect": protect_note,
    **dict.fromkeys(
        (f"methods/{view}" for view in ("thin", "thinshort", "controls", "stock", "systems", "mended")),
        methods_thin_note,
    ),
    **dict.fromkeys(("speed/thin", "speed/unpruned"), speed_thin_note),
    "gpu": gpu_note,
    **dict.fromkeys(("bytes", "bytes/short"), bytes_note),
    "writing": writing_note,
    "roads": roads_note,
    "dry": dry_note,
    "server": server_note,
    "wheel": wheel_note,
    "large": large_note,
}
# the README's tables: where the rest is takes the place of how they were measured
BRIEF = {
    "methods/thinhalf": (
        "Mean over five calibration texts, on text that neither training nor calibration has seen. "
        "[All ratios, spreads, and how it was measured](docs/tables/thin.md)."
    ),
    "bytes/half": (
        "On text like the calibration's; sizes relative to the unpruned file; after the divergence the type "
        "of the file, with `--fit` of all but the experts. [All sizes and ways](docs/tables/bytes.md)."
    ),
    "speed/q4": (
        "Random weights of two layers in these shapes, 2 threads. "
        "[Other types, ratios, spreads](docs/tables/speed.md)."
    ),
}
# title, what its tables are, and the tables with their headings
PAGES: dict[str, tuple[str, str, dict[str, str]]] = {
    "thin.md": (
        "Thin experts at every ratio",
        "At the same size of the file: REAP, whole experts and constants, and thin experts, on text like the "
        "calibration's, unlike it, and rare. [What thin experts are, and what this shows]"
        "(../methods.md#thin-experts-the-best-file-of-a-size).",
        {"methods-thin/thin": ""},
    ),
    "variants.md": (
        "Every variant of pruning",
        "Whole experts and constants: each score, novice and way to share out the layers' counts. "
        "[What this shows](../methods.md#every-variant).",
        {"methods/short": "Against the default", "methods": "Every variant, against the paper's combination"},
    ),
    "rare_text.md": (
        "Text unlike the calibration's",
        "The default, and REAP's score, on three kinds of text after calibrations of two lengths. "
        "[What this shows](../methods.md#text-unlike-the-calibrations).",
        {"methods-third/third": ""},
    ),
    "bytes.md": (
        "Ways to a size",
        "What each way to a file of that size costs. [What this shows](../methods.md#at-equal-bytes).",
        {"bytes": ""},
    ),
    "speed.md": (
        "Speed on the CPU, in every cell",
        "How many times less time a token takes. [How it was measured, what the names mean](../speed.md).",
        {"speed": "CPU time", "speed/spread": "With spreads, and wall times"},
    ),
}

if __name__ == "__main__":
    sys.exit(main())
