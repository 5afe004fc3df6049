"""The card of a pruned file: what a publisher uploads beside the GGUF, all of it from its record.

README.md with the hub's front matter, selection.json (what became of which expert, by original id), a figure
of the fates, report.json (the record) and SHA256SUMS.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mone_export.paths import RECORD, check_card
from mone_export.publishing import charts
from mone_export.publishing.page import fate_names, figures, run_commands
from mone_export.publishing.record import Record, save_record, write_text
from mone_export.publishing.shown import FORMS, at

_HUB = "https://huggingface.co/"
_SUMS = "SHA256SUMS"
_LIMITS = (
    "Pruning is lossy: what the calibration text does not show suffers first. Try the file on your own kind "
    "of text before you rely on it (`mone-eval FILE --against ORIGINAL -f TEXT`).",
    "{measured}; long contexts were not tried.",
    "Whatever the original is unfit for, this file is, too.",
)


def write_card(folder: Path, record: Record) -> None:
    """Write the card of a record into a folder, over an earlier one; raises `MoneError` where it cannot.

    A folder that is not empty must be a card's, or hold nothing that this would replace.
    """
    check_card(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_record(folder / RECORD, record)
    write_text(folder / "README.md", readme(record))
    names = [RECORD, "README.md"]
    if layers := at(record, "export/layers"):
        write_text(folder / "selection.json", json.dumps(_selection(layers), indent=1) + "\n")
        names.append("selection.json")
    for name, _, figure in figures(record):
        if name == "fates":
            charts.save(figure, folder / name)
            names += [f"{name}.svg", f"{name}.png"]
    sums = [(each["sha256"], each["name"]) for each in at(record, "file/files") or ()]
    sums += [(hashlib.sha256((folder / name).read_bytes()).hexdigest(), name) for name in sorted(names)]
    write_text(folder / _SUMS, "".join(f"{sha256}  {name}\n" for sha256, name in sums))


def readme(record: Record) -> str:
    """Return the text of README.md: front matter for the hub, then what a user wants to know."""
    return f"---\n{_front_matter(record)}\n---\n\n" + "\n".join(_body(record)).rstrip() + "\n"


def _front_matter(record: Record) -> str:
    from huggingface_hub import ModelCardData

    made = at(record, "file/made") or {}
    stated = (made.get(name) for name in ("mone.source.id", "general.base_model.0.repo_url"))
    base = next((each.removeprefix(_HUB) for each in stated if isinstance(each, str) and each), None)
    licence = made.get("general.license")
    data = ModelCardData(
        base_model=base,
        license=licence if isinstance(licence, str) else None,
        pipeline_tag="text-generation",
        library_name="llama.cpp",
        tags=["gguf", "moe", "pruned", "mone_export"],
    )
    return str(data.to_yaml())


def _body(record: Record) -> Iterator[str]:
    show = Told(record)
    name = show("file/file")
    yield f"# {name}\n"
    if at(record, "export"):
        model = show("export/model/id" if at(record, "export/model/id") else "export/model/name")
        yield (
            f"{model}, a mixture of {show('export/spec/n_expert', 'whole')} experts in each of "
            f"{show('export/n_layer', 'whole')} layers, made smaller: {show('export/share_pruned', 'share')} "
            f"of the experts, or of their channels, are gone. {show('export/size', 'size')}, in place of "
            f"{show('export/size_unpruned', 'size')}.\n"
        )
    yield from _measured(record, show)
    yield from _became(record)
    yield "## Run it\n"
    if at(record, "file/needs") == "patched":
        yield "The file needs a llama.cpp with a few patches; mone_export builds it with one command.\n"
    yield "```"
    yield from run_commands(str(at(record, "file/file")), needs=str(at(record, "file/needs")))
    yield "```\n"
    yield "## Limits\n"
    folders = _folders(record)
    remarks = [
        plain(folders.sub("", remark))
        for part in ("export/remarks", "evaluation/warnings")
        for remark in at(record, part) or ()
    ]
    measured = "Measured on short texts" if at(record, "evaluation") else "Nothing was measured"
    yield from (f"- {line}" for line in (*remarks, *(line.format(measured=measured) for line in _LIMITS)))
    yield ""
    if at(record, "export"):
        yield from _made(record, show)


def _became(record: Record) -> Iterator[str]:
    """Yield how many experts have which fate."""
    totals: dict[str, int] = {}
    for layer in at(record, "export/layers") or at(record, "file/layers") or ():
        for fate, n in (layer.get("n_by_fate") or layer["fates"]).items():
            totals[fate] = totals.get(fate, 0) + n
    yield "## What became of the experts\n"
    yield from (f"- {totals[fate]}: {_meaning(fate)}" for fate in fate_names([list(totals)]))
    yield ""
    if at(record, "export/layers"):
        yield "![The fate of each expert: layers down, experts across](fates.png)\n"
        yield "`selection.json` lists them by their original numbers.\n"


def _made(record: Record, show: "Told") -> Iterator[str]:
    yield "## How it was made\n"
    commands = [at(record, f"{part}/command") for part in ("export", "evaluation")]
    if any(commands):
        yield "\n".join(["```", *(without_folders(command) for command in commands if command), "```\n"])
    for number, text in enumerate(at(record, "export/text") or ()):
        for source, n_token in text["sources"].items():
            yield f"- text: {FORMS['whole'](n_token)} tokens of {plain(Path(source).name)}"
        yield f"- SHA-256 of its tokens: `{show(f'export/text/{number}/corpus_sha256')}`"
    yield f"- SHA-256 of the model: `{show('export/model/sha256')}`"
    if not at(record, "export/model/id"):
        yield "- made from a local copy: its publisher knows the `base_model` on the hub"
    recipe = at(record, "export/recipe") or {}
    names = ("method", "novice", "score", "allocation")
    yield f"- recipe: {', '.join(f'{key} {recipe[key]}' for key in names if key in recipe)}"
    yield f"- mone_export {show('export/made_with/mone-export')}"
    yield f"\n`{_SUMS}` has the hashes of the files here and of the GGUF, which belongs beside them."


class Told:
    """Says the values of a record in Markdown."""

    def __init__(self, record: Record) -> None:
        """Take the record."""
        self._record = record

    def __call__(self, pointer: str, form: str = "text") -> str:
        """Return what is at a place; a dash where there is nothing."""
        value = at(self._record, pointer)
        return "–" if value is None else plain(FORMS[form](value))


def without_folders(command: str) -> str:
    """Return a command without the folders of the machine it ran on: of paths only the names are left."""
    words = [
        word.rpartition("/")[2] if word.startswith(("/", "~", ".")) else word for word in shlex.split(command)
    ]
    return shlex.join(words)


def _folders(record: Record) -> re.Pattern[str]:
    """Return what the folders of the export's paths look like in a remark."""
    words = shlex.split(at(record, "export/command") or "")
    found = {
        word.rpartition("/")[0] + "/" for word in words if word.startswith(("/", "~", ".")) and "/" in word
    }
    return re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True))) or r"(?!)")


