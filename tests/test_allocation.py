"""Budgets are kept, layers that matter get more, and nothing measured worse than even is taken."""

import time
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from small_layer import LAYER, N_EXPERT, SPEC, Layer
from torch import Tensor

from mone_export.artifacts import Calibration, Scores
from mone_export.errors import MoneError
from mone_export.pruning.allocation import (
    allocate,
    error_curves,
    least_kept,
    possible,
    ranking,
    search,
    sensitivities,
    share_out,
)
from mone_export.pruning.damage import relative_error
from mone_export.pruning.planning import plan
from mone_export.pruning.scoring import score
from mone_export.pruning.uncertainty import possible_use
from mone_export.recipe import Recipe

CALIBRATION = Calibration(SPEC, "", "", "", 40, {1: LAYER.stats()})


def curve(*drops: float) -> Tensor:
    """An error that falls by `drops` with each expert kept."""
    return torch.tensor([sum(drops[r:]) for r in range(len(drops) + 1)], dtype=torch.float64)


def test_curve_is_the_relative_error_of_each_plan() -> None:
    """Each expert's counts as often as `possible_use` allows for."""
    scores, stats = score(CALIBRATION), CALIBRATION.layers[1]
    found = error_curves(CALIBRATION, scores, "mean")[1]
    for n_pruned in range(N_EXPERT - 1):
        pruned = plan(scores, ratio=n_pruned / N_EXPERT, min_kept=1, allocation="even").layers[0].pruned
        errors = (float(possible_use(stats)[e]) * relative_error(stats, [e], "mean") for e in pruned)
        assert found[N_EXPERT - n_pruned].item() == pytest.approx(sum(errors), abs=1e-12)


def test_places_go_to_the_largest_gain() -> None:
    curves = {0: curve(9, 5, 1, 1), 1: curve(9, 8, 7, 0), 2: curve(1, 1, 1, 1)}
    floors = dict.fromkeys(curves, 1)
    assert share_out(curves, 6, floors) == {0: 2, 1: 3, 2: 1}
    assert share_out(curves, 5, floors) == {0: 1, 1: 3, 2: 1}
    assert sum(share_out(curves, 9, floors).values()) == 9
    assert share_out(curves, 12, floors) == {0: 4, 1: 4, 2: 4}
    assert share_out(curves, 6, floors | {2: 3}) == {0: 1, 1: 2, 2: 3}, "a layer's floor comes first"


def test_the_last_place_of_a_layer_is_given_away_too() -> None:
    curves = {0: curve(1, 1), 1: curve(1, 2)}
    assert share_out(curves, 3, dict.fromkeys(curves, 1)) == {0: 1, 1: 2}
    assert share_out(curves, 4, dict.fromkeys(curves, 1)) == {0: 2, 1: 2}


def test_a_flat_stretch_does_not_hide_a_gain_behind_it() -> None:
    curves = {0: curve(1, 0, 6, 0), 1: curve(1, 2, 0, 0)}
    assert share_out(curves, 4, dict.fromkeys(curves, 1)) == {0: 3, 1: 1}


def test_a_layer_counts_by_its_sensitivity() -> None:
    scores = score(CALIBRATION)
    plain, weighted = error_curves(CALIBRATION, scores, "mean")[1], replace(CALIBRATION, sensitivity={1: 3.0})
    assert torch.equal(error_curves(weighted, scores, "mean")[1], plain * 3)


def test_sensitivity_is_the_damage_of_an_error() -> None:
    found = sensitivities({0: 0.02, 1: 0.3, 2: 0.0, 3: float("nan")}, {0: 0.1, 1: 0.5, 2: 0.0, 3: 0.1})
    assert found == pytest.approx({0: 0.2, 1: 0.6, 2: 0.4, 3: 0.4}), "unknown ones are the mean of the others"
    assert sensitivities({0: 0.0}, {0: 0.0}) == {0: 1.0}


def test_search_goes_on_from_what_the_curves_say() -> None:
    """Layer 2 matters twice as much as the others by its curve, and ten times as much in fact."""
    drops = [16.0 - r for r in range(16)]
    curves = {layer: curve(*drops) * (2 if layer == 2 else 1) for layer in range(3)}
    asked: list[Mapping[int, int]] = []

    def measure(counts: Mapping[int, int]) -> float:
        asked.append(counts)
        return sum(float(curves[layer][n]) * (5 if layer == 2 else 1) for layer, n in counts.items())

    found = search(curves, dict.fromkeys(curves, 8), dict.fromkeys(curves, 2), measure, n_step=8)
    assert sum(found.values()) == 24 and min(found.values()) >= 2
    assert len(asked) <= 2 + 8
    start = share_out(curves, 24, dict.fromkeys(curves, 2))
    assert found[2] > start[2] > 8
    assert measure(found) < measure(start) < measure(dict.fromkeys(curves, 8))


