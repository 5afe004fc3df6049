"""The figures of a page, by matplotlib: drawn on nothing, in a colour that is the text's, light or dark."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mone_export.errors import MoneError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK = "#0b1c2d"  # stands for the text's own colour until the figure is in a page
_SALT = "mone"  # so that the same figure has the same bytes
_ROW, _LEAST, _MOST = 0.11, 1.4, 7.0  # inches


def heat(
    values: Sequence[Sequence[float | None]], layers: Sequence[int], label: str, *, least_first: bool = False
) -> "Figure":
    """Draw one number for each layer (down) and expert (across); None stays empty.

    The largest are bright, or the smallest where they come first.
    """
    rows = [[math.nan if value is None else value for value in row] for row in values]
    figure, axes = _axes(len(rows))
    image = axes.imshow(
        rows, aspect="auto", interpolation="nearest", cmap="viridis_r" if least_first else "viridis"
    )
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    bar.set_label(label, size=8, color=_INK)
    bar.ax.tick_params(labelsize=8, colors=_INK)
    bar.outline.set_edgecolor(_INK)
    _name_axes(axes, layers)
    return figure


def kinds(values: Sequence[Sequence[str]], layers: Sequence[int], names: Sequence[str]) -> "Figure":
    """Draw one of `names`, from most to least, for each layer (down) and expert (across)."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colours = _colours(len(names))
    figure, axes = _axes(len(values), above=0.4)
    rows = [[names.index(value) for value in row] for row in values]
    axes.imshow(
        rows,
        aspect="auto",
        interpolation="nearest",
        cmap=ListedColormap(colours),
        vmin=-0.5,
        vmax=len(names) - 0.5,
    )
    handles = [Patch(color=colour, label=name) for colour, name in zip(colours, names, strict=True)]
    _legend(axes, handles, len(names))
    _name_axes(axes, layers)
    return figure


def shares(values: Sequence[Mapping[str, float]], layers: Sequence[int], names: Sequence[str]) -> "Figure":
    """Draw for each layer (across) how a whole divides among `names`, from the bottom up."""
    figure, axes = _axes(18, above=0.4)
    bottom = [0.0] * len(values)
    places = range(len(values))
    bars = []
    for name, colour in zip(names, _colours(len(names)), strict=True):
        heights = [row.get(name, 0.0) for row in values]
        bars.append(axes.bar(places, heights, 0.9, bottom=bottom, color=colour, label=name))
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of routed slots")
    axes.set_xlabel("layer")
    step = max(1, len(layers) // 16)
    axes.set_xticks(list(places)[::step], list(map(str, layers))[::step])
    _legend(axes, bars, len(names))
    return figure


def svg(figure: "Figure", title: str) -> str:
    """Return a figure as SVG to be put into a page: its text in the page's own colour, with a title."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{_SALT} {title}"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    number = format(sum(title.encode()) % 10**6, "d")
    text = re.sub(r'\bid="([^"]+)"', rf'id="f{number}\1"', text)  # several figures share a page
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>f{number}", text)
    return re.sub(
        r"<svg ([^>]*)>",
        rf'<svg \1 role="img" aria-label="{title}"><title>{title}</title>',
        text,
        count=1,
    )


def save(figure: "Figure", stem: Path) -> None:
    """Write a figure as SVG and as PNG on white; raises `MoneError` where that is not possible."""
    import matplotlib

    try:
        with matplotlib.rc_context({"svg.hashsalt": _SALT}):
            figure.savefig(f"{stem}.svg", facecolor="white", metadata={"Date": None})
            figure.savefig(f"{stem}.png", facecolor="white", dpi=150, metadata={"Software": None})
    except OSError as error:
        raise MoneError(f"cannot write {stem}.svg ({error.strerror}): choose another place") from None


def _axes(n_row: int, *, above: float = 0.0) -> tuple["Figure", Any]:
    """Return a figure of the width of a page and a height for so many rows, with its axes."""
    import matplotlib
    from matplotlib.figure import Figure

    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: Any = dict.fromkeys(ink, _INK) | {"font.size": 9, "font.family": "sans-serif"}
    with matplotlib.rc_context(style):
        height = min(_MOST, max(_LEAST, n_row * _ROW)) + 0.6 + above
        figure = Figure(figsize=(7.2, height), layout="constrained")
        axes = figure.subplots()
        axes.set_facecolor("none")
    return figure, axes


def _name_axes(axes: Any, layers: Sequence[int]) -> None:
    step = max(1, len(layers) // 12)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_ylabel("layer")
    axes.set_xlabel("expert")


def _legend(axes: Any, handles: Sequence[Any], n: int) -> None:
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=min(n, 5),
        frameon=False,
        fontsize=8,
        labelcolor=_INK,
        borderaxespad=0.2,
    )


def _colours(n: int) -> list[Any]:
    """Return colours from most to least, apart in light and dark and without telling red from green."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 - 0.8 * place / max(1, n - 1)) for place in range(n)]
