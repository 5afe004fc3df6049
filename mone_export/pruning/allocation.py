"""How many experts each layer keeps: decided here, for every allocation that a recipe can ask for.

`even` is the papers' way, and the only one that an ordinary file can hold. `model` lets scores compete over
all layers, each relative to its layer's mean, since outputs grow with depth.

A layer's relative output error as a function of the experts it keeps follows from the statistics. It compares
experts within a layer well, and layers badly: it does not know how much harm an error in one does. That
the calibration measured, as the layer's sensitivity (`sensitivities`); weighted by it, the errors of all
layers are small together when `share_out` gives the places away (`sensitivity`). `search` takes that as its
start and asks the loaded model, with novices in place (`calibration.masking`), for the KL divergence on rows
that calibration has not seen.

Where a token first chooses groups of experts, the real experts of any `topk_group` groups must number at
least `top_k`, or some tokens could not have a full set whatever the router says. So each group keeps at least
ceil(top_k / topk_group), its best ones; the rest of the places go to the best of the layer.
"""

import heapq
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np

from mone_export.artifacts import Calibration, MoeSpec, Scores
from mone_export.errors import MoneError
from mone_export.lazily import Tensor, torch
from mone_export.pruning.damage import error_left
from mone_export.pruning.novices import novices
from mone_export.pruning.uncertainty import possible_use
from mone_export.recipe import NoviceName, Recipe

log = logging.getLogger(__name__)

Counts = Mapping[int, int]  # layer -> experts it keeps
Try = Callable[[Counts], float]
"""The damage that counts do to the model, measured."""


def allocate(scores: Scores, recipe: Recipe, *, n_less: int = 0, trial: Try | None = None) -> Counts:
    """Return how many experts each layer keeps, `n_less` fewer in all than the recipe's ratio says.

    Allocation `search` needs `trial`; `sensitivity` and `search` need the scores' calibration. Raises
    `MoneError` where a ratio leaves too few experts, or a method cannot work with the model's routing.
    """
    spec, even = scores.spec, even_counts(scores.spec, recipe)
    if recipe.allocation in ("even", "budget") or not recipe.ratio:
        return even  # of a budget no more is known before `fates`
    n_place = sum(even.values()) - n_less
    least = least_kept(spec, recipe.min_kept)
    if recipe.allocation == "model":
        return _by_score(scores, n_place, least)
    assert scores.calibration is not None, "allocation by errors needs the statistics"
    curves = error_curves(scores.calibration, scores, recipe.known_novice)
    floors = _floors(scores, least, even)
    if recipe.allocation == "sensitivity":
        if n_place < sum(floors.values()):
            raise MoneError(
                "the experts that must stay do not fit: pass a larger size, or smaller numbers with "
                "--min-kept and --protect"
            )
        return share_out(curves, n_place, floors)
    assert trial is not None, "a search needs the model"
    return search(curves, even, floors, trial)


def possible(recipe: Recipe, calibration: Calibration | None) -> Recipe:
    """Return the recipe with even counts where the layers' sensitivities that it needs were not measured."""
    if recipe.allocation != "sensitivity" or not recipe.ratio or (calibration and calibration.sensitivity):
        return recipe
    log.warning(
        "these statistics lack the layers' sensitivities, so every layer keeps the same number of experts: "
        "calibrate again for better counts"
    )
    return replace(recipe, allocation="even")


def kept_per_layer(spec: MoeSpec, recipe: Recipe) -> int:
    """Return how many experts a layer keeps in the mean: n_expert - round(ratio * n_expert).

    Raises `MoneError` when that is fewer than `min_kept` (by default top_k, or as many as fill all groups),
    or when the model's routing has no meaning without the experts that the method takes out of it.
    """
    if recipe.method != "mone" and recipe.ratio:
        _check_routing(spec, recipe)
    kept = spec.n_expert - round(recipe.ratio * spec.n_expert)
    floor = least_kept(spec, recipe.min_kept)
    if floor > spec.n_expert:
        raise MoneError(
            f"--min-kept {floor} is more than the {spec.n_expert} experts of a layer: "
            f"pass {spec.n_expert} or less"
        )
    if kept < floor:
        largest = (spec.n_expert - floor) / spec.n_expert
        raise MoneError(
            f"--ratio {recipe.ratio:g} keeps {kept} of {spec.n_expert} experts, fewer than {floor}: "
            f"pass --ratio {largest:g} or less, or lower --min-kept ({_used(spec)})"
        )
    return kept


