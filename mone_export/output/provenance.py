"""What a file says about how it was made: keys that no runtime reads."""

from typing import Any

from mone_export import __version__
from mone_export.artifacts import Plan
from mone_export.source import Source

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
        keys["mone.method"] = ("STRING", recipe.method)
    if plan.share_pruned and known:
        keys |= {
            "mone.score": ("STRING", recipe.score),
            "mone.novice": ("STRING", recipe.novice),
            "mone.scope": ("STRING", "layer" if recipe.allocation == "even" else recipe.allocation),
        }
    if plan.protected:  # SHA-256 of each text's rows, and how many experts of a layer it holds
        named = (f"{text.corpus_sha256}={text.n}" for text in plan.protected)
        keys["mone.protected"] = ("STRING", ", ".join(named))
    return keys


def origin(source: Source, model_sha256: str, text: tuple[str, int] | None) -> Keys:
    """Return the keys that name the model, and the text of the calibration: its SHA-256, its tokens."""
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
    return keys
