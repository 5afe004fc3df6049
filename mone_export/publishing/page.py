"""The page of a pruned file: one HTML file that asks for nothing else, from its record."""

import json
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from mone_export.artifacts import in_order
from mone_export.publishing import charts
from mone_export.publishing.record import Record
from mone_export.publishing.shown import NOTHING, Shown, at, step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Sequence[Any]


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a section; `kind` says which of the other fields it has."""

    kind: str
    text: Any = ""
    lines: Sequence[Any] = ()
    care: bool = False
    facts: Sequence[tuple[str, Any]] = ()
    drawn: Markup = Markup()
    caption: str = ""
    label: str = ""
    head: Sequence[str] = ()
    rows: Sequence[Row] = ()
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """A section of the page; those without parts are left out."""

    title: str
    parts: Sequence[Part] = field(default_factory=list)


def render(record: Record) -> str:
    """Return the page of a record, of whatever parts it has."""
    from jinja2 import Environment, StrictUndefined

    show = Shown(record)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    sections = [
        Section("", list(_summary(record, show))),
        Section("What to know before you use it", list(_remarks(record, show))),
        Section("How it fares", list(_quality(record, show))),
        Section("What was pruned", list(_pruned(record, show))),
        Section("What the router asks for", list(_asked(record, show))),
        Section("Where its bytes are", list(_bytes(record, show))),
        Section("How to run it", list(_running(record))),
        Section("How it was made", list(_made(record, show))),
    ]
    kept = [Section(each.title, [*map(_without_empty, each.parts)]) for each in sections if each.parts]
    return template.render(title=_title(record), sections=kept)


def _without_empty(part: Part) -> Part:
    """Return a table without the columns that have nothing in any row."""
    if part.kind != "table":
        return part
    full = [
        place for place, _ in enumerate(part.head) if any(str(row[place]) != NOTHING for row in part.rows)
    ]
    rows = [[row[place] for place in full] for row in part.rows]
    return replace(part, head=[part.head[place] for place in full], rows=rows)


def figures(record: Record) -> Iterator[tuple[str, str, "Figure"]]:
    """Yield (name, title, figure) of everything that the page draws of the layers."""
    layers = at(record, "export/layers") or []
    numbers = [layer["layer"] for layer in layers]
    if not layers:
        return
    own = [layer["fates"] for layer in layers]
    names = fate_names(own)
    yield "fates", "The fate of each expert", charts.kinds(own, numbers, names)
    ranks = [_ranks(layer["scores"]) for layer in layers]
    if any(rank is not None for row in ranks for rank in row):
        drawn = charts.heat(ranks, numbers, "rank in its layer", least_first=True)
        yield "scores", "How much each expert is needed", drawn
    if all(layer["use"] for layer in layers):
        even = [[share * len(layer["use"]) for share in layer["use"]] for layer in layers]
        label = "times an even share"
        yield "use", "How often each expert is chosen", charts.heat(even, numbers, label)
        shares = [layer["use_by_fate"] for layer in layers]
        yield "slots", "What the chosen experts have become", charts.shares(shares, numbers, names)


def fate_names(fates: Iterable[Iterable[str]]) -> list[str]:
    """Return the fates that occur in any of the rows, in order."""
    return in_order({fate for row in fates for fate in row})


def _title(record: Record) -> str:
    return str(at(record, "file/file") or at(record, "evaluation/files/0/file") or "A pruned model")


def _summary(record: Record, show: Shown) -> Iterator[Part]:
    if not at(record, "export"):
        return
    model = "export/model/id" if at(record, "export/model/id") else "export/model/name"
    spec = "export/spec"
    facts = [
        ("made from", show(model)),
        (
            "experts",
            Markup("{} in each of {} layers, {} used per token").format(
                show(f"{spec}/n_expert", "whole"),
                show("export/n_layer", "whole"),
                show(f"{spec}/top_k", "whole"),
            ),
        ),
        (
            "pruned",
            Markup("{} of the experts, or of their channels").format(show("export/share_pruned", "share")),
        ),
        (
            "size",
            Markup("{}, of {} with all experts").format(
                show("export/size", "size"), show("export/size_unpruned", "size")
            ),
        ),
    ]
    for number, _ in enumerate(at(record, "evaluation/files/0/texts") or ()):
        place = f"evaluation/files/0/texts/{number}"
        if at(record, f"{place}/kl_mean"):
            facts.append(
                (
                    Markup("on {}").format(show(f"{place}/name")),
                    Markup("KL divergence {} nats per token").format(show(f"{place}/kl_mean", "measured")),
                )
            )
    yield Part("facts", facts=facts)


def _remarks(record: Record, show: Shown) -> Iterator[Part]:
    places = [
        f"{part}/{number}"
        for part in ("export/remarks", "evaluation/warnings")
        for number, _ in enumerate(at(record, part) or ())
    ]
    if places:
        yield Part("list", lines=[show(place) for place in places], care=True)


def _quality(record: Record, show: Shown) -> Iterator[Part]:
    places = [f"evaluation/files/{number}" for number, _ in enumerate(at(record, "evaluation/files") or ())]
    if at(record, "evaluation/against"):
        places.append("evaluation/against")
    if not places:
        return
    yield Part("text", text="KL divergence of the file's predictions from the original's, in nats per token.")
    columns = (
        ("kl_mean", "measured"),
        ("same_top", "measured share"),
        *((name, "measured") for name in ("perplexity", "kl_median", "kl_99", "kl_999")),
    )
    rows = []
    for place in places:
        for number, _ in enumerate(at(record, f"{place}/texts") or ()):
            text = f"{place}/texts/{number}"
            cells = [show(f"{text}/{name}", form) for name, form in columns]
            rows.append([show(f"{place}/file"), show(f"{text}/name"), *cells])
    heads = ("file", "text", "mean KL", "same likeliest", "perplexity", "median KL", "99%", "99.9%")
    yield Part("table", label="On each text", head=heads, rows=rows)
    yield from _speeds(record, show, places)
    yield from _probes(record, show, places)
    yield from _tasks(record, show, places)


def _speeds(record: Record, show: Shown, places: Sequence[str]) -> Iterator[Part]:
    rows = [
        [
            show(f"{place}/file"),
            show(f"{place}/size", "size"),
            show(f"{place}/resident", "size"),
            show(f"{place}/prefill", "measured"),
            show(f"{place}/decode", "measured"),
        ]
        for place in places
    ]
    heads = ("file", "size", "memory while it runs", "prompt, tokens/s", "generation, tokens/s")
    yield Part("table", label="Size, memory and speed", head=heads, rows=rows)


def _probes(record: Record, show: Shown, places: Sequence[str]) -> Iterator[Part]:
    columns = dict.fromkeys(("repeated", "distinct", "ended", "closed"), "measured share")
    columns["drift"] = "measured"
    rows = [
        [
            show(f"{place}/file"),
            manner,
            *(show(f"{place}/probe/{manner}/{name}", form) for name, form in columns.items()),
        ]
        for place in places
        if at(record, f"{place}/probe")
        for manner in ("greedy", "sampled")
    ]
    if not rows:
        return
    heads = (
        "file",
        "continued",
        "repeated 4-grams",
        "different 4-grams",
        "ends by itself",
        "closes thinking",
    )
    yield Part("table", label="Does it loop, does it end", head=(*heads, "drift, nats per token"), rows=rows)
    lines = []
    for place in places if at(record, "evaluation/against") else ():
        differing = at(record, f"{place}/probe/differing")
        if differing is None or place == "evaluation/against":
            continue
        names = [show(f"{place}/probe/differing/{number}") for number, _ in enumerate(differing)]
        said = (
            "differs from the original in " if names else "writes like the original, as far as this can tell"
        )
        lines.append(Markup("{} {}{}.").format(show(f"{place}/file"), said, Markup(", ").join(names)))
    yield Part("list", lines=lines)


def _tasks(record: Record, show: Shown, places: Sequence[str]) -> Iterator[Part]:
    rows = []
    for place in places:
        for number, task in enumerate(at(record, f"{place}/tasks") or ()):
            own = f"{place}/tasks/{number}"
            verdict = "the original guesses, too: it says nothing" if task["blind"] else ""
            cells = (show(f"{own}/accuracy", "measured share"), show(f"{own}/chance", "share"), verdict)
            rows.append([show(f"{place}/file"), show(f"{own}/name"), *cells])
    if rows:
        yield Part(
            "table", label="Multiple choice", head=("file", "task", "right", "by chance", ""), rows=rows
        )


def _pruned(record: Record, show: Shown) -> Iterator[Part]:
    layers = at(record, "export/layers") or []
    captions = {
        "fates": "Each row is a layer, each column an expert by its number in the original.",
        "scores": "By the score that decided; an expert with rank one stays longest.",
    }
    yield from _drawn(record, captions)
    if not layers:
        return
    yield _fate_table("How many experts of each layer", show, layers, "n_by_fate", "whole")
    lines = [
        Markup("Layer {}: super experts {} reach extreme outputs.").format(
            show(f"export/layers/{number}/layer", "whole"),
            Markup(", ").join(
                show(f"export/layers/{number}/super_experts/{i}", "whole")
                for i, _ in enumerate(layer["super_experts"])
            ),
        )
        for number, layer in enumerate(layers)
        if layer["super_experts"]
    ]
    if lines:
        yield Part("list", lines=lines)
    if at(record, "export/stability"):
        text = Markup(
            "Of the experts that go, {} went at half of the text already ({} in the least stable layer)."
        ).format(show("export/stability/mean", "share"), show("export/stability/least", "share"))
        yield Part("text", text=text)


def _asked(record: Record, show: Shown) -> Iterator[Part]:
    captions = {
        "use": "In the text of the calibration; one is an even share.",
        "slots": "A token chooses several experts in each layer; these are the shares of such choices.",
    }
    yield from _drawn(record, captions)
    layers = at(record, "export/layers") or []
    if layers and all(layer["use"] for layer in layers):
        yield _fate_table("In the text of the calibration", show, layers, "use_by_fate", "share")
    for number, text in enumerate(at(record, "evaluation/files/0/texts") or ()):
        if slots := text["slots"]:
            found = fate_names([list(row) for row in slots.values()])
            place = f"evaluation/files/0/texts/{number}"
            rows = [
                [
                    show.key(f"{place}/slots", layer),
                    *(show(f"{place}/slots/{layer}/{step(name)}", "share") for name in found),
                ]
                for layer in slots
            ]
            yield Part("text", text=Markup("On {}:").format(show(f"{place}/name")))
            yield Part(
                "table",
                label="Shares of routed slots",
                head=("layer", *map(_label, found)),
                rows=rows,
                folded=True,
            )


def _fate_table(label: str, show: Shown, layers: Sequence[Record], what: str, form: str) -> Part:
    """Return a table of what each layer has of every fate."""
    names = fate_names([layer["fates"] for layer in layers])
    rows = [
        [
            show(f"{place}/layer", "whole"),
            *(show(f"{place}/{what}/{step(name)}", form) for name in names),
        ]
        for place in (f"export/layers/{number}" for number, _ in enumerate(layers))
    ]
    return Part("table", label=label, head=("layer", *map(_label, names)), rows=rows, folded=True)


def _bytes(record: Record, show: Shown) -> Iterator[Part]:
    if uses := at(record, "file/n_byte"):
        rows = [[use, show(f"file/n_byte/{step(use)}", "size")] for use in uses]
        yield Part("table", label="Bytes by use", head=("use", "size"), rows=rows)
    if at(record, "file/memory/n_layer"):
        yield Part(
            "text",
            text=Markup("In memory: {} of weights, and about {} of cache for a context of {} tokens.").format(
                show("file/memory/weights", "size"),
                show("file/memory/cache", "size"),
                show("file/memory/n_ctx", "whole"),
            ),
        )
    if others := at(record, "export/alternatives"):
        rows = [
            [
                show(f"export/alternatives/{number}/outtype"),
                show(f"export/alternatives/{number}/size", "size"),
            ]
            for number, _ in enumerate(others)
        ]
        yield Part("text", text="Files of about this size with all experts, for comparison:")
        yield Part("table", label="Only quantised, about", head=("type", "size"), rows=rows)


def _running(record: Record) -> Iterator[Part]:
    if name := at(record, "file/file"):
        yield Part("code", text="\n".join(run_commands(str(name), needs=str(at(record, "file/needs")))))


def _made(record: Record, show: Shown) -> Iterator[Part]:
    for part in ("export", "evaluation"):
        if at(record, f"{part}/command"):
            yield Part("code", text=show(f"{part}/command"))
    facts: list[tuple[Any, Any]] = [
        (key, show(f"export/recipe/{step(key)}"))
        for key, value in (at(record, "export/recipe") or {}).items()
        if value is not None
    ]
    for number, text in enumerate(at(record, "export/text") or ()):
        place = f"export/text/{number}"
        for source in text["sources"]:
            n_token = show(f"{place}/sources/{step(source)}", "whole")
            facts.append(
                ("text", Markup("{} tokens of {}").format(n_token, show.key(f"{place}/sources", source)))
            )
        facts.append(("SHA-256 of its tokens", show(f"{place}/corpus_sha256")))
    if at(record, "file/sha256"):
        facts.append(("SHA-256 of the file", show("file/sha256")))
    if at(record, "export/model"):
        facts.append(("SHA-256 of the model", show("export/model/sha256")))
    places = {
        key: f"{part}/made_with/{step(key)}"
        for part in ("export", "evaluation")
        for key in at(record, f"{part}/made_with") or {}
    }
    facts += [(key, show(place)) for key, place in places.items()]
    if facts:
        yield Part("facts", facts=facts)


def run_commands(name: str, *, needs: str) -> Sequence[str]:
    """Return a line each for llama-cli, llama-server and llama-cpp-python, after what they need."""
    before = ["mone-llama build    # once: this file needs a patched llama.cpp"] if needs == "patched" else []
    folder = "$(mone-llama path)/" if needs == "patched" else ""
    file = shlex.quote(name)
    program = f"from llama_cpp import Llama; print(Llama({json.dumps(name)})('Once', max_tokens=32))"
    return [
        *before,
        f"{folder}llama-cli -m {file}",
        f"{folder}llama-server -m {file}",
        f"python -c {shlex.quote(program)}",
    ]


def _drawn(record: Record, captions: Mapping[str, str]) -> Iterator[Part]:
    """Yield the figures that have a caption here."""
    for name, title, figure in figures(record):
        if name in captions:
            drawn = Markup(charts.svg(figure, title))
            yield Part("figure", drawn=drawn, caption=f"{title}. {captions[name]}")


def _ranks(scores: Sequence[float | str | None]) -> list[float | None]:
    """Return the place of each score in its layer, 1 for the largest; None where there is no number."""
    numbers = [math.inf if score == "guarded" else score for score in scores]
    known = sorted((score for score in numbers if isinstance(score, float)), reverse=True)
    return [float(known.index(score) + 1) if isinstance(score, float) else None for score in numbers]


def _label(fate: str) -> Markup:
    """Return a fate as the head of a column; its digits are a name, no measurement."""
    return Markup("<span data-name>{}</span>").format(fate)
