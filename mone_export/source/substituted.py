"""Checkpoints in which constants stand in for experts: the format of MoNE's authors, which vLLM reads, too.

`approximate_experts` in config.json maps the number of a layer to the ids of its experts that are gone. For
each of them the files hold `<...>.experts.<id>.approx_value` [hidden_size] and nothing else; the others keep
their ids and names, and the router is whole. The authors' own classes say so in their names (model_type
`olmoe_compressed`); nothing in their code is needed, since without the constants they are ordinary models.

Source: the models and configs of zxgx/mode-pd (ee6e187, Qwen's at 94a07da) and `expert_prune.py` there; of
vLLM `docs/design/expert_substitution.md` and `layers/fused_moe/expert_substitution.py` (19a527a).
"""

import copy
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mone_export import files
from mone_export.architectures import RENAMED
from mone_export.artifacts import LayerPlan, MoeSpec, Plan
from mone_export.errors import MoneError
from mone_export.recipe import Recipe
from mone_export.source.hub import INDEX, local_header, weight_files, write_hollow
from mone_export.source.weights import NOVICE, open_weights

EXPERTS_KEY = "approximate_experts"
TOKENS_KEY = "approximate_expert_init_tokens"  # the authors' classes want it; above 0 their constants move
MADE_KEY = "mone_export"  # in config.json of a checkpoint of ours: how it was made
_EXPERTS = r"(?!(?:.*\.)?mtp\.)((?:.*\.)?layers\.(\d+)\.(?:.*\.)?experts)\."
EXPERT = re.compile(rf"{_EXPERTS}(\d+)\.(.+)")  # a tensor of one expert
EXPERT_OR_STACK = re.compile(rf"{_EXPERTS}(?:(\d+)\.)?(.+)")  # or of all experts of a layer, without a number

# other ways of pruning in the authors' configs, which change what the model computes
_OTHER_WAYS = (
    "mod_type",
    "routed_intermediate_sizes",
    "shared_intermediate_sizes",
    "flap_intermediate_sizes",
)
_SUFFIX = "_compressed"
_HOLLOW = "model-of-zeros.safetensors"


