#!/usr/bin/env python3
"""Draw docs/plots/how_it_works.svg: one token's way through a pruned layer.

python tools/pages/how_it_works.py
"""

from pathlib import Path

FILE = Path(__file__).resolve().parents[2] / "docs" / "plots" / "how_it_works.svg"

# what became of each expert, and the weight that the router gives it where it is chosen; the weights sum to 1
EXPERTS = (
    ("whole", 0.41),
    ("constant", None),
    ("thin", 0.27),
    ("constant", 0.20),
    ("whole", None),
    ("thin", None),
    ("whole", 0.12),
    ("constant", None),
)
WIDTHS = {"whole": 150, "thin": 62, "constant": 12}
TEXTS = {
    "whole": "whole: its matrices as they were",
    "thin": "thin: the channels that are worth their bytes",
    "constant": "constant (novice): one vector, no product",
}
TOP, STEP, HEIGHT = 62, 38, 24
ROUTER, EXPERT, SUM = 88, 270, 510  # left edges
# a panel of its own, so that it reads on a light page and on a dark one
STYLE = """
  .panel { fill: #f7f8fa; stroke: #c9ced6 }
  text { font: 16px system-ui, "DejaVu Sans", sans-serif; fill: #20242b }
  .small { font-size: 13.5px; fill: #4a515c }
  .box { fill: #ffffff; stroke: #4a515c }
  .bar { fill: #b9c0cb } .bar.chosen { fill: #20242b }
  .whole { fill: #0072b2 } .thin { fill: #56b4e9 } .constant { fill: #d55e00 }
  .idle { opacity: 0.35 }
  .way { fill: none; stroke: #20242b; stroke-width: 1.5; marker-end: url(#tip) }
"""


def main() -> None:
    """Write the figure."""
    middle = TOP + STEP * len(EXPERTS) / 2 - (STEP - HEIGHT) / 2
    bottom = TOP + STEP * len(EXPERTS)
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 660 470" role="img" aria-labelledby="t">',
        '<title id="t">A token in a pruned layer: the router scores all experts; of the four chosen, two are '
        "whole, one is thin, one is a constant; their weighted sum is the layer's output</title>",
        f"<style>{STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0 8 4 0 8z" fill="#20242b"/></marker></defs>',
        '<rect class="panel" x="0.5" y="0.5" width="659" height="469" rx="8"/>',
        _text(ROUTER, 34, "router"),
        _text(ROUTER, 51, "all, pruned or not", "small"),
        _text(EXPERT, 34, "experts in the file"),
        _text(EXPERT, 51, "faded: not chosen by this token", "small"),
        f'<rect class="box" x="{ROUTER}" y="{TOP - 6}" width="110" height="{bottom - TOP + 2}" rx="6"/>',
        _text(16, middle + 5, "token"),
        _way(62, middle, ROUTER, middle),
        f'<circle class="box" cx="{SUM + 18}" cy="{middle}" r="18"/>',
        f'<text x="{SUM + 18}" y="{middle + 6}" text-anchor="middle" style="font-size: 18px">+</text>',
        _way(SUM + 36, middle, SUM + 72, middle),
        _text(SUM + 78, middle + 5, "output"),
    ]
    for number, (fate, weight) in enumerate(EXPERTS):
        parts += _row(TOP + STEP * number, fate, weight, middle)
    for number, (fate, text) in enumerate(TEXTS.items()):
        y = bottom + 24 + 22 * number
        parts.append(f'<rect class="{fate}" x="{ROUTER}" y="{y}" width="14" height="14" rx="2"/>')
        parts.append(_text(ROUTER + 24, y + 12, text))
    FILE.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def _row(y: float, fate: str, weight: float | None, middle: float) -> list[str]:
    """Return a router's score, the expert, and where it is chosen the ways there and on."""
    chosen = weight is not None
    centre, right = y + HEIGHT / 2, EXPERT + WIDTHS[fate]
    score = f'<rect class="bar{" chosen" * chosen}" x="{ROUTER + 10}" y="{y + 6}" height="12"'
    parts = [
        f'{score} width="{190 * weight if weight else 12}"/>',
        f'<rect class="{fate}{" idle" * (not chosen)}" x="{EXPERT}" y="{y}" width="{WIDTHS[fate]}" '
        f'height="{HEIGHT}" rx="3"/>',
    ]
    if weight:
        parts += [
            _way(ROUTER + 110, centre, EXPERT - 2, centre),
            _text(ROUTER + 124, centre - 5, f"{weight:.2f}", "small"),
            f'<path class="way" d="M{right + 4} {centre} H{EXPERT + 156} '
            f'C{EXPERT + 215} {centre} {EXPERT + 190} {middle} {SUM} {middle}"/>',
        ]
    return parts


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text{f" class={kind!r}" if kind else ""} x="{x}" y="{y}">{text}</text>'


def _way(x: float, y: float, x_end: float, y_end: float) -> str:
    return f'<path class="way" d="M{x} {y} {x_end} {y_end}"/>'


if __name__ == "__main__":
    main()