def test_search_keeps_even_counts_where_nothing_measured_is_better() -> None:
    curves = {0: curve(9, 5, 1, 1), 1: curve(9, 8, 7, 0)}

    def measure(counts: Mapping[int, int]) -> float:
        return float(sum(abs(n - 2) for n in counts.values()))

    assert search(curves, dict.fromkeys(curves, 2), dict.fromkeys(curves, 1), measure) == {0: 2, 1: 2}


LAYERS = {0: Layer((12, 7, 1, 20, 0, 3)), 1: Layer((6, 5, 9, 2, 10, 8), seed=1), 3: Layer((4,) * 6, seed=2)}
SEVERAL = Calibration(
    replace(SPEC, moe_layers=tuple(LAYERS)),
    *("", "", "", 40),
    {number: layer.stats() for number, layer in LAYERS.items()},
    sensitivity={0: 1.0, 1: 20.0, 3: 0.5},
)


def test_curves_are_each_layers_own() -> None:
    """By hand: the errors of what goes, worst first, of what the layer puts out, times its sensitivity."""
    found = error_curves(SEVERAL, score(SEVERAL), "zero")
    for layer, stats in SEVERAL.layers.items():
        lost = stats.gated2_norm_sq_sum * possible_use(stats)
        order = score(SEVERAL).values[list(LAYERS).index(layer)].argsort(descending=True, stable=True)
        total = float(stats.gated2_norm_sq_sum.sum())
        for r in range(N_EXPERT + 1):
            wanted = float(lost[order[r:]].sum()) / total * SEVERAL.sensitivity[layer]
            assert found[layer][r].item() == pytest.approx(wanted, rel=1e-12, abs=1e-15)
        assert found[layer].dtype == torch.float64 and len(found[layer]) == N_EXPERT + 1


def test_a_curve_ends_where_no_more_experts_are_left() -> None:
    spec = replace(SEVERAL.spec, kept_before=(6, 4, 5))
    before = replace(SEVERAL, spec=spec)
    scores = replace(score(SEVERAL), spec=spec)
    plain = error_curves(SEVERAL, score(SEVERAL), "mean")
    found = error_curves(before, scores, "mean")
    assert [len(curve) for curve in found.values()] == [7, 5, 6]
    assert all(torch.equal(curve, plain[layer][: len(curve)]) for layer, curve in found.items())


def test_a_layer_without_output_has_no_error() -> None:
    none = replace(CALIBRATION, layers={1: Layer((0,) * 6).stats()})
    assert not error_curves(none, score(none), "mean")[1].any()


def test_curves_need_scores_of_every_layer() -> None:
    scores = score(SEVERAL)
    with pytest.raises(ValueError, match="zip"):
        error_curves(SEVERAL, replace(scores, values=scores.values[:2]), "mean")


@pytest.mark.parametrize("n_less", [0, 1, 4])
def test_places_are_shared_out_by_sensitivity(n_less: int) -> None:
    scores = score(SEVERAL)
    for novice in ("mean", "zero", "joint"):
        recipe = Recipe.of(0.5, novice=novice, min_kept=1)
        known = "least-squares" if novice == "joint" else novice
        curves = error_curves(SEVERAL, scores, known)
        wanted = share_out(curves, 9 - n_less, dict.fromkeys(LAYERS, 1))
        found = allocate(scores, recipe, n_less=n_less)
        assert found == wanted and sum(found.values()) == 9 - n_less


def test_no_layer_loses_what_must_stay() -> None:
    """Experts of infinite score stay, and `min_kept`, but never more than the ratio leaves."""
    scores = score(SEVERAL)
    held = scores.values.clone()
    held[2, [0, 1, 2]] = torch.inf
    held[0, [5]] = torch.inf
    found = allocate(replace(scores, values=held), Recipe.of(0.5, min_kept=1), n_less=4)
    assert found[3] == 3 and found[0] >= 1 and sum(found.values()) == 5
    held[2] = torch.inf
    assert allocate(replace(scores, values=held), Recipe.of(0.5, min_kept=1), n_less=4)[3] == 3
    assert min(allocate(scores, Recipe.of(0.5), n_less=3).values()) == 2, "a token uses two"


