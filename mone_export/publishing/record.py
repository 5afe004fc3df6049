"""The record of a pruned file, `report.json`: every number that its page and its card show, said once.

Two commands write it: `mone-export` the parts `export` (what was decided, and why) and `file` (what came
out), `mone-eval` the part `evaluation` (how it fares), which an export of another file takes out again.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mone_export import __version__
from mone_export.artifacts import Calibration, LayerPlan, Plan, Report, Scores
from mone_export.errors import MoneError, first_line
from mone_export.inspection.anatomy import Anatomy
from mone_export.paths import replacing
from mone_export.pruning.guard import super_experts
from mone_export.request import Job

_VERSION = 1
_ALIKE = 0.75  # other files are alternatives from this share of the size on

Record = dict[str, Any]


def export_part(
    job: Job, report: Report, chosen: Plan, scores: Scores, calibration: Calibration | None, whole: Anatomy
) -> Record:
    """Return what an export decided: recipe, fates, scores and use of every expert, text, remarks.

    `whole` is the anatomy of the model that was pruned. Nothing in it changes from run to run: no time, no
    folder except in the command.
    """
    found = super_experts(calibration) if calibration else {}
    decided = chosen.share_pruned > 0 and (calibration is not None or chosen.recipe.score == "aimer")
    values = scores.values.tolist() if decided and job.plan is None else [[]] * len(scores.spec.moe_layers)
    rows = dict(zip(scores.spec.moe_layers, values, strict=True))
    size = report.size
    return {
        "model": {
            "name": job.source.name,
            "id": job.source.id,
            "revision": job.source.revision,
            "sha256": job.source.fingerprint(),
            "size": whole.size,
        },
        "spec": asdict(chosen.spec),
        "recipe": asdict(report.recipe),
        "share_pruned": chosen.share_pruned,
        "outtype": job.outtype,
        "size": size,
        "size_unpruned": report.size_unpruned,
        "n_layer": len(chosen.layers),
        "layers": [
            _layer(layer, rows[layer.layer], calibration, found.get(layer.layer, ()), chosen)
            for layer in chosen.layers
        ],
        "spread": {str(layer): value for layer, value in report.spread.items()},
        "stability": None
        if report.stability is None
        else {
            "n_token": report.stability.n_token,
            "mean": report.stability.mean,
            "least": report.stability.lowest,
        },
        "text": [asdict(part) for part in report.parts],
        "alternatives": [
            asdict(other)
            for other in whole.savings
            if not other.ratio and _ALIKE * size <= other.size <= size
        ],
        "remarks": list(report.remarks),
        "command": job.request.command,
        "made_with": {"mone-export": __version__} | dict(calibration.made_with if calibration else {}),
    }


def _layer(
    layer: LayerPlan,
    scores: list[float],
    calibration: Calibration | None,
    extreme: tuple[int, ...],
    chosen: Plan,
) -> Record:
    """Return a layer's experts by original id: fate, score, share of the routed slots."""
    fates = _fate_of_each(layer, chosen)
    stats = calibration.layers[layer.layer] if calibration else None
    counts = stats.count.tolist() if stats else None
    total = sum(counts) if counts else 0
    use = [count / total for count in counts] if counts and total else None
    by_fate: dict[str, float] = {}
    for fate, share in zip(fates, use or (), strict=False):
        by_fate[fate] = by_fate.get(fate, 0.0) + share
    return {
        "layer": layer.layer,
        "fates": fates,
        "n_by_fate": dict(Counter(fates)),
        "scores": [_finite(score) for score in scores],  # empty where they did not decide
        "use": use,
        "use_by_fate": by_fate,
        "sensitivity": calibration.sensitivity.get(layer.layer) if calibration else None,
        "super_experts": list(extreme),
    }


def _fate_of_each(layer: LayerPlan, chosen: Plan) -> list[str]:
    """Return the fate of each expert by original id, named as in `Plan.fates`."""
    size = chosen.spec.expert_size
    whole = f"{chosen.width} channels" if chosen.width else f"whole {layer.kind}".rstrip()
    fates = dict.fromkeys(layer.kept, whole)
    for tier in layer.tiers:
        name = "whole" if tier.width == size else f"{tier.width} channels"
        fates |= dict.fromkeys(tier.experts, f"{name} {tier.kind}".rstrip())
    fates |= dict.fromkeys(layer.pruned, "constant" if chosen.recipe.method == "mone" else "gone")
    return [fates[expert] for expert in sorted(fates)]


def load_record(path: Path) -> Record:
    """Return what a record's file holds, an empty record where there is none.

    Raises `MoneError` for another kind of file.
    """
    if not path.exists():
        return {"mone_report": _VERSION}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["mone_report"] != _VERSION:
            raise ValueError(f"version {found['mone_report']}, this mone-export writes {_VERSION}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise MoneError(
            f"{path} is no record of mone-export ({first_line(error)}): choose another place"
        ) from None
    return dict(found)


def save_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record; raises `MoneError` where that is not possible."""
    write_text(path, json.dumps(_told(record), indent=1, allow_nan=False) + "\n")


def _told(value: Any) -> Any:
    """Return a value as JSON can have it: other people's files state numbers that are none."""
    if isinstance(value, dict):
        return {str(key): _told(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_told(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears complete; raises `MoneError` where that is not possible."""
    try:
        with replacing(path) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MoneError(f"cannot write {path} ({error.strerror}): choose another place") from None


def _finite(score: float) -> float | str | None:
    """Return a score as JSON can have it: experts that are never pruned are `guarded`."""
    if math.isfinite(score):
        return score
    return "guarded" if score > 0 else None
