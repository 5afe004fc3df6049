"""From what each fate of an expert costs to a plan: whole, thin, rounded more, or a constant, in one budget.

A fate is an `Option`: so many of an expert's channels, in a type. Every expert wants the one whose error plus
a price per byte is least; the lowest price that the budget can pay is found by bisection, and what it leaves
over goes to the largest gains per byte. Errors are squared errors of the layers' outputs, as they are: on
text like the calibration's and unlike it the layers' sensitivities made nothing better (docs/methods.md).

A layer has one option of whole experts, and at most `N_TIER` others between it and a constant, its own choice
of them: each is a product of matrices more at run time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mone_export.artifacts import Calibration, LayerPlan, Plan, Scores, Tier
from mone_export.errors import MoneError
from mone_export.lazily import torch
from mone_export.pruning.allocation import even_counts, kept_per_layer, least_kept, ranking
from mone_export.pruning.uncertainty import possible_use
from mone_export.recipe import Recipe

N_TIER = 2
_STEPS = 60  # of a bisection over 24 orders of magnitude

Fates = np.ndarray
"""The place of each expert's option among the options, int64 [M]: 0 is a constant."""


@dataclass(frozen=True, slots=True)
class Option:
    """What may become of an expert: `width` of its channels in a type, "" the file's, at a price in bytes."""

    width: int
    n_byte: int
    kind: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """What a layer's experts cost, [M, n_option], and what is decided about them already."""

    costs: np.ndarray
    prices: np.ndarray  # [n_option], bytes; the first is a constant's
    full: np.ndarray  # bool [n_option], with all channels
    kinds: np.ndarray  # str [n_option]
    whole: np.ndarray  # bool [M]: guarded or protected, they stay whole
    at_least: Sequence[int]  # so many experts must have channels, these first
    grouped: bool  # these and no others, where each group needs its own

    def cheapest(self, price: float) -> Fates:
        """Return the fates that cost least at a price per byte, of one full option and `N_TIER` more."""
        priced = self.costs + price * self.prices
        best: tuple[float, Fates] | None = None
        for main in np.flatnonzero(self.full).tolist():
            others = [option for option in self._beside(main) if 0 < self.prices[option] < self.prices[main]]
            options = np.array([0, *self._others(priced, main, others), main])
            fates = options[priced[:, options].argmin(1)]
            fates = self._allowed(fates, options)
            total = float(np.take_along_axis(priced, fates[:, None], 1).sum())
            if best is None or total < best[0]:
                best = total, fates
        assert best is not None
        return best[1]

    def used(self, fates: Fates) -> int:
        """Return how many bytes fates take."""
        return int(self.prices[fates].sum())

    def raised(self, fates: Fates, room: int) -> tuple[float, int, int] | None:
        """Return (gain per byte, expert, its new fate) of the best step up that fits into `room`."""
        main = max(fates, key=lambda fate: self.prices[fate])
        options = np.unique(fates)
        if len(options[(options > 0) & (options != main)]) < N_TIER:
            options = np.array(self._beside(main))
        more = self.prices[options] - self.prices[fates][:, None]  # [M, n_option]
        gain = np.take_along_axis(self.costs, fates[:, None], 1) - self.costs[:, options]
        rate = np.where((more > 0) & (more <= room), gain / np.maximum(more, 1), -np.inf)
        expert, option = np.unravel_index(int(rate.argmax()), rate.shape)
        if rate[expert, option] <= 0:
            return None
        return float(rate[expert, option]), int(expert), int(options[option])

    def _beside(self, main: int) -> list[int]:
        """Return the options that a layer may have whose whole experts are `main`, itself included.

        Thin experts are of the whole ones' type: nothing is lost by it, and there is less to try.
        """
        there = self.full | (self.kinds == self.kinds[main])
        found: list[int] = np.flatnonzero(there & (self.prices <= self.prices[main])).tolist()
        return found

    def _others(self, priced: np.ndarray, main: int, others: Sequence[int]) -> tuple[int, ...]:
        """Return the options, at most `N_TIER` of `others`, that make the layer cheapest beside `main`."""
        if len(others) <= N_TIER:
            return tuple(others)
        known = np.minimum(priced[:, 0], priced[:, main])[:, None]
        columns = np.minimum(priced[:, others], known)  # [M, n_other]
        sets = np.array(list(combinations(range(len(others)), N_TIER)))
        totals = columns[:, sets].min(2).sum(0)
        return tuple(others[place] for place in sets[int(totals.argmin())])

    def _allowed(self, fates: Fates, options: np.ndarray) -> Fates:
        """Return the fates with what must not become of some experts undone: a whole one stays, too."""
        main = options[-1]
        fates = np.where(self.whole, main, fates)
        if not (fates == main).any():
            fates[self.costs[:, 0].argmax()] = main
        missing = [expert for expert in self.at_least if fates[expert] == 0]
        if not self.grouped:  # any others will do as well
            missing = missing[: max(0, len(self.at_least) - int(np.count_nonzero(fates)))]
        fates[missing] = min(options[1:], key=lambda option: self.prices[option])
        return fates