def test_what_must_stay_may_not_fit() -> None:
    scores = score(SEVERAL)
    assert allocate(scores, Recipe.of(0.5), n_less=3) == dict.fromkeys(LAYERS, 2)
    with pytest.raises(MoneError) as error:
        allocate(scores, Recipe.of(0.5), n_less=4)
    assert str(error.value) == (
        "the experts that must stay do not fit: pass a larger size, or smaller numbers with --min-kept and "
        "--protect"
    )


@pytest.mark.parametrize("allocation", ["even", "model", "sensitivity", "search"])
def test_a_ratio_of_0_needs_no_statistics(allocation: str) -> None:
    scores = Scores(SEVERAL.spec, "gate", torch.ones(3, N_EXPERT).double())
    assert allocate(scores, Recipe.of(0, allocation=allocation)) == dict.fromkeys(LAYERS, N_EXPERT)


def test_even_counts_and_budgets_ask_nothing() -> None:
    scores = Scores(SEVERAL.spec, "gate", torch.rand(3, N_EXPERT).double())
    assert allocate(scores, Recipe.of(0.5, allocation="even"), n_less=1) == dict.fromkeys(LAYERS, 3)
    assert allocate(scores, Recipe.of(0.5, allocation="budget")) == dict.fromkeys(LAYERS, 3)
    for allocation in ("sensitivity", "search"):
        with pytest.raises(AssertionError, match="allocation by errors needs the statistics"):
            allocate(scores, Recipe.of(0.5, allocation=allocation))
    with pytest.raises(AssertionError, match="a search needs the model"):
        allocate(score(SEVERAL), Recipe.of(0.5, allocation="search"))


def test_competition_over_the_model_may_have_fewer_places() -> None:
    scores = Scores(SEVERAL.spec, "gate", torch.tensor([[6, 5, 4, 3, 2, 1]] * 3).double())
    recipe = Recipe.of(0.5, allocation="model")
    assert allocate(scores, recipe) == dict.fromkeys(LAYERS, 3)
    assert allocate(scores, recipe, n_less=2) == {0: 3, 1: 2, 3: 2}


def test_places_that_groups_need_are_not_competed_for() -> None:
    """The best of each group come first, as they do when the layer is planned."""
    spec = replace(SEVERAL.spec, n_group=2, topk_group=2)
    values = torch.tensor([[9, 8, 7, 1, 1, 1], [9, 1, 1, 8, 1, 1], [1, 1, 1, 1, 1, 1]]).double()
    recipe = Recipe.of(0.5, allocation="model")
    assert allocate(Scores(spec, "gate", values), recipe) == {0: 4, 1: 2, 3: 3}, "its own two are given"


def test_search_asks_for_what_the_recipe_allows() -> None:
    asked: list[Mapping[int, int]] = []

    def trial(counts: Mapping[int, int]) -> float:
        asked.append(counts)
        return float(counts[1])

    found = allocate(score(SEVERAL), Recipe.of(0.5, allocation="search", min_kept=2), trial=trial)
    assert asked[0] == dict.fromkeys(LAYERS, 3), "even counts first"
    curves = error_curves(SEVERAL, score(SEVERAL), "least-squares")
    assert asked[1] == share_out(curves, 9, dict.fromkeys(LAYERS, 2))
    assert found[1] == 2 and min(found.values()) == 2 and sum(found.values()) == 9


def test_unmeasured_sensitivities_make_counts_even(caplog: pytest.LogCaptureFixture) -> None:
    recipe = Recipe.of(0.5)
    unmeasured = replace(SEVERAL, sensitivity={})
    for calibration in (None, unmeasured):
        assert possible(recipe, calibration) == Recipe.of(0.5, allocation="even")
    assert len(caplog.records) == 2 and "calibrate again for better counts" in caplog.text
    for same, calibration in (
        (recipe, SEVERAL),
        (Recipe.of(0), unmeasured),
        (Recipe.of(0.5, allocation="model"), None),
        (Recipe.of(0.5, allocation="search"), unmeasured),
    ):
        assert possible(same, calibration) is same


def test_an_error_too_small_to_divide_by_counts_as_the_mean() -> None:
    damage = {0: 1.0, 1: 1.0, 2: float("inf"), 3: -1.0, 4: 1e-30}
    found = sensitivities(damage, {0: 1e-9, 1: 2e-9, 2: 1.0, 3: 1.0, 4: 1.0})
    known = [1 / 2e-9, 1e-30]
    mean = sum(known) / 2
    assert found == pytest.approx({0: mean, 1: known[0], 2: mean, 3: mean, 4: known[1]}, rel=1e-12)


