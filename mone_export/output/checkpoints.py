"""A pruned model as a checkpoint: the folder that transformers and vLLM load.

With novices it has the form of MoNE's authors (`source.substituted`): tensors keep their names, constants
stand where experts were. Without (`drop`, `dern`) it is an ordinary model of fewer experts. Tensors go one at
a time from the source's files to the new ones, in their own type; novices are float32, which every reader
rounds to its own.
"""

import json
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mone_export import __version__
from mone_export.artifacts import Calibration, LayerPlan, Plan
from mone_export.errors import MoneError, first_line
from mone_export.lazily import Tensor, torch
from mone_export.output.recombining import Recombination
from mone_export.output.writing import importances, stored_novices
from mone_export.paths import listed, replacing
from mone_export.runtime import Progress
from mone_export.source import Checkpoint, Source
from mone_export.source.hub import INDEX, SINGLE, SMALL, write_hollow
from mone_export.source.shape import packing, read_config
from mone_export.source.substituted import EXPERT, EXPERTS_KEY, MADE_KEY, TOKENS_KEY, native_config
from mone_export.source.weights import NOVICE, prediction_tensors

LARGEST_FILE = 5 * 10**9  # bytes of weights

_ITEM = {"F64": 8, "F32": 4, "I64": 8, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}  # bytes; all others have 1
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # keys of configs
_PREDICTIONS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
# an expert's matrices, as families name them
_MATRICES = {
    **{"gate_proj.weight": "gate", "up_proj.weight": "up", "down_proj.weight": "down"},
    **{"w1.weight": "gate", "w3.weight": "up", "w2.weight": "down"},
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to write: name, safetensors' type, shape, and what makes it when its turn has come."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Its bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * _ITEM.get(self.dtype, 1)


def write_checkpoint(
    source: Source,
    calibration: Calibration | None,
    plan: Plan,
    folder: str | Path,
    *,
    novices: Mapping[int, Tensor] | None = None,
    progress: Progress | None = None,
) -> int:
    """Write the pruned model as a folder and return the bytes of its weights; arguments are `write`'s.

    The folder appears under its name when it is complete, in place of one that is there. Raises `MoneError`
    for what a checkpoint cannot express, and where it cannot be written.
    """
    folder = Path(folder)
    source.fetch(progress=progress)
    origin = check_expressible(source, plan)
    stored = stored_novices(calibration, plan, source, novices)
    entries = list(_entries(origin, plan, stored, importances(calibration)))
    config, made = _config(origin, plan), _made(origin, calibration, plan, progress)
    with replacing(folder) as part:
        try:
            part.mkdir()
            _copy_small(origin, part, plan)
            size = _write_weights(part, entries, progress)
            text = _with_files(config, made, listed(part))
            (part / "config.json").write_text(text, encoding="utf-8", newline="\n")
            if plan.recipe.method != "mone":
                _check_loadable(part)
        except OSError as error:
            raise MoneError(
                f"cannot write {folder} ({error.strerror or first_line(error)}): free some space or choose "
                "another --hf-out"
            ) from None
    return size


def checkpoint_size(source: Source, plan: Plan) -> int:
    """Return the bytes of weights that a plan's checkpoint will have; reads headers only."""
    origin = check_expressible(source, plan)
    blank = np.zeros((plan.spec.n_expert, plan.spec.hidden_size), np.float32)
    return sum(entry.size for entry in _entries(origin, plan, dict.fromkeys(plan.n_kept, blank), {}))


def check_expressible(source: Source, plan: Plan) -> Checkpoint:
    """Return the source as a checkpoint; raises `MoneError` for what no checkpoint of the plan can be."""
    spec, method = plan.spec, plan.recipe.method
    if not isinstance(source, Checkpoint):
        raise MoneError(
            f"--hf-out makes a checkpoint of a checkpoint, {source.name} is a GGUF: pass the folder or id"
        )
    if source.substituted:
        raise MoneError(
            f"{source.name} is a pruned checkpoint already: pass -o FILE for its GGUF, without --hf-out"
        )
    if plan.n_tier or plan.mixes_types or plan.recipe.novice == "thin" or method == "narrow":
        remedy = "--method drop" if method == "narrow" else "--novice least-squares"
        raise MoneError(
            "--hf-out has no place for thin experts, nor for experts of types of their own: pass "
            f"{remedy}, or -o FILE without it"
        )
    if found := packing(source.config):
        raise MoneError(
            f"{source.name} is quantised by {found.get('quant_method')}, --hf-out takes BF16, F16 and F32: "
            "pass the model's BF16 checkpoint"
        )
    counts = set(plan.n_kept.values())
    if method != "mone" and len(counts) > 1:
        raise MoneError(
            f"--method {method} as a checkpoint keeps the same number of experts in every layer, this plan "
            f"{min(counts)} to {max(counts)}: pass --allocate even"
        )
    if method != "mone" and min(counts) < spec.top_k:
        raise MoneError(
            f"a token uses {spec.top_k} experts, --method {method} would leave {min(counts)}: pass a smaller "
            "--ratio, or leave out --min-kept"
        )
    return source


def _entries(
    source: Checkpoint, plan: Plan, stored: Mapping[int, np.ndarray], importance: Mapping[int, Tensor]
) -> Iterator[Entry]:
    """Yield the tensors of the new checkpoint: all that is of no expert, then the experts layer by layer."""
    spec, method = plan.spec, plan.recipe.method
    owner = source.tensors()
    ahead = set(prediction_tensors(owner, spec.n_layer))
    pruned = {layer.layer: layer for layer in plan.layers if layer.pruned}
    stacks: dict[int, _Stack] = {}
    others = []
    for name in sorted(owner):
        match = None if name in ahead else EXPERT.fullmatch(name)
        if match and int(match[2]) in pruned:
            stack = stacks.setdefault(int(match[2]), _Stack(owner, match[1], defaultdict(dict)))
            stack.names[match[4]][int(match[3])] = name
        elif name not in ahead or plan.recipe.mtp == "keep":
            others.append(name)
    _check_apart(source, plan, pruned, stacks)
    axes = _axes(source, plan, others) if method != "mone" and pruned else {}
    for name in others:
        yield _cut(owner, name, axes.get(name), pruned)
    for number, stack in stacks.items() if method != "dern" else ():
        if method == "mone":
            yield from stack.with_novices(pruned[number], stored[number])
        else:
            yield from stack.renumbered(pruned[number])
    if method == "dern" and stacks:
        recombination = Recombination(plan, importance)
        made = [list(stack.recombined(pruned[number], recombination)) for number, stack in stacks.items()]
        recombination.check()
        yield from (entry for layer in made for entry in layer)


@dataclass(frozen=True, slots=True)
class _Stack:
    """The experts of a layer in a checkpoint that names each: tensors' names by part and number."""

    owner: Mapping[str, Any]
    prefix: str
    names: dict[str, dict[int, str]]

    def with_novices(self, layer: LayerPlan, novices: np.ndarray) -> Iterator[Entry]:
        """Yield the kept experts as they are, and a constant for each of the others."""
        for names in self.names.values():
            yield from (_copy(self.owner, names[expert]) for expert in layer.kept)
        for expert in layer.pruned:
            vector = novices[expert]
            make = partial(torch.from_numpy, vector)
            yield Entry(f"{self.prefix}.{expert}{NOVICE}", "F32", vector.shape, make)

    def renumbered(self, layer: LayerPlan) -> Iterator[Entry]:
        """Yield the kept experts, numbered from 0."""
        for part, names in self.names.items():
            for slot, expert in enumerate(layer.kept):
                yield _copy(self.owner, names[expert], f"{self.prefix}.{slot}.{part}")

    def recombined(self, layer: LayerPlan, recombination: Recombination) -> Iterator[Entry]:
        """Yield what the kept experts become when they take up parts of the others."""
        for part, names in self.names.items():
            if part not in _MATRICES:
                raise MoneError(f"--method dern cannot merge experts with {part}: use --method drop")
            made = recombination.rewrite(layer.layer, _MATRICES[part], partial(self._read, part))
            for slot, make in enumerate(made):
                like = _copy(self.owner, names[slot], f"{self.prefix}.{slot}.{part}")
                yield replace(like, make=partial(_rounded, make, like.dtype))

    def _read(self, part: str, expert: int) -> Tensor:
        name = self.names[part][expert]
        tensor: Tensor = self.owner[name].get_tensor(name)
        return tensor


def _check_apart(source: Checkpoint, plan: Plan, pruned: Iterable[int], stacks: Mapping[int, _Stack]) -> None:
    """Refuse experts that are not named one by one, unless whole rows of a stack are taken out."""
    every, method = set(range(plan.spec.n_expert)), plan.recipe.method
    for layer in pruned:
        found = stacks[layer].names.values() if layer in stacks else ()
        if any(names.keys() != every for names in found) or (not found and method != "drop"):
            form = "the form with novices" if method == "mone" else f"--method {method} as a checkpoint"
            raise MoneError(
                f"{source.name} stacks the experts of a layer in one tensor, {form} needs them apart: pass "
                "-o FILE without --hf-out, or --method drop"
            )


def _axes(source: Checkpoint, plan: Plan, names: Sequence[str]) -> dict[str, int]:
    """Return along which axis tensors have an entry for each expert, such as a router's rows."""
    from mone_export.source.expected import expert_axes  # builds models without weights

    with tempfile.TemporaryDirectory(prefix="mone-export-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_config(source, plan)), encoding="utf-8")
        fewer = read_config(Path(folder))
    return expert_axes(source.config, fewer, names)


def _cut(owner: Mapping[str, Any], name: str, axis: int | None, pruned: Mapping[int, LayerPlan]) -> Entry:
    """Return a tensor as it is, or with the kept experts' entries along an axis."""
    whole = _copy(owner, name)
    number = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    if axis is None or not number:
        return whole
    kept = pruned[int(number[1])].kept
    shape = (*whole.shape[:axis], len(kept), *whole.shape[axis + 1 :])
    return replace(whole, shape=shape, make=partial(_selected, whole.make, axis, kept))


def _copy(owner: Mapping[str, Any], name: str, new_name: str = "") -> Entry:
    part = owner[name].get_slice(name)
    make = partial(owner[name].get_tensor, name)
    return Entry(new_name or name, part.get_dtype(), tuple(part.get_shape()), make)


def _selected(make: Callable[[], Tensor], axis: int, kept: Sequence[int]) -> Tensor:
    return make().index_select(axis, torch.tensor(kept))


def _rounded(make: Callable[[], Tensor], dtype: str) -> Tensor:
    return make().to(getattr(torch, _FLOATS[dtype]))


def _config(source: Checkpoint, plan: Plan) -> dict[str, Any]:
    """Return the new config.json: the source's own, with which experts are gone, or how many are left."""
    config = native_config(source.stated)
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    if plan.recipe.mtp == "drop":
        for part in parts:
            part.update(dict.fromkeys(part.keys() & set(_PREDICTIONS), 0))
    if plan.recipe.method == "mone":
        gone = {str(layer.layer): list(layer.pruned) for layer in plan.layers}
        return config | {
            EXPERTS_KEY: gone,
            TOKENS_KEY: {layer: [0] * len(ids) for layer, ids in gone.items()},
        }
    n_kept = len(plan.layers[0].kept)
    found = [(part, key) for part in parts for key in _COUNTS if part.get(key) == plan.spec.n_expert]
    if not found:
        raise MoneError(
            f"{source.name}: config.json states its {plan.spec.n_expert} experts under none of "
            f"{', '.join(_COUNTS)}: pass -o FILE without --hf-out"
        )
    for part, key in found:
        part[key] = n_kept
    return config


def _made(
    source: Checkpoint, calibration: Calibration | None, plan: Plan, progress: Progress | None
) -> dict[str, Any]:
    """Return what config.json says about how the checkpoint was made."""
    text = calibration if plan.recipe.needs_statistics else None
    model = {"name": source.name, "id": source.id, "revision": source.revision}
    return {
        "version": __version__,
        "recipe": asdict(plan.recipe),
        "pruned": plan.share_pruned,
        "source": {**model, "sha256": source.fingerprint(progress=progress)},
        "calibration": text and {"sha256": text.corpus_sha256, "tokens": text.n_token},
    }


def _with_files(config: Mapping[str, Any], made: Mapping[str, Any], files: Mapping[str, int | None]) -> str:
    """Return config.json's text (ASCII): how the checkpoint was made, and all files' bytes, its own too."""
    size, text = -1, ""
    while size != len(text):  # a longer number makes it longer
        size = len(text)
        stated = {**made, "files": {**files, "config.json": size}}
        text = json.dumps({**config, MADE_KEY: stated}, indent=2) + "\n"
    return text


def _check_loadable(folder: Path) -> None:
    """Insist that transformers finds in the files what the config says."""
    from mone_export.source.expected import check_tensors  # builds a model without weights

    check_tensors(folder, read_config(folder))


def _copy_small(source: Checkpoint, folder: Path, plan: Plan) -> None:
    """Copy tokenizer, generation config and licence; of the model card what its front matter says."""
    for file in sorted(source.folder.iterdir()):
        wanted = any(file.match(pattern) for pattern in (*SMALL, *["*.py"] * source.trust_remote_code))
        wanted = wanted and file.is_file()  # LICENSES may be a folder
        if wanted and file.name not in ("config.json", "README.md") and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
    with suppress(OSError, UnicodeDecodeError):  # none, or none that can be read
        before, _, rest = (source.folder / "README.md").read_text(encoding="utf-8").partition("---\n")
        matter, end, _ = rest.partition("\n---")
        if end and not before:
            text = (
                f"{source.id or source.name} with {plan.share_pruned:.0%} of its experts pruned by "
                f"mone_export, method {plan.recipe.method}.\n"
            )
            (folder / "README.md").write_text(f"---\n{matter}\n---\n\n{text}", encoding="utf-8")


def _write_weights(folder: Path, entries: Sequence[Entry], progress: Progress | None) -> int:
    """Write tensors to one file, or several of limited size and an index; returns their bytes."""
    files: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if files[-1] and size + entry.size > LARGEST_FILE:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += entry.size
    total, done = sum(entry.size for entry in entries), 0
    owners: dict[str, str] = {}
    for number, own in enumerate(files, start=1):
        name = SINGLE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        owners |= {entry.name: name for entry in own}
        for n_byte in _write_file(folder / name, own):
            done += n_byte
            if progress:
                progress(done // 2**20, total // 2**20, "writing the checkpoint (MiB)")
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": owners}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _write_file(file: Path, entries: Sequence[Entry]) -> Iterator[int]:
    """Write a safetensors file, one tensor at a time; yields the bytes of each."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        span, end = [end, end + entry.size], end + entry.size
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": span}
    write_hollow(file, header)
    with file.open("r+b") as stream:
        stream.seek(-end, os.SEEK_END)
        for entry in entries:
            tensor = entry.make()
            assert tuple(tensor.shape) == entry.shape
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            yield entry.size