def plan_fates(
    scores: Scores, errors: Mapping[int, np.ndarray], widths: Sequence[int], recipe: Recipe
) -> Plan:
    """Return the plan that spends a recipe's budget of channels with the least squared error.

    `errors` float64 [M, n_width] per layer are `Thinning.errors`, of ascending `widths`, 0 first and the
    experts' own last. Experts that score infinity (`guard`, `protecting`) stay whole, like the layer's best.
    """
    spec = scores.spec
    budget = sum(even_counts(spec, recipe).values()) * spec.expert_size
    return plan_within(scores, errors, [Option(width, width) for width in widths], budget, recipe)


def plan_narrow(
    scores: Scores, errors: Mapping[int, np.ndarray], widths: Sequence[int], recipe: Recipe
) -> Plan:
    """Return the plan of an ordinary file: as many experts in every layer, all of one width.

    For each of `widths` as many experts stay as a recipe's budget of channels pays for, those whose channels
    save most; the width that leaves the least error over all layers is taken. `errors` float64 [M, n_width]
    are `Thinning.errors` with nothing added, so that those of width 0 are what the experts give the layer.
    Experts that score infinity stay.
    """
    spec, calibration = scores.spec, scores.calibration
    assert calibration is not None, "what becomes of an expert follows from a text"
    budget = kept_per_layer(spec, recipe) * spec.expert_size
    costs = [_costs(calibration, layer, errors[layer]) for layer in spec.moe_layers]
    found: list[tuple[float, Plan]] = []
    for place, width in enumerate(widths[1:], start=1):
        n_kept, layers, total = min(spec.n_expert, budget // width), [], 0.0
        if n_kept < least_kept(spec, recipe.min_kept):
            continue
        for number, values, own in zip(spec.moe_layers, scores.values, costs, strict=True):
            saved = torch.from_numpy(own[:, 0] - own[:, place])
            order = ranking(spec, torch.where(values.isposinf(), values, saved), n_kept)
            kept, gone = sorted(order[:n_kept]), sorted(order[n_kept:])
            layers.append(LayerPlan(number, tuple(kept), tuple(gone)))
            total += float(own[kept, place].sum() + own[gone, 0].sum())
        thin = width if width < spec.expert_size else 0
        found.append((total, Plan(spec, recipe, tuple(layers), scores.protected, thin)))
    return min(found, key=lambda each: each[0])[1]


def plan_within(
    scores: Scores, errors: Mapping[int, np.ndarray], options: Sequence[Option], budget: int, recipe: Recipe
) -> Plan:
    """Return the plan whose experts take at most `budget` bytes, with the least error.

    `errors` float64 [M, n_option] per layer are sums over all tokens; the first option is a constant.
    """
    spec, calibration = scores.spec, scores.calibration
    assert calibration is not None, "what becomes of an expert follows from a text"
    layers = [
        _layer(scores, calibration, row, errors[layer], options, recipe)
        for row, layer in enumerate(spec.moe_layers)
    ]
    chosen = zip(spec.moe_layers, _spent(layers, budget), strict=True)
    decided = tuple(_planned(number, fates, options) for number, fates in chosen)
    return Plan(spec, recipe, decided, scores.protected)


def damage(scores: Scores, errors: Mapping[int, np.ndarray], options: Sequence[Option], plan: Plan) -> float:
    """Return the error of a plan per token, as `plan_within` weighs it."""
    calibration, total = scores.calibration, 0.0
    assert calibration is not None
    places = {(option.kind, option.width): place for place, option in enumerate(options)}
    for layer in plan.layers:
        costs = _costs(calibration, layer.layer, errors[layer.layer])
        tiers = (Tier(plan.spec.expert_size, layer.kept, layer.kind), *layer.tiers, Tier(0, layer.pruned))
        total += sum(
            float(costs[list(tier.experts), places[tier.kind, tier.width]].sum())
            for tier in tiers
            if tier.experts
        )
    return total


def _costs(calibration: Calibration, layer: int, errors: np.ndarray) -> np.ndarray:
    stats = calibration.layers[layer]
    costs: np.ndarray = errors / stats.n_token * possible_use(stats).numpy()[:, None]
    return costs


def _layer(
    scores: Scores,
    calibration: Calibration,
    row: int,
    errors: np.ndarray,
    options: Sequence[Option],
    recipe: Recipe,
) -> _Layer:
    costs = _costs(calibration, scores.spec.moe_layers[row], errors)
    n_real = least_kept(scores.spec, recipe.min_kept)
    order = ranking(scores.spec, scores.values[row], n_real)
    whole = scores.values[row].isposinf().numpy()
    prices = np.array([option.n_byte for option in options])
    full = np.array([option.width == scores.spec.expert_size for option in options])
    kinds = np.array([option.kind for option in options])
    return _Layer(costs, prices, full, kinds, whole, order[:n_real], grouped=scores.spec.n_group > 1)


def _spent(layers: Sequence[_Layer], budget: int) -> list[Fates]:
    """Return each layer's fates within a budget of bytes."""

    def at(price: float) -> list[Fates]:
        return [layer.cheapest(price) for layer in layers]

    def used(fates: Sequence[Fates]) -> int:
        return sum(layer.used(own) for layer, own in zip(layers, fates, strict=True))

    highest = max(float(layer.costs.max()) for layer in layers) / float(layers[0].prices[1:].min()) + 1e-300
    low, high = highest * 1e-18, highest * 1e6  # the dearest buys only what must be
    best = at(high)
    for _ in range(_STEPS):
        price = (low * high) ** 0.5
        found = at(price)
        if used(found) > budget:
            low = price
        else:
            best, high = found, price
    room = budget - used(best)
    if room < 0:
        raise MoneError(
            "the experts that must stay take more than the ratio leaves: pass a smaller --ratio, --no-guard, "
            "or smaller numbers with --min-kept and --protect"
        )
    while room > 0:
        steps = [(step, own) for own, layer in enumerate(layers) if (step := layer.raised(best[own], room))]
        if not steps:
            break
        (_, expert, fate), own = max(steps)
        room += layers[own].used(best[own])
        best[own][expert] = fate
        room -= layers[own].used(best[own])
    return best


def _planned(number: int, fates: Fates, options: Sequence[Option]) -> LayerPlan:
    """Return a layer's plan: the dearest option there is gives the kept experts, others are tiers."""

    def of(fate: int) -> tuple[int, ...]:
        return tuple(np.flatnonzero(fates == fate).tolist())

    there = sorted({*fates.tolist()} - {0}, key=lambda fate: options[fate].n_byte, reverse=True)
    main, *others = there
    tiers = tuple(Tier(options[fate].width, of(fate), options[fate].kind) for fate in others)
    return LayerPlan(number, kept=of(main), pruned=of(0), tiers=tiers, kind=options[main].kind)
