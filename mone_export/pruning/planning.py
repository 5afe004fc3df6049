"""plan(): scores and the layers' counts in, the experts that stay out. Pure, exact counts, stable ties."""

from typing import Any

from mone_export.artifacts import LayerPlan, MoeSpec, Plan, Scores
from mone_export.errors import MoneError
from mone_export.lazily import Tensor
from mone_export.pruning.allocation import Counts, allocate, even_counts, possible, ranking
from mone_export.pruning.protecting import check_protected
from mone_export.recipe import Recipe


def plan(
    scores: Scores, counts: Counts | None = None, *, recipe: Recipe | None = None, **choices: Any
) -> Plan:
    """Keep the best experts of each layer, as many as `counts` says, or else as the recipe allocates.

    `choices` are those of `Recipe.of`, `ratio` among them, where no recipe is given. Equal scores go to the
    lower id. Raises `MoneError` for choices that cannot be, and a ratio that leaves too few experts, or fewer
    than are protected.
    """
    recipe = possible(recipe or Recipe.of(**{"score": scores.score, **choices}), scores.calibration)
    if recipe.novice == "thin" and recipe.ratio:
        raise MoneError("thin experts are fitted to a text: plan them with mone_export.plan_thin")
    counts = counts or allocate(scores, recipe)
    rows = zip(scores.spec.moe_layers, scores.values, strict=True)
    layers = tuple(_layer(scores.spec, layer, counts, own) for layer, own in rows)
    check_protected(scores.protected, layers)
    return Plan(scores.spec, recipe, layers, scores.protected)


def plan_without_scores(spec: MoeSpec, recipe: Recipe) -> Plan:
    """Return a plan with the same number of arbitrary experts in every layer: enough to know a size."""
    counts = even_counts(spec, recipe)
    return Plan(spec, recipe, tuple(_layer(spec, layer, counts, None) for layer in spec.moe_layers))


def _layer(spec: MoeSpec, layer: int, counts: Counts, values: Tensor | None) -> LayerPlan:
    order = ranking(spec, values, counts[layer])
    kept, pruned = sorted(order[: counts[layer]]), sorted(order[counts[layer] :])
    return LayerPlan(layer=layer, kept=tuple(kept), pruned=tuple(pruned))
