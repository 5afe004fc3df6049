"""A plan as a file: what was chosen on one copy of a model is applied to another one of the same shape.

JSON: `mone_plan` (version), `source` (name, SHA-256), `calibration` (text's SHA-256, tokens; null without),
`recipe`, `n_expert`, and for each layer by number `kept`, `pruned` (original ids, ascending) and `scores`
(one per expert, larger = keep; null is minus infinity, "guarded" infinity: super experts, and protected ones,
which `protected` lists by text as `Protected` has them). Version 2 has tiers: each layer has the `kind` of
its kept experts' matrices (a type such as `q4_k`; "": the file's) and `tiers`, each of a `width` (channels),
a `kind` and `experts`; `width`, where there is one, is that of all experts that are kept.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mone_export import files
from mone_export.artifacts import LayerPlan, MoeSpec, Plan, Protected, Scores, Tier
from mone_export.errors import MoneError, first_line
from mone_export.pruning.protecting import check_protected
from mone_export.recipe import Recipe
from mone_export.source.gguf_format import MOST_TIERS

_VERSION, _WITH_TIERS = 1, 2


def save_plan(path: str | Path, plan: Plan, scores: Scores, source: Mapping[str, str]) -> None:
    """Write a plan; `source` names the model: `name` and `sha256`. Raises `MoneError` where it cannot."""
    path, text = Path(path), scores.calibration
    new = plan.n_tier > 0 or plan.mixes_types or plan.width > 0
    rows = dict(zip(scores.spec.moe_layers, scores.values.tolist(), strict=True))
    value = {
        "mone_plan": _WITH_TIERS if new else _VERSION,
        "source": dict(source),
        "calibration": text and {"sha256": text.corpus_sha256, "tokens": text.n_token},
        "recipe": asdict(plan.recipe),
        "n_expert": plan.spec.n_expert,
        **({"width": plan.width} if plan.width else {}),
        **({"protected": [asdict(text) for text in plan.protected]} if plan.protected else {}),
        "layers": {
            str(layer.layer): {
                "kept": layer.kept,
                "pruned": layer.pruned,
                **({"kind": layer.kind, "tiers": [asdict(tier) for tier in layer.tiers]} if new else {}),
                "scores": [_stated(score) for score in rows[layer.layer]],
            }
            for layer in plan.layers
        },
    }
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        files.replace(part, path)
    except OSError as error:
        raise MoneError(f"cannot write {path} ({error.strerror}): choose another --plan-out") from None


def load_recipe(path: str | Path) -> Recipe:
    """Return the recipe that a plan file was made by; raises `MoneError` for what is no such file."""
    try:
        found = Recipe(**read_plan(Path(path))["recipe"])
        for each in fields(Recipe):
            usual, own = getattr(Recipe(ratio=0.0), each.name), getattr(found, each.name)
            kinds = {float: (float, int), type(None): (int, type(None))}.get(type(usual), type(usual))
            if not isinstance(own, kinds):
                raise TypeError(f"its {each.name} is {str(own)[:40]}")
        return found
    except (KeyError, TypeError) as error:
        raise _not_ours(Path(path), error) from None


def load_plan(path: str | Path, spec: MoeSpec, recipe: Recipe) -> Plan:
    """Return the plan in a file for a model of shape `spec`, with `recipe` for the rest.

    Raises `MoneError` for what is no plan, or one of a model with other layers or experts.
    """
    path = Path(path)
    found = read_plan(path)
    try:
        layers = tuple(
            LayerPlan(
                int(number),
                _ids(layer["kept"]),
                _ids(layer["pruned"]),
                tuple(
                    Tier(int(tier["width"]), _ids(tier["experts"]), _text(tier["kind"]))
                    for tier in layer.get("tiers", ())
                ),
                _text(layer.get("kind", "")),
            )
            for number, layer in found["layers"].items()
        )
        n_expert, width = int(found["n_expert"]), int(found.get("width", 0))
        protected = tuple(
            Protected(**text | {"experts": {int(layer): _ids(ids) for layer, ids in text["experts"].items()}})
            for text in found.get("protected", ())
        )
        for text in protected:
            if text.experts.keys() != {layer.layer for layer in layers}:
                raise ValueError("what it protects is not of its layers")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _not_ours(path, error) from None
    if n_expert != spec.n_expert or tuple(layer.layer for layer in layers) != spec.moe_layers:
        raise MoneError(
            f"{path} is a plan for {n_expert} experts in {len(layers)} layers, the model has {spec.n_expert} "
            f"in {len(spec.moe_layers)}: it is of another model, or its layers are numbered otherwise"
        )
    for layer in layers:
        groups = (layer.kept, layer.pruned, *(tier.experts for tier in layer.tiers))
        ascending = all(list(ids) == sorted(ids) for ids in groups)
        if not ascending or sorted(layer.order) != list(range(n_expert)) or not layer.kept:
            raise MoneError(f"{path}: layer {layer.layer} does not name each of its experts once, in order")
        fates = {(layer.kind, spec.expert_size), *((tier.kind, tier.width) for tier in layer.tiers)}
        distinct = len(fates) == 1 + len(layer.tiers) <= 1 + MOST_TIERS
        if not distinct or not all(0 < width <= spec.expert_size for _, width in fates):
            raise MoneError(f"{path}: layer {layer.layer} has tiers that a layer cannot have")
    if not 0 <= width < spec.expert_size or (width and recipe.method != "narrow"):
        raise MoneError(f"{path} has experts of {width} channels, this model or method cannot: leave it out")
    thin = width or any(tier.width < spec.expert_size for layer in layers for tier in layer.tiers)
    if thin and recipe.novice != "thin":
        raise MoneError(f"{path} has thin experts, --novice {recipe.novice} has none: leave it out")
    if recipe.method != "mone" and len({len(layer.kept) for layer in layers}) > 1:
        raise MoneError(
            f"{path} keeps different numbers of experts, --method {recipe.method} cannot: make the plan with "
            "--allocate even, or use --method mone"
        )
    check_protected(protected, layers)
    return Plan(spec, recipe, layers, protected, width)


def read_plan(path: Path) -> dict[str, Any]:
    """Return what a plan file holds, as JSON has it; raises `MoneError` for what is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["mone_plan"] not in (_VERSION, _WITH_TIERS):
            raise ValueError(f"version {found['mone_plan']}, this mone-export reads up to {_WITH_TIERS}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _not_ours(path, error) from None
    return dict(found)


def _ids(found: Any) -> tuple[int, ...]:
    """Return experts' numbers; raises `TypeError` for what is none."""
    if not isinstance(found, list) or not all(type(each) is int for each in found):
        raise TypeError("experts are named by numbers, in lists")
    return tuple(found)


def _text(found: Any) -> str:
    if not isinstance(found, str):
        raise TypeError(f"a type is called {str(found)[:40]}")
    return found


def _stated(score: float) -> float | str | None:
    if math.isfinite(score):
        return score
    return "guarded" if score > 0 else None


def _not_ours(path: Path, error: Exception) -> MoneError:
    if isinstance(error, OSError):
        return MoneError(f"cannot read the plan {path}: {error.strerror}; pass what --plan-out wrote")
    return MoneError(f"{path} is no plan of mone-export ({first_line(error)}): pass what --plan-out wrote")
