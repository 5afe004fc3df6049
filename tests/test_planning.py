"""Counts are exact, ties go to the lower id, and what cannot be is refused with the numbers."""

import pytest
import torch

from mone_export.artifacts import MoeSpec, Plan, Scores
from mone_export.errors import MoneError
from mone_export.planning import kept_per_layer, plan, plan_without_scores


def spec(n_expert: int, top_k: int = 2) -> MoeSpec:
    return MoeSpec("TinyForCausalLM", 4, (0, 2, 3), n_expert, top_k, 1, 8, 4)


def planned(values: list[float], ratio: float, **options: int) -> Plan:
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
    assert (chosen.method, chosen.score, chosen.ratio, chosen.scope) == ("mone", "mone", 0.3, "layer")
    assert chosen.share_pruned == 0.25, "one of four is what 0.3 gives"


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.0, 1.5, float("nan"), float("inf")])
def test_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(MoneError, match=rf"--ratio {ratio:g} is out of range: .* 0 <= ratio < 1"):
        kept_per_layer(spec(16), ratio)


@pytest.mark.parametrize("n_expert", [13, 16, 60, 64, 128])
@pytest.mark.parametrize("top_k", [1, 2, 6, 8])
def test_too_few_experts_are_refused_and_the_remedy_works(n_expert: int, top_k: int) -> None:
    shape = spec(n_expert, top_k)
    kept = n_expert - round(0.99 * n_expert)
    if kept >= top_k:
        assert kept_per_layer(shape, 0.99) == kept
        return
    with pytest.raises(MoneError, match=f"keeps {kept} of {n_expert} experts, fewer than {top_k}") as error:
        kept_per_layer(shape, 0.99)
    ratio = float(str(error.value).partition("pass --ratio ")[2].split()[0])
    assert kept_per_layer(shape, ratio) == top_k
    assert "lower --min-kept" in str(error.value)


def test_min_kept_moves_the_floor() -> None:
    assert kept_per_layer(spec(16, top_k=4), 0.9, min_kept=2) == 2
    assert len(planned([1.0] * 16, 0.9, min_kept=1).layers[0].kept) == 2
    with pytest.raises(MoneError, match="keeps 8 of 16 experts, fewer than 10: pass --ratio 0.375 or less"):
        kept_per_layer(spec(16), 0.5, min_kept=10)


def test_more_than_there_are_cannot_be_kept() -> None:
    with pytest.raises(MoneError, match="--min-kept 17 is more than the 16 experts of a layer: pass 16 or"):
        kept_per_layer(spec(16), 0.5, min_kept=17)


@pytest.mark.parametrize("min_kept", [0, -3])
def test_fewer_than_one_expert_cannot_be_asked_for(min_kept: int) -> None:
    with pytest.raises(MoneError, match="keeps 0 of 16 experts, fewer than 1"):
        kept_per_layer(spec(16), 0.99, min_kept=min_kept)


def test_plan_without_scores_has_the_counts_of_the_real_one() -> None:
    blank = plan_without_scores(spec(13), ratio=0.4)
    assert [len(layer.kept) for layer in blank.layers] == [8, 8, 8]