@dataclass(frozen=True, slots=True, eq=False)
class Substituted:
    """Which experts of a checkpoint are constants: ids by layer; and the recipe, if its config states one."""

    folder: Path
    experts: Mapping[int, tuple[int, ...]]
    recipe: Recipe | None

    def plan(self, spec: MoeSpec) -> Plan:
        """Return the choice of experts as a plan; raises `MoneError` where the model has no such experts."""
        layers = []
        for layer in spec.moe_layers:
            pruned = self.experts.get(layer, ())
            kept = tuple(sorted(set(range(spec.n_expert)).difference(pruned)))
            layers.append(LayerPlan(layer, kept, pruned))
            if not kept or len(kept) + len(pruned) > spec.n_expert:
                raise self._broken(f"layer {layer} names {len(pruned)} of {spec.n_expert} experts")
        if other := sorted(self.experts.keys() - set(spec.moe_layers)):
            raise self._broken(f"layer {other[0]} has no experts")
        return Plan(spec, self.recipe or Recipe.of(0.0), tuple(layers))

    def novices(self, spec: MoeSpec) -> dict[int, np.ndarray]:
        """Return the constants, float32 [n_expert, d] by layer; rows of experts that are there are zero."""
        owner = open_weights(self.folder)
        found: dict[int, np.ndarray] = {}
        for name in (name for name in owner if name.endswith(NOVICE)):
            match = EXPERT.fullmatch(name)
            if not match:
                raise self._broken(f"{name} is no expert's constant")
            layer = int(match[2])
            rows = found.setdefault(layer, np.zeros((spec.n_expert, spec.hidden_size), np.float32))
            vector = owner[name].get_tensor(name)
            if vector.shape != (spec.hidden_size,):
                raise self._broken(f"{name} is {list(vector.shape)}, not [{spec.hidden_size}]")
            rows[int(match[3])] = vector.float().numpy()
        return found

    def complete(self, folder: Path) -> None:
        """Make an empty folder an ordinary checkpoint that is this one, with zeros for the experts gone.

        The zeros are a hole in a file; all other weights are links. Python files are left behind.
        """
        names = weight_files(self.folder)
        headers = {name: local_header(self.folder / name) for name in names}
        zeros = self._absent(headers)
        for file in self.folder.iterdir():
            own = file.name in names or (file.suffix not in (".safetensors", ".py") and file.is_file())
            if own and file.name not in ("config.json", INDEX):
                files.link(file.resolve(), folder / file.name)
        native = native_config(_read(self.folder))
        (folder / "config.json").write_text(json.dumps(native, indent=2), encoding="utf-8")
        write_hollow(folder / _HOLLOW, zeros)
        owners = {name: file for file, header in (*headers.items(), (_HOLLOW, zeros)) for name in header}
        owners.pop("__metadata__", None)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": owners}), encoding="utf-8")

    def _absent(self, headers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return the header of the experts' tensors that are gone, by the shapes of those that are not."""
        experts: dict[tuple[int, int], dict[str, Any]] = defaultdict(dict)
        prefixes: dict[int, str] = {}
        for name, entry in ((name, entry) for header in headers.values() for name, entry in header.items()):
            if match := EXPERT.fullmatch(name):
                prefixes[int(match[2])] = match[1]
                experts[int(match[2]), int(match[3])][match[4]] = entry
        gone = {(layer, expert) for layer, own in self.experts.items() for expert in own}
        constants = {key for key, parts in experts.items() if NOVICE[1:] in parts}
        if gone != constants:
            layer, expert = min(gone ^ constants)
            what = "lacks the constant of" if (layer, expert) in gone else "holds an unlisted constant of"
            raise self._broken(f"it {what} expert {expert} in layer {layer}")
        zeros: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for layer, expert in sorted(gone):
            example = next(
                (parts for key, parts in experts.items() if key[0] == layer and key not in gone), None
            )
            if example is None or len(experts[layer, expert]) > 1:
                raise self._broken(f"layer {layer} has no expert left, or weights beside a constant")
            for part, entry in example.items():
                first, last = entry["data_offsets"]
                span, end = [end, end + last - first], end + last - first
                zeros[f"{prefixes[layer]}.{expert}.{part}"] = {**entry, "data_offsets": span}
        return zeros

    def _broken(self, why: str) -> MoneError:
        return MoneError(f"{self.folder} is no complete checkpoint with {EXPERTS_KEY}: {why}; get it again")


def substituted(folder: Path) -> Substituted | None:
    """Return what constants stand in for in a folder, None in an ordinary one; reads config.json only.

    Raises `MoneError` for a list of another form, and for what else the authors' code can do to a model.
    """
    stated = _read(folder)
    holder, file = _holder(stated), folder / "config.json"
    if holder is None:
        return None
    try:
        listed = {int(layer): tuple(sorted(map(int, ids))) for layer, ids in holder[EXPERTS_KEY].items()}
        moving = any(any(tokens) for tokens in (holder.get(TOKENS_KEY) or {}).values())
    except (AttributeError, TypeError, ValueError):
        raise MoneError(
            f"{file}: {EXPERTS_KEY} does not map layers to lists of experts: get it again"
        ) from None
    if any(len(set(ids)) < len(ids) or ids[:1] < (0,) for ids in listed.values() if ids):
        raise MoneError(f"{file}: {EXPERTS_KEY} names an expert twice, or a negative one: get it again")
    if moving:
        raise MoneError(f"{file}: {TOKENS_KEY} makes constants that follow the text, which no GGUF has")
    if other := [key for key in _OTHER_WAYS if holder.get(key)]:
        raise MoneError(f"{file}: {other[0]} changes the model in another way, which is not read")
    return Substituted(folder, {layer: ids for layer, ids in listed.items() if ids}, _recipe(stated))


def has_novices(model: object) -> bool:
    """Say whether a name is that of a folder in which constants stand in for experts already."""
    return isinstance(model, str | Path) and _holder(_read(Path(model))) is not None


def native_config(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config by which transformers takes its own classes: no others' names, and no code."""
    model_type: Any = stated.get("model_type", "")
    classes: Sequence[Any] = stated.get("architectures") or ()
    native = {
        **copy.deepcopy(dict(stated)),
        "model_type": model_type.removesuffix(_SUFFIX) if isinstance(model_type, str) else model_type,
        "architectures": [RENAMED.get(name, name) for name in classes],
    }
    native.pop("auto_map", None)
    return native


def _holder(stated: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the part of a config that lists experts which are gone, None where no part does."""
    parts = (stated.get("text_config"), stated)
    return next((part for part in parts if isinstance(part, dict) and part.get(EXPERTS_KEY)), None)


def _recipe(stated: Mapping[str, Any]) -> Recipe | None:
    """Return how a checkpoint of ours was made, as far as a recipe says so; None for others."""
    made = stated.get(MADE_KEY)
    recipe = made.get("recipe") if isinstance(made, dict) else None
    if not isinstance(recipe, dict):
        return None
    score, novice, allocation = (recipe.get(name) for name in ("score", "novice", "allocation"))
    try:
        return Recipe.of(0.0, score=score, novice=novice, allocation=allocation)
    except MoneError:
        return None


def _read(folder: Path) -> dict[str, Any]:
    """Return a folder's config.json, empty where there is none that can be read: others say so."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
