"""plan(): scores and a ratio in, the experts that stay out. Pure, exact counts, stable ties."""

import torch

from mone_export.artifacts import LayerPlan, MoeSpec, Plan, Scores
from mone_export.errors import MoneError


def kept_per_layer(spec: MoeSpec, ratio: float, *, min_kept: int | None = None) -> int:
    """Return how many experts of each layer stay: n_expert - round(ratio * n_expert).

    Raises `MoneError` when the ratio is outside [0, 1) or leaves fewer than `min_kept` (by default top_k)
    experts.
    """
    if not 0 <= ratio < 1:
        raise MoneError(
            f"--ratio {ratio:g} is out of range: it is the share of experts to prune, 0 <= ratio < 1"
        )
    kept = spec.n_expert - round(ratio * spec.n_expert)
    floor = max(spec.top_k if min_kept is None else min_kept, 1)
    if floor > spec.n_expert:
        raise MoneError(
            f"--min-kept {floor} is more than the {spec.n_expert} experts of a layer: "
            f"pass {spec.n_expert} or less"
        )
    if kept < floor:
        largest = (spec.n_expert - floor) / spec.n_expert
        raise MoneError(
            f"--ratio {ratio:g} keeps {kept} of {spec.n_expert} experts, fewer than {floor}: "
            f"pass --ratio {largest:g} or less, or lower --min-kept ({spec.top_k} are used per token)"
        )
    return kept


def plan(scores: Scores, *, ratio: float, min_kept: int | None = None) -> Plan:
    """Keep the best `kept_per_layer` experts of every layer; equal scores go to the lower id."""
    spec = scores.spec
    n_kept = kept_per_layer(spec, ratio, min_kept=min_kept)
    layers = []
    for layer, values in zip(spec.moe_layers, scores.values, strict=True):
        ranking = torch.argsort(values, descending=True, stable=True).tolist()
        kept, pruned = sorted(ranking[:n_kept]), sorted(ranking[n_kept:])
        layers.append(LayerPlan(layer=layer, kept=tuple(kept), pruned=tuple(pruned)))
    return Plan(
        spec=spec, method="mone", score=scores.score, ratio=ratio, scope="layer", layers=tuple(layers)
    )


def plan_without_scores(
    spec: MoeSpec, *, ratio: float, min_kept: int | None = None, score: str = "mone"
) -> Plan:
    """Return a plan with the right counts but arbitrary experts: enough to know the size of the output."""
    blank = Scores(spec=spec, score=score, values=torch.zeros(len(spec.moe_layers), spec.n_expert))
    return plan(blank, ratio=ratio, min_kept=min_kept)
