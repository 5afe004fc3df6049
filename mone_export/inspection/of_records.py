"""The anatomy of what mone-export keeps beside a model: statistics and plans."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mone_export.artifacts import read_layers_head
from mone_export.errors import MoneError, first_line
from mone_export.inspection.anatomy import Anatomy, LayerAnatomy
from mone_export.pruning.plan_files import read_plan

_STATISTICS, _HEAD = b"mone_calibration", 2**22


def of_statistics(path: Path) -> Anatomy:
    """Return the anatomy of a statistics file: its model's shape, and how many experts each layer saw."""
    import numpy as np
    from safetensors import SafetensorError, safe_open

    head = read_layers_head(path)
    try:
        spec = head["spec"]
        with safe_open(path, framework="np", backend="pread") as file:
            seen = {
                layer: int(np.count_nonzero(file.get_tensor(f"layers.{layer}.count")))
                for layer in spec["moe_layers"]
            }
        texts = {
            f"text {number}": ", ".join(f"{name} {n} tokens" for name, n in part["sources"].items())
            for number, part in enumerate(head["parts"], start=1)
        }
        made = {"model_sha256": head["model_sha256"], "n_token": head["n_token"]} | texts
        made |= {"corpus_sha256": head["corpus_sha256"]} | head.get("made_with", {})
        shape = _shape(path, "statistics", spec)
        n_expert = int(spec["n_expert"])
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise MoneError(f"{path} is broken: {first_line(error)}; make the statistics again") from None
    return Anatomy(
        **shape,
        layers=tuple(LayerAnatomy(layer, {"whole": n_expert}, seen=n) for layer, n in seen.items()),
        made=made,
    )


def of_plan(path: Path) -> Anatomy:
    """Return the anatomy of a plan: the fates of each layer's experts."""
    found = read_plan(path)
    layers = []
    try:
        n_expert = int(found["n_expert"])
        for number, layer in found["layers"].items():
            width = f"{found['width']} channels" if found.get("width") else "whole"
            fates = {f"{width} {layer.get('kind', '')}".rstrip(): len(layer["kept"])}
            for tier in layer.get("tiers", ()):
                fate = f"{int(tier['width'])} channels {tier['kind']}".rstrip()
                fates[fate] = fates.get(fate, 0) + len(tier["experts"])
            fates |= {"constant": len(layer["pruned"])} if layer["pruned"] else {}
            layers.append(LayerAnatomy(int(number), fates))
        made = {**found["recipe"], **{f"source_{key}": value for key, value in found["source"].items()}}
        made |= {f"calibration_{key}": value for key, value in (found["calibration"] or {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MoneError(f"{path} is no plan of mone-export ({first_line(error)})") from None
    shape = {"n_expert": n_expert, "n_layer": len(layers)}
    return Anatomy(**_shape(path, "plan", shape), layers=tuple(layers), made=made)


def is_statistics(path: Path) -> bool:
    """Say whether a file with the form of safetensors may be statistics of ours."""
    with path.open("rb") as file:
        return _STATISTICS in file.read(_HEAD)


def is_plan(path: Path) -> bool:
    """Say whether a file may be a plan: JSON that says so."""
    try:
        return "mone_plan" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _shape(path: Path, kind: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    shape = {"arch": spec.get("arch", "")}
    names = ("n_layer", "n_expert", "top_k", "hidden_size", "expert_size")
    return {"kind": kind, "name": path.name, "size": path.stat().st_size, **shape} | {
        name: int(spec.get(name, 0)) for name in names
    }
