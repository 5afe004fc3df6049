#!/usr/bin/env python3
"""Draw docs/plots/*.svg from docs/measurements/*.json.

    python tools/pages/plots.py       from docs/measurements

The same numbers as in the tables of docs/methods.md: KL divergence over the share pruned, and over the size.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from readme_tables import runs_after

ROOT = Path(__file__).resolve().parents[2]
MEASUREMENTS, PLOTS = ROOT / "docs" / "measurements", ROOT / "docs" / "plots"
TEXTS = ("like", "unlike")

# (method, score, novice, way) -> name in the legend, colour (told apart by the colour-blind, too), marker
LINES = {
    ("mone", "error", "least-squares", "sensitivity"): ("default", "#0072b2", "o"),
    ("mone", "mone", "mean", ""): ("MoNE's paper: even counts", "#56b4e9", "v"),
    ("mone", "error", "zero", "sensitivity"): ("default, no novices", "#009e73", "^"),
    ("drop", "reap", "none", ""): ("REAP", "#d55e00", "s"),
    ("dern", "gate", "none", ""): ("DERN", "#cc79a7", "D"),
}


def main() -> int:
    """Draw what has been measured; returns the exit status."""
    mpl.rcParams |= {"svg.hashsalt": "mone", "svg.fonttype": "none", "font.size": 9, "axes.grid": True}
    mpl.rcParams |= {"grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}
    PLOTS.mkdir(exist_ok=True)
    for name, draw in (("methods", draw_methods), ("bytes", draw_bytes)):
        file = MEASUREMENTS / f"{name}.json"
        if not file.is_file():
            print(f"{file.relative_to(ROOT)} does not exist: not drawn", file=sys.stderr)
            continue
        figure = draw(json.loads(file.read_text()))
        figure.savefig(PLOTS / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    return 0


def draw_methods(data: dict[str, Any]) -> Any:
    """Draw divergence over the ratio: mean and range of the calibration samples, per model and text."""
    models = list(data["settings"]["models"])
    figure, panels = plt.subplots(len(models), 2, figsize=(8, 3.2 * len(models)), sharex=True, squeeze=False)
    for panel, model, text in cells(panels, models):
        for line, (label, colour, marker) in LINES.items():
            values: dict[float, list[float]] = {}
            for run in runs_after(data):
                own = tuple(run.get(key, "") for key in ("method", "score", "novice", "way"))
                if run["model"] == model and own == line:
                    values.setdefault(run["ratio"], []).append(run[text]["kl"])
            ratios = sorted(values)
            panel.plot(
                ratios, [statistics.mean(values[r]) for r in ratios], marker=marker, color=colour, label=label
            )
            low, high = ([pick(values[r]) for r in ratios] for pick in (min, max))
            panel.fill_between(ratios, low, high, color=colour, alpha=0.12, linewidth=0)
        panel.set_xticks(sorted({run["ratio"] for run in data["runs"]} - {0.0}))
        panel.xaxis.set_major_formatter(lambda x, _: f"{x:.3g}")
    return finished(figure, panels, "share of the experts pruned")


def draw_bytes(data: dict[str, Any]) -> Any:
    """Draw divergence over the size: only quantised, REAP, constants, --fit."""
    models = list(data["settings"]["models"])
    figure, panels = plt.subplots(len(models), 2, figsize=(8, 3.2 * len(models)), squeeze=False)
    kinds = {
        "only quantised": ("#d55e00", "s"),
        "REAP": ("#cc79a7", "v"),
        "constants": ("#009e73", "^"),
        "--fit": ("#0072b2", "o"),
    }
    for panel, model, text in cells(panels, models):
        for label, (colour, marker) in kinds.items():
            values: dict[float, list[float]] = {}
            for run in data["runs"]:
                if run["model"] == model and run["arm"] == label.removeprefix("--"):
                    values.setdefault(run["size"] / 1e6, []).append(run[text]["kl"])
            sizes = sorted(values)
            means = [statistics.mean(values[size]) for size in sizes]
            panel.plot(sizes, means, marker=marker, color=colour, label=label, linewidth=1, markersize=5)
    return finished(figure, panels, "size of the file (MB)")


def cells(panels: Any, models: list[str]) -> Any:
    """Yield (panel, model, text) row by row."""
    for row, model in zip(panels, models, strict=True):
        for panel, text in zip(row, TEXTS, strict=True):
            panel.set_title(f"{model}, text {text} the calibration's", fontsize=9)
            yield panel, model, text


def finished(figure: Any, panels: Any, across: str) -> Any:
    """Label the axes, put the legend once."""
    for panel in panels.flat:
        panel.set_yscale("log")
        panel.set_ylabel("KL divergence (nats per token)")
    for panel in panels[-1]:
        panel.set_xlabel(across)
    panels[0][0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    sys.exit(main())
