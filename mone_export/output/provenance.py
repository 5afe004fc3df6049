"""What a file says about how it was made: keys that no runtime reads."""

import hashlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from mone_export import __version__
from mone_export.artifacts import Calibration, ExpertStats, Plan
from mone_export.source import Source
from mone_export.source.gguf_format import MEASURED_KEY, METHOD_KEY

Keys = dict[str, tuple[str, Any]]  # key -> (GGUF type, value)


def provenance(plan: Plan, source: Source) -> Keys:
    """Return the keys that state a plan's recipe; of a plan that prunes nothing, that it does not.

    Of a checkpoint that came with its novices nobody may know how they were chosen.
    """
    recipe, known = plan.recipe, not source.substituted or source.substituted.recipe is not None
    keys: Keys = {
        "mone.format_version": ("UINT32", 2 if plan.n_tier else 1),
        "mone.ratio": ("FLOAT32", plan.share_pruned),
        "mone.tool_version": ("STRING", __version__),
    }
    if plan.share_pruned:
        keys[METHOD_KEY] = ("STRING", recipe.method)
    if plan.share_pruned and known:
        novices = recipe.method == "mone"  # the only one that has some, and counts by layer
        by_layer = novices and recipe.allocation != "even"
        keys |= {
            "mone.score": ("STRING", recipe.score),
            "mone.novice": ("STRING", recipe.novice if novices else "none"),
            "mone.scope": ("STRING", recipe.allocation if by_layer else "layer"),
        }
    if plan.protected:  # SHA-256 of each text's rows, and how many experts of a layer it holds
        named = (f"{text.corpus_sha256}={text.n}" for text in plan.protected)
        keys["mone.protected"] = ("STRING", ", ".join(named))
    return keys


def measured(
    calibration: Calibration,
    plan: Plan,
    constants: Mapping[int, np.ndarray],
    errors: Mapping[int, np.ndarray],
) -> str:
    """Return the SHA-256 of what was measured: statistics, and the constants made of it, layer by layer.

    So are the plan, in which all other measurements end that decide, and the `errors` that a second pass
    found. Other numbers of threads, devices and versions of PyTorch round otherwise. Of the same command and
    with the same fingerprint the choices are the same; so are the bytes, but for what an importance matrix
    or the fit of fewer channels rounds.
    """
    digest = hashlib.sha256(repr((plan.layers, plan.width)).encode())
    for _, found in sorted(errors.items()):
        digest.update(np.ascontiguousarray(found).tobytes())
    for layer, stats in sorted(calibration.layers.items()):
        for each in fields(ExpertStats):
            digest.update(np.ascontiguousarray(getattr(stats, each.name)).tobytes())
        if layer in constants:
            digest.update(np.ascontiguousarray(constants[layer]).tobytes())
    return digest.hexdigest()


def origin(source: Source, model_sha256: str, text: tuple[str, int, str] | None) -> Keys:
    """Return the keys that name the model, and the text of the calibration: its SHA-256, its tokens.

    The third of `text` is the fingerprint of what was `measured` on it.
    """
    keys: Keys = {
        "mone.source.name": ("STRING", source.name),
        "mone.source.sha256": ("STRING", model_sha256),
    }
    if source.id:
        keys["mone.source.id"] = ("STRING", source.id)
        keys["mone.source.revision"] = ("STRING", source.revision)
    if text:
        keys["mone.calibration.sha256"] = ("STRING", text[0])
        keys["mone.calibration.tokens"] = ("UINT64", text[1])
        keys[MEASURED_KEY] = ("STRING", text[2])
    return keys
