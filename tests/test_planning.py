"""Counts are exact, ties go to the lower id, and what cannot be is refused with the numbers."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from mone_export.artifacts import Calibration, ExpertStats, MoeSpec, Plan, Protected, Scores
from mone_export.errors import MoneError
from mone_export.pruning.allocation import kept_per_layer
from mone_export.pruning.planning import plan, plan_without_scores
from mone_export.recipe import Recipe


def spec(n_expert: int, top_k: int = 2) -> MoeSpec:
    return MoeSpec("TinyForCausalLM", 4, (0, 2, 3), n_expert, top_k, 1, 8, 4)


def planned(values: list[float], ratio: float, **options: Any) -> Plan:
    shape = spec(len(values))
    table = torch.tensor([values] * 3, dtype=torch.float64)
    return plan(Scores(spec=shape, score="mone", values=table), ratio=ratio, **options)


@pytest.mark.parametrize("n_expert", [13, 16, 60, 64, 128])
@pytest.mark.parametrize("percent", [0, 1, 10, 12.5, 20, 25, 30, 33, 40, 50, 60, 62.5, 70, 75, 80])
def test_counts_are_exact_in_every_layer(n_expert: int, percent: float) -> None:
    random = torch.Generator().manual_seed(n_expert)
    # few different values: many ties
    values = torch.randint(0, 4, (3, n_expert), generator=random).double()
    chosen = plan(Scores(spec=spec(n_expert), score="mone", values=values), ratio=percent / 100)
    n_pruned = round(n_expert * percent / 100)
    assert [layer.layer for layer in chosen.layers] == [0, 2, 3]
    for layer, scores in zip(chosen.layers, values, strict=True):
        assert len(layer.pruned) == n_pruned and len(layer.kept) == n_expert - n_pruned
        assert list(layer.kept) == sorted(layer.kept) and list(layer.pruned) == sorted(layer.pruned)
        assert sorted(layer.order) == list(range(n_expert))
        best = sorted(range(n_expert), key=lambda e, s=scores: (-s[e], e))
        assert set(layer.kept) == set(best[: len(layer.kept)])
    assert chosen.share_pruned == n_pruned / n_expert


def test_equal_scores_go_to_the_lower_id() -> None:
    assert planned([1.0] * 8, 0.5).layers[0].kept == (0, 1, 2, 3)
    assert planned([1, 2, 1, 2, 1, 2, 1, 1], 0.5).layers[0].kept == (0, 1, 3, 5)


def test_minus_infinity_goes_first() -> None:
    assert planned([0.0, float("-inf"), -5, 1], 0.25).layers[0].pruned == (1,)


def test_ratio_0_prunes_nothing() -> None:
    assert all(not layer.pruned for layer in planned([1, 2, 3, 4], 0).layers)


def test_plan_says_how_it_was_made() -> None:
    chosen = planned([1, 2, 3, 4], 0.3)
    assert chosen.recipe == Recipe(ratio=0.3, score="mone", allocation="even")
    assert chosen.share_pruned == 0.25, "one of four is what 0.3 gives"


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.0, 1.5, float("nan"), float("inf")])
def test_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(MoneError, match=rf"--ratio {ratio:g} is out of range: .* 0 <= ratio < 1"):
        kept_per_layer(spec(16), Recipe.of(ratio))


@pytest.mark.parametrize("n_expert", [13, 16, 60, 64, 128])
@pytest.mark.parametrize("top_k", [1, 2, 6, 8])
def test_too_few_experts_are_refused_and_the_remedy_works(n_expert: int, top_k: int) -> None:
    shape = spec(n_expert, top_k)
    kept = n_expert - round(0.99 * n_expert)
    if kept >= top_k:
        assert kept_per_layer(shape, Recipe.of(0.99)) == kept
        return
    with pytest.raises(MoneError, match=f"keeps {kept} of {n_expert} experts, fewer than {top_k}") as error:
        kept_per_layer(shape, Recipe.of(0.99))
    ratio = float(str(error.value).partition("pass --ratio ")[2].split()[0])
    assert kept_per_layer(shape, Recipe.of(ratio)) == top_k
    assert "lower --min-kept" in str(error.value)


def test_min_kept_moves_the_floor() -> None:
    assert kept_per_layer(spec(16, top_k=4), Recipe.of(0.9, min_kept=2)) == 2
    assert len(planned([1.0] * 16, 0.9, min_kept=1).layers[0].kept) == 2
    with pytest.raises(MoneError, match="keeps 8 of 16 experts, fewer than 10: pass --ratio 0.375 or less"):
        kept_per_layer(spec(16), Recipe.of(0.5, min_kept=10))


def test_more_than_there_are_cannot_be_kept() -> None:
    with pytest.raises(MoneError, match="--min-kept 17 is more than the 16 experts of a layer: pass 16 or"):
        kept_per_layer(spec(16), Recipe.of(0.5, min_kept=17))


@pytest.mark.parametrize("min_kept", [0, -3])
def test_fewer_than_one_expert_cannot_be_asked_for(min_kept: int) -> None:
    with pytest.raises(MoneError, match=f"--min-kept {min_kept} is out of range"):
        kept_per_layer(spec(16), Recipe.of(0.99, min_kept=min_kept))


def test_routing_by_groups_cannot_lose_experts() -> None:
    with pytest.raises(MoneError, match="--method drop .* by 4 groups .* use --method mone"):
        kept_per_layer(replace(spec(16), n_group=4), Recipe.of(0.5, method="drop"))


def test_a_router_needs_as_many_experts_as_it_selects() -> None:
    shape = spec(16, top_k=4)
    with pytest.raises(MoneError, match="--min-kept 3 with --method drop: .* pass 4 or more"):
        kept_per_layer(shape, Recipe.of(0.8, min_kept=3, method="drop"))
    assert kept_per_layer(shape, Recipe.of(0.75, min_kept=4, method="drop")) == 4
    assert kept_per_layer(shape, Recipe.of(0.8, min_kept=3)) == 3, "a novice is selected like an expert"


def over_model(values: list[list[float]], ratio: float, **options: int) -> list[int]:
    """How many experts each layer keeps when all compete."""
    table = torch.tensor(values, dtype=torch.float64)
    chosen = plan(
        Scores(spec=spec(len(values[0])), score="mone", values=table),
        ratio=ratio,
        allocation="model",
        **options,
    )
    assert chosen.recipe.allocation == "model"
    return [len(layer.kept) for layer in chosen.layers]


def test_layers_compete_relative_to_their_own_mean() -> None:
    even, uneven = [4.0, 4, 4, 4, 4, 4, 4, 4], [9.0, 9, 9, 1, 1, 1, 1, 1]
    assert over_model([even, uneven, even], 0.5) == [5, 3, 4], (
        "12 places: 3 above 1, then ties by layer and place"
    )
    assert over_model([even, [value * 1000 for value in uneven], even], 0.5) == [5, 3, 4]


def test_no_layer_falls_below_the_floor() -> None:
    flat, steep = [1.0] * 8, [1e6] + [0.0] * 7
    assert over_model([flat, steep, flat], 0.5) == [5, 2, 5]
    assert over_model([flat, steep, flat], 0.5, min_kept=1) == [6, 1, 5]
    assert sum(over_model([flat, steep, flat], 0.625)) == 9


def test_experts_never_seen_and_guarded_ones_compete_too() -> None:
    row = [float("inf"), 5, 1, 1, 1, 1, float("-inf"), float("-inf")]
    assert over_model([row, row, row], 0.5) == [4, 4, 4]
    assert over_model([row, row, row], 0.25) == [6, 6, 6]


@pytest.mark.parametrize("method", ["drop", "dern"])
def test_ordinary_files_have_one_count(method: str) -> None:
    with pytest.raises(MoneError, match=f"--method {method} keeps the same .* --allocate model does not"):
        planned([1.0] * 8, 0.5, method=method, allocation="model")


def test_plan_without_scores_has_the_counts_of_the_real_one() -> None:
    blank = plan_without_scores(spec(13), Recipe.of(0.4))
    assert [len(layer.kept) for layer in blank.layers] == [8, 8, 8]
    assert (blank.spec, blank.recipe, blank.protected) == (spec(13), Recipe.of(0.4), ())
    assert blank.layers[0].kept == tuple(range(8)), "the lowest ids: no score says otherwise"


def test_a_plan_remembers_what_had_to_stay() -> None:
    held = Protected("rare.txt", 1, "sha", 40, {0: (3,), 2: (3,), 3: (3,)})
    table = torch.tensor([[1, 2, 3, float("inf")]] * 3, dtype=torch.float64)
    scores = Scores(spec=spec(4), score="mone", values=table, protected=(held,))
    assert plan(scores, ratio=0.5).protected == (held,)
    lost = Scores(spec=spec(4), score="mone", values=-table, protected=(held,))
    with pytest.raises(
        MoneError, match="layer 0 keeps 2 experts, 1 fewer than must stay with --protect rare"
    ):
        plan(lost, ratio=0.5)


def test_thin_experts_are_planned_elsewhere() -> None:
    with pytest.raises(MoneError) as error:
        planned([1.0] * 8, 0.5, novice="thin")
    assert str(error.value) == "thin experts are fitted to a text: plan them with mone_export.plan_thin"
    assert planned([1.0] * 8, 0, novice="thin").recipe.novice == "thin", "nothing is thin where all stay"


def test_every_layer_must_have_its_scores() -> None:
    table = torch.ones(2, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="zip"):
        plan(Scores(spec=spec(8), score="mone", values=table), ratio=0.5)


@pytest.mark.parametrize("measured", [{}, {0: 1.0, 2: 5.0, 3: 1.0}])
def test_layers_share_out_by_sensitivity_where_it_was_measured(
    measured: dict[int, float], caplog: pytest.LogCaptureFixture
) -> None:
    stats = ExpertStats.empty(8, 8)
    one = torch.ones(8, dtype=torch.float64)
    stats = replace(
        stats, n_token=16, count=one.long() * 4, weight=one * 4, gated2_norm_sq_sum=one, gate_sq_sum=one
    )
    found = Calibration(spec(8), "", "", "", 16, dict.fromkeys((0, 2, 3), stats), sensitivity=measured)
    values = torch.arange(24, dtype=torch.float64).reshape(3, 8)
    chosen = plan(Scores(spec=spec(8), score="mone", values=values, calibration=found), ratio=0.5)
    assert chosen.recipe == Recipe.of(0.5, score="mone", allocation=None if measured else "even")
    assert list(chosen.n_kept.values()) == ([2, 8, 2] if measured else [4, 4, 4])
    told = [record.getMessage() for record in caplog.records]
    assert told == (
        []
        if measured
        else [
            "these statistics lack the layers' sensitivities, so every layer keeps the same number of "
            "experts: calibrate again for better counts"
        ]
    )


def test_counts_may_be_given() -> None:
    table = torch.arange(24, dtype=torch.float64).reshape(3, 8)
    chosen = plan(Scores(spec=spec(8), score="mone", values=table), {0: 1, 2: 8, 3: 3}, ratio=0.5)
    assert chosen.n_kept == {0: 1, 2: 8, 3: 3}
    assert chosen.layers[0].kept == (7,) and chosen.layers[0].pruned == tuple(range(7))


BEFORE = replace(spec(8), kept_before=(8, 4, 2))


def test_a_second_ratio_is_a_share_of_what_is_left() -> None:
    blank = plan_without_scores(BEFORE, Recipe.of(0.5, min_kept=1))
    assert blank.n_kept == {0: 4, 2: 2, 3: 1}
    assert plan_without_scores(BEFORE, Recipe.of(0)).n_kept == {0: 8, 2: 4, 3: 2}
    with pytest.raises(MoneError) as error:
        plan_without_scores(BEFORE, Recipe.of(0.6, min_kept=2))
    assert str(error.value) == (
        "--ratio 0.6 keeps 1 of the 2 experts that layer 3 has left, fewer than 2: pass a smaller one, or "
        "lower --min-kept (2 experts are used per token)"
    )
    one = replace(BEFORE, kept_before=(8, 4, 1))
    assert plan_without_scores(one, Recipe.of(0.25, min_kept=3)).n_kept == {0: 6, 2: 3, 3: 1}, (
        "no more are left"
    )
    assert plan_without_scores(one, Recipe.of(0.0)).n_kept == {0: 8, 2: 4, 3: 1}


def test_all_experts_may_be_asked_for() -> None:
    assert kept_per_layer(spec(16), Recipe.of(0, min_kept=16)) == 16
    with pytest.raises(MoneError) as error:
        kept_per_layer(spec(16), Recipe.of(0, min_kept=17))
    assert str(error.value) == "--min-kept 17 is more than the 16 experts of a layer: pass 16 or less"


def test_the_method_says_which_groups_and_numbers_are_in_its_way() -> None:
    with pytest.raises(MoneError) as error:
        kept_per_layer(replace(spec(16), n_group=2), Recipe.of(0.5, method="drop"))
    assert str(error.value) == (
        "--method drop takes experts out of the router, but TinyForCausalLM selects by 2 groups of experts "
        "numbered in sequence: use --method mone"
    )
    with pytest.raises(MoneError) as error:
        kept_per_layer(spec(16, top_k=4), Recipe.of(0.8, min_kept=3, method="drop"))
    assert str(error.value) == (
        "--min-kept 3 with --method drop: the router selects 4 experts for each token and needs that many to "
        "choose from: pass 4 or more, or use --method mone"
    )
    assert kept_per_layer(replace(spec(16), n_group=2), Recipe.of(0, method="drop")) == 16, "all stay"


def test_a_layer_without_finite_scores_competes_by_place() -> None:
    never, one = [float("-inf")] * 8, [float("-inf")] * 6 + [2.0, 1.0]
    assert over_model([never, one, [1.0] * 8], 0.5, min_kept=1) == [1, 2, 8]
    zeros = [0.0] * 8
    assert over_model([zeros, [-1.0] * 8, [1.0] * 8], 0.5, min_kept=1) == [3, 1, 8]


GROUPED = replace(
    spec(8), n_group=4, topk_group=2, top_k=3
)  # two experts each, so that two groups hold three


def in_groups(values: list[float], ratio: float, **options: int) -> tuple[int, ...]:
    table = torch.tensor([values] * 3, dtype=torch.float64)
    return plan(Scores(spec=GROUPED, score="mone", values=table), ratio=ratio, **options).layers[0].kept


def test_any_choice_of_groups_holds_enough_experts() -> None:
    wide = replace(spec(12, top_k=2), n_group=3, topk_group=2)  # one of four in each group
    table = torch.arange(36, dtype=torch.float64).reshape(3, 12)
    for layer in plan(Scores(spec=wide, score="mone", values=table), ratio=0.5).layers:
        assert layer.kept == (3, 7, 8, 9, 10, 11), "the best of each group, then the best of all"
    for layer in plan(Scores(spec=wide, score="mone", values=table), ratio=0.75).layers:
        assert layer.kept == (3, 7, 11)


def test_ratio_that_leaves_groups_short_is_refused() -> None:
    assert in_groups([1.0] * 8, 0) == tuple(range(8))
    with pytest.raises(
        MoneError, match=r"fewer than 8: pass --ratio 0 .*\(3 experts of 2 of 4 groups are used"
    ):
        in_groups([1.0] * 8, 0.25)


def test_min_kept_allows_groups_to_run_short() -> None:
    assert in_groups([8, 7, 6, 5, 4, 3, 2, 1], 0.5, min_kept=4) == (0, 2, 4, 6), (
        "still shared among the groups"
    )
    assert in_groups([8, 7, 6, 5, 4, 3, 2, 1], 0.625, min_kept=2) == (0, 1, 2)
