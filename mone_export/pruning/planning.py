"""plan(): scores and the layers' counts in, the experts that stay out. Pure, exact counts, stable ties."""

from dataclasses import replace
from typing import Any

import torch

from mone_export.artifacts import LayerPlan, MoeSpec, Plan, Scores
from mone_export.pruning.allocation import Counts, allocate, even_counts, possible, ranking
from mone_export.recipe import Recipe


def plan(
    scores: Scores, counts: Counts | None = None, *, recipe: Recipe | None = None, **choices: Any
) -> Plan:
    """Keep the best experts of each layer, as many as `counts` says, or else as the recipe allocates.

    `choices` are those of `Recipe.of`, `ratio` among them, where no recipe is given. Equal scores go to the
    lower id. Raises `MoneError` for choices that cannot be, and a ratio that leaves too few experts.
    """
    recipe = possible(recipe or Recipe.of(**{"score": scores.score, **choices}), scores.calibration)
    counts = counts or allocate(scores, recipe)
    layers = []
    for layer, values in zip(scores.spec.moe_layers, scores.values, strict=True):
        order = ranking(scores.spec, values, counts[layer])
        kept, pruned = sorted(order[: counts[layer]]), sorted(order[counts[layer] :])
        layers.append(LayerPlan(layer=layer, kept=tuple(kept), pruned=tuple(pruned)))
    return Plan(spec=scores.spec, recipe=recipe, layers=tuple(layers))


def plan_without_scores(spec: MoeSpec, recipe: Recipe) -> Plan:
    """Return a plan with the same number of arbitrary experts in every layer: enough to know a size."""
    blank = Scores(spec=spec, score=recipe.score, values=torch.zeros(len(spec.moe_layers), spec.n_expert))
    counts = even_counts(spec, recipe)
    for row, n_expert in enumerate(spec.present.values()):
        blank.values[row, n_expert:] = -torch.inf
    return replace(plan(blank, counts, recipe=replace(recipe, allocation="even")), recipe=recipe)
