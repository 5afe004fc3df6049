"""The card of a pruned file: what a publisher uploads beside the GGUF, all of it from its record.

README.md with the hub's front matter, selection.json (what became of which expert, by original id), a figure
of the fates, report.json (the record) and SHA256SUMS.
"""

import hashlib
import json
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
    "Measured on short texts; long contexts were not tried.",
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
    base = made.get("mone.source.id") or made.get("general.base_model.0.repo_url", "").removeprefix(_HUB)
    data = ModelCardData(
        base_model=base or None,
        license=made.get("general.license"),
        pipeline_tag="text-generation",
        library_name="llama.cpp",
        tags=["gguf", "moe", "pruned", "mone_export"],
    )
    return str(data.to_yaml())


def _body(record: Record) -> Iterator[str]:
    def show(pointer: str, form: str = "text") -> str:
        value = at(record, pointer)
        return "–" if value is None else FORMS[form](value)

    name = show("file/file")
    model = show("export/model/id") if at(record, "export/model/id") else show("export/model/name")
    yield f"# {name}\n"
    yield (
        f"{model}, a mixture of {show('export/spec/n_expert', 'whole')} experts in each of "
        f"{show('export/n_layer', 'whole')} layers, made smaller: {show('export/share_pruned', 'share')} of "
        f"the experts, or of their channels, are gone. {show('export/size', 'size')}, in place of "
        f"{show('export/size_unpruned', 'size')}.\n"
    )
    yield from _measured(record, show)
    yield "## What became of the experts\n"
    totals: dict[str, int] = {}
    for layer in at(record, "export/layers") or ():
        for fate, n in layer["n_by_fate"].items():
            totals[fate] = totals.get(fate, 0) + n
    yield from (f"- {totals[fate]}: {_meaning(fate)}" for fate in fate_names([list(totals)]))
    yield "\n![The fate of each expert: layers down, experts across](fates.png)\n"
    yield "`selection.json` lists them by their original numbers.\n"
    yield "## Run it\n"
    if at(record, "file/needs") == "patched":
        yield "The file needs a llama.cpp with a few patches; mone_export builds it with one command.\n"
    yield "```"
    yield from run_commands(name, needs=show("file/needs"))
    yield "```\n"
    yield "## Limits\n"
    yield from (f"- {line}" for line in (*(at(record, "export/remarks") or ()), *_LIMITS))
    yield "\n## How it was made\n"
    if at(record, "export/command"):
        yield f"```\n{show('export/command')}\n```\n"
    for number, text in enumerate(at(record, "export/text") or ()):
        for source, n_token in text["sources"].items():
            yield f"- text: {FORMS['whole'](n_token)} tokens of {source}"
        yield f"- SHA-256 of its tokens: `{show(f'export/text/{number}/corpus_sha256')}`"
    yield f"- SHA-256 of the model: `{show('export/model/sha256')}`"
    recipe = at(record, "export/recipe") or {}
    told = ", ".join(
        f"{key} {recipe[key]}" for key in ("method", "novice", "score", "allocation") if key in recipe
    )
    yield f"- recipe: {told}"
    yield f"- mone_export {show('export/made_with/mone-export')}"


def _measured(record: Record, show: Any) -> Iterator[str]:
    """Yield the table of sizes, divergences and tasks, where they were measured."""
    files = [f"evaluation/files/{place}" for place, _ in enumerate(at(record, "evaluation/files") or ())]
    if not files:
        yield "How far it strays from the original was not measured: `mone-eval --card` adds it.\n"
        return
    if at(record, "evaluation/against"):
        files.append("evaluation/against")
    yield "## How it fares\n"
    yield "KL divergence from the original's predictions in nats per token, ± its standard error.\n"
    yield "| file | size | text | KL divergence | same likeliest token | perplexity |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for place in files:
        for number, _ in enumerate(at(record, f"{place}/texts") or ()):
            text = f"{place}/texts/{number}"
            cells = [
                show(f"{text}/kl_mean", "measured"),
                show(f"{text}/same_top", "measured share"),
                show(f"{text}/perplexity", "measured"),
            ]
            row = [show(f"{place}/file"), show(f"{place}/size", "size"), show(f"{text}/name"), *cells]
            yield f"| {' | '.join(row)} |"
    yield ""
    for place in files:
        for number, task in enumerate(at(record, f"{place}/tasks") or ()):
            accuracy = show(f"{place}/tasks/{number}/accuracy", "measured share")
            blind = " (the original guesses, too: it says nothing)" if task["blind"] else ""
            yield f"- {show(f'{place}/file')}, {task['name']}: {accuracy} right{blind}"
    yield ""


def _meaning(fate: str) -> str:
    """Say what a fate means."""
    if fate.startswith("whole"):
        return f"whole{fate.removeprefix('whole')}, as in the original"
    if fate[0].isdigit():
        return f"thin, with {fate} of their own, fitted again"
    return (
        "a constant vector, their mean output"
        if fate == "constant"
        else "gone, the router does not know them"
    )


def _selection(layers: Sequence[Any]) -> dict[str, Any]:
    """Return for each layer the original ids of each fate."""
    found: dict[str, dict[str, list[int]]] = {}
    for layer in layers:
        own = found.setdefault(str(layer["layer"]), {})
        for expert, fate in enumerate(layer["fates"]):
            own.setdefault(fate, []).append(expert)
    return {"n_expert": len(layers[0]["fates"]), "layers": found}
