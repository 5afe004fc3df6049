"""plan(): scores and a ratio in, the experts that stay out. Pure, exact counts, stable ties.

Where a token first chooses groups of experts, the real experts of any `topk_group` groups must number at
least `top_k`, or some tokens could not have a full set whatever the router says. So each group keeps at least
ceil(top_k / topk_group), its best ones; the rest of the places go to the best of the layer.

Over the whole model (`scope` model) a score counts relative to the mean of its layer, since outputs grow with
depth; every layer keeps its floor, and the rest of the places go to the best wherever they are.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mone_export.artifacts import LayerPlan, MoeSpec, Plan, Scores
from mone_export.errors import MoneError

# how experts are removed, and the score that ranks them: the papers' own of `drop` and `dern`, the best in
# docs/methods.md of `mone`
METHODS = {"mone": "error", "drop": "reap", "dern": "gate"}
SCOPES = ("layer", "model")  # and `sensitivity` or `search`, where `allocation` has counted


def kept_per_layer(spec: MoeSpec, ratio: float, *, min_kept: int | None = None, method: str = "mone") -> int:
    """Return how many experts of each layer stay: n_expert - round(ratio * n_expert).

    Raises `MoneError` when the ratio is outside [0, 1) or leaves fewer than `min_kept` experts (by default
    top_k, or as many as fill all groups), or when the model's routing has no meaning without the experts that
    `method` takes out of it.
    """
    if method != "mone":
        _check_routing(spec, method, min_kept)
    if not 0 <= ratio < 1:
        raise MoneError(
            f"--ratio {ratio:g} is out of range: it is the share of experts to prune, 0 <= ratio < 1"
        )
    kept = spec.n_expert - round(ratio * spec.n_expert)
    floor = least_kept(spec, min_kept)
    if floor > spec.n_expert:
        raise MoneError(
            f"--min-kept {floor} is more than the {spec.n_expert} experts of a layer: "
            f"pass {spec.n_expert} or less"
        )
    if kept < floor:
        largest = (spec.n_expert - floor) / spec.n_expert
        raise MoneError(
            f"--ratio {ratio:g} keeps {kept} of {spec.n_expert} experts, fewer than {floor}: "
            f"pass --ratio {largest:g} or less, or lower --min-kept ({_used(spec)})"
        )
    return kept


def least_kept(spec: MoeSpec, min_kept: int | None = None) -> int:
    """Return how many experts every layer keeps at least."""
    enough = max(spec.top_k, spec.n_group * _kept_per_group(spec))
    return max(enough if min_kept is None else min_kept, 1)


def check_scope(method: str, scope: str) -> None:
    """Refuse counts that differ from layer to layer where the file has one for all."""
    if method != "mone" and scope != "layer":
        raise MoneError(
            f"--method {method} keeps the same number of experts in every layer, "
            f"{'--scope' if scope in SCOPES else '--allocate'} {scope} does not: leave one of them out"
        )


def _check_routing(spec: MoeSpec, method: str, min_kept: int | None) -> None:
    """Refuse to take experts out of a router that could not choose among the rest."""
    if spec.n_group > 1:
        raise MoneError(
            f"--method {method} takes experts out of the router, but {spec.arch} selects by {spec.n_group} "
            "groups of experts numbered in sequence: use --method mone"
        )
    if min_kept is not None and min_kept < spec.top_k:
        raise MoneError(
            f"--min-kept {min_kept} with --method {method}: the router selects {spec.top_k} experts for each "
            f"token and needs that many to choose from: pass {spec.top_k} or more, or use --method mone"
        )


def plan(
    scores: Scores,
    *,
    ratio: float,
    min_kept: int | None = None,
    method: str = "mone",
    scope: str = "layer",
    counts: Mapping[int, int] | None = None,
) -> Plan:
    """Keep the best experts, `kept_per_layer` in every layer or in the mean over layers (`scope` model).

    Equal scores go to the lower id, and over layers to the one that has fewer. `counts` says how many each
    layer keeps where that was decided elsewhere.
    """
    spec = scores.spec
    check_scope(method, scope)
    n_kept = kept_per_layer(spec, ratio, min_kept=min_kept, method=method)
    rankings = [_ranking(spec, values, n_kept) for values in scores.values]
    if counts is None:
        counts = dict.fromkeys(spec.moe_layers, n_kept)
        if scope == "model":
            counts = _model_counts(scores, rankings, n_kept, least_kept(spec, min_kept))
    layers = []
    for layer, ranking in zip(spec.moe_layers, rankings, strict=True):
        kept, pruned = sorted(ranking[: counts[layer]]), sorted(ranking[counts[layer] :])
        layers.append(LayerPlan(layer=layer, kept=tuple(kept), pruned=tuple(pruned)))
    return Plan(spec=spec, method=method, score=scores.score, ratio=ratio, scope=scope, layers=tuple(layers))


def _ranking(spec: MoeSpec, values: Tensor, n_kept: int) -> list[int]:
    """Return a layer's experts, the last to be pruned first."""
    ranking = torch.argsort(values, descending=True, stable=True).tolist()
    in_group = min(_kept_per_group(spec), n_kept // spec.n_group)
    return _groups_first(ranking, spec.n_expert // spec.n_group, in_group)


def _model_counts(
    scores: Scores, rankings: Sequence[Sequence[int]], n_kept: int, floor: int
) -> dict[int, int]:
    """Return how many experts each layer keeps where all layers compete for `n_kept` places each."""
    finite = scores.values.isfinite()
    mean = torch.where(finite, scores.values, 0).sum(1, keepdim=True) / finite.sum(1, keepdim=True).clamp(
        min=1
    )
    relative = scores.values / torch.where(mean == 0, 1, mean).abs()
    candidates = [
        (-float(relative[row, expert]), place, row)
        for row, ranking in enumerate(rankings)
        for place, expert in enumerate(ranking)
        if place >= floor
    ]
    n_free = len(rankings) * (n_kept - floor)
    places = Counter(row for *_, row in sorted(candidates)[:n_free])
    return {layer: floor + places[row] for row, layer in enumerate(scores.spec.moe_layers)}


def plan_without_scores(
    spec: MoeSpec,
    *,
    ratio: float,
    min_kept: int | None = None,
    score: str = "mone",
    method: str = "mone",
    scope: str = "layer",
) -> Plan:
    """Return a plan with the right counts but arbitrary experts: enough to know the size of the output."""
    blank = Scores(spec=spec, score=score, values=torch.zeros(len(spec.moe_layers), spec.n_expert))
    return plan(blank, ratio=ratio, min_kept=min_kept, method=method, scope=scope)


def _kept_per_group(spec: MoeSpec) -> int:
    """Return how many real experts each group must keep so that any choice of groups holds `top_k`."""
    return math.ceil(spec.top_k / spec.topk_group) if spec.n_group > 1 else 0


def _groups_first(ranking: Sequence[int], size: int, in_group: int) -> list[int]:
    """Move the best `in_group` experts of each group (`size` neighbouring numbers) to the front."""
    seen: Counter[int] = Counter()
    best: list[int] = []
    others: list[int] = []
    for expert in ranking:
        seen[expert // size] += 1
        (best if seen[expert // size] <= in_group else others).append(expert)
    return best + others


def _used(spec: MoeSpec) -> str:
    groups = f" of {spec.topk_group} of {spec.n_group} groups" if spec.n_group > 1 else ""
    return f"{spec.top_k} experts{groups} are used per token"
