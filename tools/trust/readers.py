"""The readers that fuzz.py feeds: how a sound file of each is made, and what reads it."""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

Read = Callable[[Path], object]


def statistics_file(folder: Path) -> tuple[Path, Read]:
    """Make statistics of two small layers."""
    from mone_export.artifacts import Calibration, ExpertStats, MoeSpec, Part
    from mone_export.inspection.inspecting import examine

    spec = MoeSpec("llama", 2, (0, 1), 4, 2, 1, 8, 16)
    layers = {layer: ExpertStats.empty(4, 8) for layer in (0, 1)}
    part = Part("0" * 64, {"text": 128})
    found = Calibration(
        spec, "0" * 64, "0" * 64, "text", 128, layers, (part,), {"a": {"b": 1}}, {"dtype": "x"}
    )
    found.save(path := folder / "stats")

    def read(file: Path) -> object:
        loaded = Calibration.load(file)
        examine(str(file))
        return [stats.count.sum() for stats in loaded.layers.values()]

    return path, read


def gguf_file(folder: Path) -> tuple[Path, Read]:
    """Make a pruned GGUF of the demo model."""
    from mone_export.errors import MoneError
    from mone_export.inspection.of_gguf import of_gguf
    from mone_export.output.redoing import redo_of
    from mone_export.pipeline import export
    from mone_export.source import GgufFile

    path = folder / "model.gguf"
    export("demo", ratio=0.5, outfile=path, method="drop", score="random")

    def read(file: Path) -> object:
        source = GgufFile(file)
        refusal = None
        for look in (lambda: source.spec, lambda: source.computing_config, lambda: source.before):
            try:
                look()
            except MoneError as error:
                refusal = error
        for look in (lambda: of_gguf(file), lambda: redo_of(source.header)):
            try:
                look()
            except MoneError as error:
                refusal = error
        if refusal:
            raise refusal
        return source

    return path, read


def corpus_file(folder: Path) -> tuple[Path, Read]:
    """Make records: texts and chats."""
    from mone_export.calibration.corpus import read_corpus
    from mone_export.source import open_source

    reader = open_source("demo").tokenizer()
    chat = [{"role": "user", "content": "Hello <s> there"}, {"role": "assistant", "content": "And you"}]
    records: list[Mapping[str, Any]] = [
        {"messages": chat, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        {"text": "once upon a time " * 20},
        {"prompt": "a", "completion": "b"},
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
    ]
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records * 2))
    return path, lambda file: read_corpus([file], reader, n_row=1, seq_len=16)


def plan_file(folder: Path) -> tuple[Path, Read]:
    """Make a plan with tiers for the demo model."""
    from mone_export.inspection.inspecting import examine
    from mone_export.pruning.plan_files import load_plan, load_recipe
    from mone_export.source import open_source

    spec = open_source("demo").spec
    layer = {"kept": [0], "pruned": [*range(2, spec.n_expert)], "kind": "", "scores": [1.0] * spec.n_expert}
    layer["tiers"] = [{"width": 8, "experts": [1], "kind": ""}]
    held = {"name": "rare", "n": 1, "corpus_sha256": "0" * 64, "n_token": 9, "n_saved": None}
    value = {
        "mone_plan": 2,
        "source": {"name": "demo", "sha256": "0" * 64},
        "calibration": {"sha256": "0" * 64, "tokens": 9},
        "recipe": {"ratio": 0.5, "novice": "thin", "allocation": "budget"},
        "n_expert": spec.n_expert,
        "protected": [held | {"experts": {str(number): [0] for number in spec.moe_layers}}],
        "layers": {str(number): layer for number in spec.moe_layers},
    }
    path = folder / "plan.json"
    path.write_text(json.dumps(value))

    def read(file: Path) -> object:
        found = load_plan(file, spec, load_recipe(file))
        examine(str(file))
        return found

    return path, read


def record_file(folder: Path) -> tuple[Path, Read]:
    """Make the record of a pruned file, which a page is drawn from."""
    from mone_export.pipeline import export
    from mone_export.publishing.record import load_record

    page = folder / "page.html"
    export("demo", ratio=0.5, outfile=folder / "x.gguf", novice="mean", n_row=4, seq_len=64, report=page)
    return page.with_suffix(".json"), lambda file: load_record(file)


def in_a_folder(name: str, folder: Path) -> tuple[Path, Read]:
    """Make a small checkpoint in two files, of which one is to be broken, and what reads all of it."""
    from mone_export.source import open_source
    from mone_export.source.gguf_types import gguf_library
    from mone_export.source.naming import card_folder
    from mone_export.source.tokenizing import as_reader

    model = folder / "model"
    split_model(model)
    sound = folder / f"sound{Path(name).suffix}"
    shutil.copyfile(model / name, sound)

    def read(file: Path) -> object:
        shutil.copyfile(file, model / name)
        source = open_source(model)

        def card() -> None:
            with card_folder(model, "a/b", gguf_library().Metadata):
                pass

        def tokenizer() -> object:
            return as_reader(source.tokenizer()).ids("Hello <s> there\n")

        looks: Mapping[str, Callable[[], object]] = {
            "README.md": card,
            "tokenizer.json": tokenizer,
            "tokenizer_config.json": tokenizer,
        }
        whole = [lambda: source.spec, source.check, source.fingerprint]  # in the order of an export
        for look in [looks[name]] if name in looks else whole:
            look()
        return source

    return sound, read


def split_model(folder: Path) -> None:
    """Write a tiny model whose tensors lie in two files, with the demo model's tokenizer and a card."""
    from safetensors.torch import load_file, save_file
    from tiny import save_small

    from mone_export.source import open_source

    save_small(folder, num_hidden_layers=1)
    (folder / "tokenizer.model").unlink()
    for file in open_source("demo").folder.glob("tokenizer*"):
        shutil.copy(file, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    places = {name: names[number % 2] for number, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({name: tensors[name] for name in places if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    matter = "license: mit\ntags: [a, b]\nbase_model:\n- x/y\ndatasets: z\nlanguage:\n  - en"
    (folder / "README.md").write_text(f"---\n{matter}\n---\n\n# A model\n")


MAKERS: Mapping[str, Callable[[Path], tuple[Path, Read]]] = {
    "statistics": statistics_file,
    "gguf": gguf_file,
    "corpus": corpus_file,
    "plan": plan_file,
    "record": record_file,
    "config": partial(in_a_folder, "config.json"),
    "weights": partial(in_a_folder, "model-00001-of-00002.safetensors"),
    "index": partial(in_a_folder, "model.safetensors.index.json"),
    "tokenizer": partial(in_a_folder, "tokenizer.json"),
    "tokenizer config": partial(in_a_folder, "tokenizer_config.json"),
    "card": partial(in_a_folder, "README.md"),
}