def plain(text: str) -> str:
    """Return a text of others as Markdown shows it: one line, no markup, no cell of a table ended."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _measured(record: Record, show: Told) -> Iterator[str]:
    """Yield the table of sizes, divergences and tasks, where they were measured."""
    files = [f"evaluation/files/{place}" for place, _ in enumerate(at(record, "evaluation/files") or ())]
    if not files:
        yield "How far it strays from the original was not measured: `mone-eval ... --card` adds it.\n"
        return
    if at(record, "evaluation/against"):
        files.append("evaluation/against")
    yield "## How it fares\n"
    yield "KL divergence from the original's predictions in nats per token, ± its standard error.\n"
    yield "| file | size | text | tokens | KL divergence | same likeliest token | perplexity |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for place in files:
        for number, _ in enumerate(at(record, f"{place}/texts") or ()):
            text = f"{place}/texts/{number}"
            cells = [
                show(f"{text}/kl_mean", "measured"),
                show(f"{text}/same_top", "measured share"),
                show(f"{text}/perplexity", "measured"),
            ]
            first = [show(f"{place}/file"), show(f"{place}/size", "size"), show(f"{text}/name")]
            row = [*first, show(f"{text}/n_token", "whole"), *cells]
            yield f"| {' | '.join(row)} |"
    yield ""
    for place in files:
        for number, task in enumerate(at(record, f"{place}/tasks") or ()):
            accuracy = show(f"{place}/tasks/{number}/accuracy", "measured share")
            blind = " (the original guesses, too: it says nothing)" if task["blind"] else ""
            yield f"- {show(f'{place}/file')}, {plain(task['name'])}: {accuracy} right{blind}"
    yield ""


def _meaning(fate: str) -> str:
    """Say what a fate means."""
    if fate.startswith("whole"):
        return f"whole{fate.removeprefix('whole')}, as in the original"
    if fate[0].isdigit():
        return f"thin, with {fate} of their own, fitted again"
    return "a constant vector in their place" if fate == "constant" else "gone, the router does not know them"


def _selection(layers: Sequence[Any]) -> dict[str, Any]:
    """Return for each layer the original ids of each fate."""
    found: dict[str, dict[str, list[int]]] = {}
    for layer in layers:
        own = found.setdefault(str(layer["layer"]), {})
        for expert, fate in enumerate(layer["fates"]):
            own.setdefault(fate, []).append(expert)
    return {"n_expert": len(layers[0]["fates"]), "layers": found}