def even_counts(spec: MoeSpec, recipe: Recipe) -> dict[int, int]:
    """Return how many experts each layer keeps by the ratio alone.

    Where the model was pruned before, the ratio is a share of the experts that are left in each layer.
    Raises `MoneError` as `kept_per_layer` does.
    """
    if not spec.kept_before:
        return dict.fromkeys(spec.moe_layers, kept_per_layer(spec, recipe))
    least = least_kept(spec, recipe.min_kept)
    counts = {layer: n - round(recipe.ratio * n) for layer, n in spec.present.items()}
    for layer, count in counts.items():
        if recipe.ratio and count < min(least, spec.present[layer]):
            raise MoneError(
                f"--ratio {recipe.ratio:g} keeps {count} of the {spec.present[layer]} experts that layer "
                f"{layer} has left, fewer than {least}: pass a smaller one, or lower --min-kept "
                f"({_used(spec)})"
            )
    return counts


def least_kept(spec: MoeSpec, min_kept: int | None = None) -> int:
    """Return how many experts every layer keeps at least."""
    enough = max(spec.top_k, spec.n_group * _kept_per_group(spec))
    return max(enough if min_kept is None else min_kept, 1)


def ranking(spec: MoeSpec, values: Tensor | None, n_kept: int) -> list[int]:
    """Return the experts of a layer, scored by `values` [n_expert], the last to be pruned first.

    Equal scores go to the lower id, and so do all without scores. `n_kept` is how many stay: each group's
    best ones come first.
    """
    order: Sequence[int] = range(spec.n_expert)
    if values is not None:
        order = torch.argsort(values, descending=True, stable=True).tolist()
    in_group = min(_kept_per_group(spec), n_kept // spec.n_group)
    return _groups_first(order, spec.n_expert // spec.n_group, in_group)


def sensitivities(damage: Mapping[int, float], errors: Mapping[int, float]) -> dict[int, float]:
    """Return what a layer's error of 1 does to the model: measured damage by the error that did it.

    Damage and error are both squares, relative to what they disturb, so the quotient holds for other errors
    in the layer as far as the model is linear. Where hardly an error was made it cannot be told; such a layer
    counts as the mean of the others.
    """
    known = {
        layer: damage[layer] / error
        for layer, error in errors.items()
        if error > 1e-9 and 0 < damage[layer] < float("inf")
    }
    return dict.fromkeys(errors, fmean(known.values()) if known else 1.0) | known


def error_curves(calibration: Calibration, scores: Scores, novice: NoviceName) -> dict[int, Tensor]:
    """Return each layer's error when it keeps its best r experts, float64 [n_expert + 1], by r.

    The error is the one that `possible_use` allows for, as in the score `error`. It is relative to the
    layer's output, times the layer's sensitivity where the calibration has it.
    """
    curves = {}
    for layer, values in zip(scores.spec.moe_layers, scores.values, strict=True):
        stats = calibration.layers[layer]
        error = error_left(stats, novices(stats, novice)) * possible_use(stats)
        left = error[torch.argsort(values, descending=True, stable=True)]
        total = stats.gated2_norm_sq_sum.sum().clamp(min=torch.finfo(torch.float64).tiny)
        lost = torch.cat([left.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
        lost = lost[: scores.spec.present[layer] + 1]  # no more can stay
        curves[layer] = lost / total * calibration.sensitivity.get(layer, 1.0)
    return curves


def share_out(curves: Mapping[int, Tensor], n_place: int, floors: Counts) -> dict[int, int]:
    """Share out `n_place` places so that the curves' sum is small: always the largest gain next.

    A gain is the best mean gain of one or more places together, so that a flat stretch hides nothing. Every
    layer has its floor first; of equal gains the earlier layer's is taken.
    """
    known = {layer: curve.numpy() for layer, curve in curves.items()}
    counts = dict(floors)
    free = n_place - sum(counts.values())
    gains = [
        _gain(curve, counts[layer], layer, free)
        for layer, curve in known.items()
        if counts[layer] < len(curve) - 1
    ]
    heapq.heapify(gains)
    while free > 0 and gains:
        _, layer, n_more = heapq.heappop(gains)
        if n_more <= free:
            counts[layer] += n_more
            free -= n_more
        if counts[layer] < len(known[layer]) - 1:  # a gain of more places than are left was out of date
            heapq.heappush(gains, _gain(known[layer], counts[layer], layer, free))
    return counts


def search(
    curves: Mapping[int, Tensor],
    even: Counts,
    floors: Counts,
    trial: Try,
    *,
    n_step: int = 8,
) -> Counts:
    """Return the counts that did the least damage, as many in all as `even`: 2 + `n_step` trials.

    The even allocation is among those compared.
    """
    n_expert = len(next(iter(curves.values()))) - 1
    candidates: list[Counts] = [even, share_out(curves, sum(even.values()), floors)]
    damage, best = min(((trial(counts), counts) for counts in candidates), key=lambda pair: pair[0])
    tried = {tuple(counts.items()) for counts in candidates}
    size, n_failed = max(1, n_expert // 16), 0
    for _ in range(n_step):
        moved = (
            counts for counts in _moves(curves, best, floors, size) if tuple(counts.items()) not in tried
        )
        if (counts := next(moved, None)) is None:
            break
        tried.add(tuple(counts.items()))
        found = trial(counts)
        if found < damage:
            damage, best, n_failed = found, counts, 0
        elif (n_failed := n_failed + 1) % 4 == 0:
            size = max(1, size // 2)
    return best


def _gain(curve: "np.ndarray", count: int, layer: int, free: int) -> tuple[float, int, int]:
    """Return (minus the largest mean gain from further places, layer, how many places give it)."""
    ahead = curve[count + 1 : count + 1 + max(free, 1)]
    means = (curve[count] - ahead) / np.arange(1, len(ahead) + 1)
    best = int(means.argmax())
    return -float(means[best]), layer, best + 1


def _moves(curves: Mapping[int, Tensor], counts: Counts, floors: Counts, size: int) -> Iterator[Counts]:
    """Yield counts with `size` places moved from one layer to another, the most promising first."""
    gains = {
        layer: float(curve[counts[layer]] - curve[counts[layer] + size])
        for layer, curve in curves.items()
        if counts[layer] + size < len(curve)
    }
    losses = {
        layer: float(curve[counts[layer] - size] - curve[counts[layer]])
        for layer, curve in curves.items()
        if counts[layer] - size >= floors[layer]
    }
    pairs = [
        (losses[giver] - gains[taker], giver, taker) for giver in losses for taker in gains if giver != taker
    ]
    for _, giver, taker in sorted(pairs):
        yield {**counts, giver: counts[giver] - size, taker: counts[taker] + size}


def _by_score(scores: Scores, n_place: int, floor: int) -> Counts:
    """Return the counts where the experts of all layers compete for `n_place` places by relative score."""
    spec = scores.spec
    finite = scores.values.isfinite()
    mean = torch.where(finite, scores.values, 0).sum(1, keepdim=True) / finite.sum(1, keepdim=True).clamp(
        min=1
    )
    relative = scores.values / torch.where(mean == 0, 1, mean).abs()
    n_kept = n_place // len(spec.moe_layers)
    candidates = [
        (-float(relative[row, expert]), place, row)
        for row, values in enumerate(scores.values)
        for place, expert in enumerate(ranking(spec, values, n_kept))
        if floor <= place and values[expert] > -torch.inf
    ]
    places = Counter(row for *_, row in sorted(candidates)[: n_place - floor * len(spec.moe_layers)])
    return {layer: floor + places[row] for row, layer in enumerate(spec.moe_layers)}


def _floors(scores: Scores, least: int, even: Counts) -> dict[int, int]:
    """Return how many experts each layer keeps at least: guarded and protected ones are not given away."""
    floors = {}
    for layer, values in zip(scores.spec.moe_layers, scores.values, strict=True):
        order = ranking(scores.spec, values, even[layer])
        held = [place for place, expert in enumerate(order, start=1) if values[expert] == torch.inf]
        floors[layer] = min(even[layer], max([least, *held]))
    return floors


def _check_routing(spec: MoeSpec, recipe: Recipe) -> None:
    """Refuse to take experts out of a router that could not choose among the rest."""
    method, min_kept = recipe.method, recipe.min_kept
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
