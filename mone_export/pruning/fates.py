"""From what each expert costs at each width to a plan: whole, thin, or a constant, under one budget.

The budget is a number of intermediate channels over all layers, `1 - ratio` of those there are: as many bytes
as whole experts and constants take at that ratio. Every expert wants the fate whose error plus a price per
channel is least; the lowest price that the budget can pay is found by bisection, and what it leaves over goes
to the largest gains per channel. Errors are squared errors of the layers' outputs, as they are: on text like
the calibration's and unlike it the layers' sensitivities made nothing better (docs/methods.md).

A layer has at most `N_TIER` widths between none and all, its own choice of them: each is a product of
matrices more at run time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mone_export.artifacts import Calibration, LayerPlan, Plan, Scores, Tier
from mone_export.errors import MoneError
from mone_export.pruning.allocation import even_counts, least_kept, ranking
from mone_export.pruning.uncertainty import possible_use
from mone_export.recipe import Recipe

N_TIER = 2
_STEPS = 60  # of a bisection over 24 orders of magnitude

Fates = np.ndarray
"""The place of each expert's width among the widths, int64 [M]: 0 is a constant, the last is whole."""


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """What a layer's experts cost, [M, n_width], and what is decided about them already."""

    costs: np.ndarray
    widths: np.ndarray
    whole: np.ndarray  # bool [M]: guarded, they stay as they are
    at_least: Sequence[int]  # so many experts must have channels, these first
    grouped: bool  # these and no others, where each group needs its own

    def cheapest(self, price: float) -> Fates:
        """Return the fates that cost least in all at a price per channel, of at most `N_TIER` thin widths."""
        last = len(self.widths) - 1
        priced = self.costs + price * self.widths
        best: tuple[float, Fates] | None = None
        for inner in combinations(range(1, last), min(N_TIER, last - 1)):
            options = np.array((0, *inner, last))
            fates = options[priced[:, options].argmin(1)]
            fates = self._allowed(fates, options)
            total = float(np.take_along_axis(priced, fates[:, None], 1).sum())
            if best is None or total < best[0]:
                best = total, fates
        assert best is not None
        return best[1]

    def used(self, fates: Fates) -> int:
        """Return how many channels fates take."""
        return int(self.widths[fates].sum())

    def raised(self, fates: Fates, room: int) -> tuple[float, int, int] | None:
        """Return (gain per channel, expert, its new fate) of the best step up that fits into `room`."""
        options = np.unique(np.append(fates, len(self.widths) - 1))
        if len(options[(options > 0) & (options < len(self.widths) - 1)]) < N_TIER:
            options = np.arange(len(self.widths))
        more = self.widths[options] - self.widths[fates][:, None]  # [M, n_option]
        gain = np.take_along_axis(self.costs, fates[:, None], 1) - self.costs[:, options]
        rate = np.where((more > 0) & (more <= room), gain / np.maximum(more, 1), -np.inf)
        expert, option = np.unravel_index(int(rate.argmax()), rate.shape)
        if rate[expert, option] <= 0:
            return None
        return float(rate[expert, option]), int(expert), int(options[option])

    def _allowed(self, fates: Fates, options: np.ndarray) -> Fates:
        """Return the fates with what must not become of some experts undone: a whole one stays, too."""
        last = len(self.widths) - 1
        fates = np.where(self.whole, last, fates)
        if not (fates == last).any():
            fates[self.costs[:, 0].argmax()] = last
        missing = [expert for expert in self.at_least if fates[expert] == 0]
        if not self.grouped:  # any others will do as well
            missing = missing[: max(0, len(self.at_least) - int(np.count_nonzero(fates)))]
        fates[missing] = options[1]
        return fates


def plan_fates(
    scores: Scores, errors: Mapping[int, np.ndarray], widths: Sequence[int], recipe: Recipe
) -> Plan:
    """Return the plan that spends a recipe's budget of channels with the least squared error.

    `errors` float64 [M, n_width] per layer are `Thinning.errors`, of ascending `widths`, 0 first and the
    experts' own last. Experts that score infinity (`guard`) stay whole.
    """
    spec, calibration = scores.spec, scores.calibration
    assert calibration is not None, "a thin expert is fitted to a text"
    layers = [
        _layer(scores, calibration, row, layer, errors[layer], widths, recipe)
        for row, layer in enumerate(spec.moe_layers)
    ]
    budget = sum(even_counts(spec, recipe).values()) * spec.expert_size
    chosen = _spent(layers, budget)
    return Plan(
        spec,
        recipe,
        tuple(_planned(number, fates, widths) for number, fates in zip(spec.moe_layers, chosen, strict=True)),
    )


def _layer(
    scores: Scores,
    calibration: Calibration,
    row: int,
    number: int,
    errors: np.ndarray,
    widths: Sequence[int],
    recipe: Recipe,
) -> _Layer:
    stats = calibration.layers[number]
    costs = errors / stats.n_token * possible_use(stats).numpy()[:, None]
    n_real = least_kept(scores.spec, recipe.min_kept)
    order = ranking(scores.spec, scores.values[row], n_real)
    whole = scores.values[row].isposinf().numpy()
    return _Layer(costs, np.array(widths), whole, order[:n_real], grouped=scores.spec.n_group > 1)


def _spent(layers: Sequence[_Layer], budget: int) -> list[Fates]:
    """Return each layer's fates within a budget of channels."""

    def at(price: float) -> list[Fates]:
        return [layer.cheapest(price) for layer in layers]

    def used(fates: Sequence[Fates]) -> int:
        return sum(layer.used(own) for layer, own in zip(layers, fates, strict=True))

    highest = max(float(layer.costs.max()) for layer in layers) + 1e-300
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
            "the experts that must stay take more than the ratio leaves: pass a smaller --ratio, --no-guard "
            "or a smaller --min-kept"
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


def _planned(number: int, fates: Fates, widths: Sequence[int]) -> LayerPlan:
    last = len(widths) - 1

    def of(fate: int) -> tuple[int, ...]:
        return tuple(np.flatnonzero(fates == fate).tolist())

    tiers = tuple(Tier(widths[fate], of(fate)) for fate in reversed(range(1, last)) if (fates == fate).any())
    return LayerPlan(number, kept=of(last), pruned=of(0), tiers=tiers)