def test_even_counts_stay_where_the_curves_only_do_as_well() -> None:
    """Of equal damage the first is taken, and nothing is asked of counts but what they do."""
    curves = {0: curve(9, 5, 1, 1), 1: curve(9, 8, 7, 0)}
    even = {0: 2, 1: 2}
    assert search(curves, even, {0: 1, 1: 1}, lambda _: 1.0) == even
    assert search(curves, even, {0: 1, 1: 1}, lambda counts: counts[0] - 1.0, n_step=0) == {0: 1, 1: 3}


def test_search_makes_eight_steps() -> None:
    drops = [64.0 - r for r in range(64)]
    curves = {layer: curve(*drops) for layer in range(3)}
    assert len(moves_tried(curves, dict.fromkeys(curves, 32), dict.fromkeys(curves, 1))) == 2 + 8


@pytest.mark.parametrize(("n_expert", "size"), [(15, 1), (31, 1), (32, 2), (48, 3)])
def test_search_begins_with_a_sixteenth_of_a_layer(n_expert: int, size: int) -> None:
    curves = {layer: curve(*[float(n_expert - r) for r in range(n_expert)]) for layer in range(2)}
    even = dict.fromkeys(curves, n_expert // 2)
    _, _, first = moves_tried(curves, even, dict.fromkeys(curves, 1), n_step=1)
    assert sorted(n - n_expert // 2 for n in first.values()) == [-size, size]


def test_a_success_sets_the_failures_back() -> None:
    """Three failures, one success, three failures: the steps are as large as before."""
    drops = [64.0 - r for r in range(64)]
    curves = {layer: curve(*drops) * (1 + layer / 100) for layer in range(3)}
    asked: list[dict[int, int]] = []

    def trial(counts: Mapping[int, int]) -> float:
        asked.append(dict(counts))
        return 0.5 if len(asked) == 6 else 2.0 if len(asked) == 1 else 1.0 + len(asked)

    search(curves, dict.fromkeys(curves, 32), dict.fromkeys(curves, 1), trial, n_step=9)
    best = asked[5]
    after = [max(abs(counts[layer] - best[layer]) for layer in counts) for counts in asked[6:]]
    assert after == [4, 4, 4, 4, 2]


GROUPED = replace(SPEC, n_group=3, topk_group=2)  # two experts in each, of which one is needed


def test_every_layer_has_a_least_number() -> None:
    assert least_kept(SPEC) == 2 and least_kept(GROUPED) == 3
    assert least_kept(replace(GROUPED, top_k=3)) == 6, "3 of 2 groups: 2 in each"
    assert least_kept(replace(SPEC, n_group=2, top_k=3)) == 6, "3 of one of 2 groups"
    assert [least_kept(GROUPED, n) for n in (0, 1, 2, 6)] == [1, 1, 2, 6]


def test_the_best_of_each_group_come_first() -> None:
    values = torch.tensor([1.0, 6, 5, 4, 3, 2])
    assert ranking(SPEC, None, 3) == list(range(6))
    assert ranking(SPEC, values, 3) == [1, 2, 3, 4, 5, 0]
    assert ranking(GROUPED, values, 3) == [1, 2, 4, 3, 5, 0]
    assert ranking(GROUPED, None, 5) == [0, 2, 4, 1, 3, 5]
    assert ranking(GROUPED, values, 2) == [1, 2, 3, 4, 5, 0], "too few for one in each"
    assert ranking(replace(GROUPED, top_k=3), values, 6) == [1, 2, 3, 4, 5, 0], "all of each"
    assert ranking(SPEC, torch.tensor([1.0, 2, 2, 1, 2, 1]), 3) == [1, 2, 4, 0, 3, 5]


def moves_tried(
    curves: Mapping[int, Tensor], even: Mapping[int, int], floors: Mapping[int, int], **options: int
) -> list[dict[int, int]]:
    """All counts that a search asks for where nothing is better than the first."""
    asked: list[dict[int, int]] = []

    def trial(counts: Mapping[int, int]) -> float:
        asked.append(dict(counts))
        return float(len(asked))

    assert search(curves, even, floors, trial, **options) == even
    return asked


def test_search_tries_the_most_promising_moves_first() -> None:
    """From the best counts so far: what the taker gains less what the giver loses, every move once."""
    curves = {0: curve(9, 5, 1, 1), 1: curve(9, 8, 7, 0), 2: curve(4, 3, 2, 0)}
    even, floors = dict.fromkeys(curves, 2), {0: 1, 1: 1, 2: 2}
    asked = moves_tried(curves, even, floors)
    assert asked == [
        {0: 2, 1: 2, 2: 2},
        {0: 1, 1: 3, 2: 2},  # what the curves say is the best move, too, and is not tried twice
        {0: 1, 1: 2, 2: 3},  # loses 5, gains 2
        {0: 2, 1: 1, 2: 3},  # loses 8, gains 2
        {0: 3, 1: 1, 2: 2},  # loses 8, gains 1
    ]
    assert moves_tried(curves, even, floors, n_step=1) == asked[:3]
    assert moves_tried(curves, even, even)[1:] == [even], "nobody can give"


def test_who_loses_least_gives_first() -> None:
    """What is lost by giving counts, not how much error there is without that."""
    curves = {0: [30.0, 11, 3], 1: [40.0, 33, 30], 2: [9.0, 8, 7, 6]}
    tensors = {layer: torch.tensor(values, dtype=torch.float64) for layer, values in curves.items()}
    asked = moves_tried(tensors, dict.fromkeys(curves, 2), {0: 1, 1: 1, 2: 2})
    assert asked[2:] == [{0: 2, 1: 1, 2: 3}, {0: 1, 1: 2, 2: 3}]


def test_search_takes_smaller_steps_after_four_failures() -> None:
    drops = [64.0 - r for r in range(64)]
    curves = {layer: curve(*drops) * (1 + layer / 100) for layer in range(3)}
    even = dict.fromkeys(curves, 32)
    asked = moves_tried(curves, even, dict.fromkeys(curves, 1), n_step=12)
    steps = [max(abs(n - 32) for n in counts.values()) for counts in asked[2:]]
    assert steps == [4, 4, 4, 4, 2, 2, 2, 2, 1, 1, 1, 1]


def test_search_goes_on_from_the_best() -> None:
    """Every success moves one expert on, and sets the failures back to none."""
    curves = {0: curve(*[1.0] * 40), 1: curve(*[1.1] * 40)}
    asked: list[dict[int, int]] = []

    def trial(counts: Mapping[int, int]) -> float:
        asked.append(dict(counts))
        return abs(counts[0] - 27.0)

    even = {0: 20, 1: 20}
    found = search(curves, even, {0: 4, 1: 4}, trial, n_step=6)
    assert asked[1] == share_out(curves, 40, {0: 4, 1: 4}) == {0: 4, 1: 36}
    assert [counts[0] for counts in asked[2:]] == [18, 22, 24, 26, 28], "what was tried is not tried again"
    assert found == {0: 26, 1: 14}


def test_places_are_the_same_as_by_looking_at_all_layers_for_each() -> None:
    random = torch.Generator().manual_seed(3)
    for n_expert in (5, 16, 33):
        drops = torch.rand(7, n_expert, generator=random, dtype=torch.float64).square()
        drops[drops < 0.1] = 0
        curves = {layer: curve(*row.tolist()) for layer, row in enumerate(drops)}
        floors = dict.fromkeys(curves, 1)
        for n_place in range(7, 7 * n_expert + 1, 11):
            assert share_out(curves, n_place, floors) == one_by_one(curves, n_place, floors)


def one_by_one(curves: Mapping[int, Tensor], n_place: int, floors: Mapping[int, int]) -> dict[int, int]:
    """What `share_out` is defined to do."""
    counts = dict(floors)
    while (free := n_place - sum(counts.values())) > 0:
        gains = []
        for layer, values in curves.items():
            for n_more in range(1, min(free, len(values) - 1 - counts[layer]) + 1):
                gain = float((values[counts[layer]] - values[counts[layer] + n_more]) / n_more)
                gains.append((-gain, layer, n_more))
        _, layer, n_more = min(gains)
        counts[layer] += n_more
    return counts


def test_many_experts_take_no_time() -> None:
    random = torch.Generator().manual_seed(0)
    drops = torch.rand(48, 512, generator=random, dtype=torch.float64).sort(1, descending=True).values
    lost = torch.cat([drops.flip(1).cumsum(1).flip(1), torch.zeros(48, 1, dtype=torch.float64)], 1)
    start = time.process_time()
    counts = share_out(dict(enumerate(lost)), 48 * 256, dict.fromkeys(range(48), 8))
    assert sum(counts.values()) == 48 * 256
    assert time.process_time() - start < 3, "it took 32 s when every place looked at every layer"
