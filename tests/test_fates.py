"""Budgets of channels are kept, and spent about as well as any choice could."""

from itertools import product
from statistics import median

import numpy as np
import pytest
import torch

from mone_export.artifacts import Calibration, ExpertStats, MoeSpec, Plan, Scores
from mone_export.calibration.sums import expert_stats
from mone_export.errors import MoneError
from mone_export.pruning.fates import N_TIER, plan_fates
from mone_export.pruning.uncertainty import possible_use
from mone_export.recipe import Recipe

SIZE, WIDTHS = 8, (0, 2, 4, 6, 8)


def spec_of(n_layer: int, n_expert: int, top_k: int = 2, n_group: int = 1) -> MoeSpec:
    return MoeSpec(
        "TinyForCausalLM", n_layer, tuple(range(n_layer)), n_expert, top_k, n_group, 4, SIZE, topk_group=1
    )


def stats_of(n_expert: int) -> ExpertStats:
    """All experts are seen in as many tokens."""
    outputs = torch.randn(10 * n_expert, 4, generator=torch.Generator().manual_seed(0))
    counts = torch.full((n_expert,), 10)
    return expert_stats(outputs, torch.ones(len(outputs)), counts, n_token=100)


def planned(
    errors: dict[int, np.ndarray],
    spec: MoeSpec,
    ratio: float,
    values: torch.Tensor | None = None,
    **more: int,
) -> Plan:
    layers = {layer: stats_of(spec.n_expert) for layer in spec.moe_layers}
    calibration = Calibration(spec, "", "", "", 100, layers)
    if values is None:
        values = torch.zeros(len(spec.moe_layers), spec.n_expert, dtype=torch.float64)
    scores = Scores(spec, "error", values, calibration)
    return plan_fates(scores, errors, WIDTHS, Recipe.of(ratio, novice="thin", **more))


def random_errors(spec: MoeSpec, seed: int) -> dict[int, np.ndarray]:
    """Errors that fall with the width, of experts that differ by orders of magnitude."""
    rng = np.random.default_rng(seed)
    found = {}
    for layer in spec.moe_layers:
        falls = rng.random((spec.n_expert, len(WIDTHS) - 1)) * 10 ** rng.normal(size=(spec.n_expert, 1))
        found[layer] = np.append(falls[:, ::-1].cumsum(1)[:, ::-1], np.zeros((spec.n_expert, 1)), axis=1)
    return found


def width_of(plan: Plan, layer: int) -> list[int]:
    at = plan.layers[layer]
    widths = dict.fromkeys(at.kept, SIZE) | dict.fromkeys(at.pruned, 0)
    for tier in at.tiers:
        widths |= dict.fromkeys(tier.experts, tier.width)
    return [widths[expert] for expert in range(plan.spec.n_expert)]


def total_of(errors: dict[int, np.ndarray], plan: Plan) -> float:
    return sum(
        float(errors[layer][expert, WIDTHS.index(width)])
        for layer in errors
        for expert, width in enumerate(width_of(plan, layer))
    )


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("seed", range(5))
def test_the_budget_is_kept_and_spent(ratio: float, seed: int) -> None:
    spec = spec_of(4, 16)
    plan = planned(random_errors(spec, seed), spec, ratio)
    used = sum(sum(width_of(plan, layer)) for layer in spec.moe_layers)
    budget = 4 * (16 - round(16 * ratio)) * SIZE
    assert budget - 2 * SIZE < used <= budget
    assert plan.share_pruned == pytest.approx(1 - used / (4 * 16 * SIZE))
    for layer in plan.layers:
        assert sorted(layer.order) == [*range(16)]
        assert len(layer.tiers) <= N_TIER
        assert [tier.width for tier in layer.tiers] == sorted({t.width for t in layer.tiers}, reverse=True)
        assert layer.kept, "a layer has a whole expert at least"
    assert plan.n_tier == max(len(layer.tiers) for layer in plan.layers)


def test_close_to_the_best_of_all_choices() -> None:
    """As far as one price for all can be, where five experts leave little to choose from."""
    spec, times = spec_of(1, 5, top_k=1), []
    for seed in range(12):
        errors = random_errors(spec, seed)
        best = min(
            sum(errors[0][expert, fate] for expert, fate in enumerate(fates))
            for fates in product(range(len(WIDTHS)), repeat=5)
            if sum(WIDTHS[fate] for fate in fates) <= 3 * SIZE
            and len({*fates} - {0, 4}) <= N_TIER
            and 4 in fates
        )
        times.append(total_of(errors, planned(errors, spec, 0.4)) / best)
    print(sorted(times))
    assert min(times) >= 1 - 1e-9
    assert median(times) < 1.1
    assert max(times) < 5


def test_experts_that_are_seen_rarely_count_more() -> None:
    spec = spec_of(1, 4, top_k=1)
    errors = {0: np.tile([8.0, 6, 4, 2, 0], (4, 1))}
    layers = {0: stats_of(4)}
    rare = layers[0].to("cpu")
    rare.count[2] = 1
    calibration = Calibration(spec, "", "", "", 100, {0: rare})
    assert possible_use(rare)[2] > possible_use(rare)[0]
    scores = Scores(spec, "error", torch.zeros(1, 4, dtype=torch.float64), calibration)
    plan = plan_fates(scores, errors, WIDTHS, Recipe.of(0.75, novice="thin"))
    assert plan.layers[0].kept == (2,)


def test_guarded_experts_stay_whole() -> None:
    spec = spec_of(2, 8)
    values = torch.zeros(2, 8, dtype=torch.float64)
    values[1, 3] = torch.inf
    errors = random_errors(spec, 0)
    errors[1][3] = 0  # nothing else speaks for it
    assert 3 in planned(errors, spec, 0.75, values).layers[1].kept
    assert 3 not in planned(errors, spec, 0.75).layers[1].kept


def test_as_many_experts_as_a_token_uses_have_channels() -> None:
    spec = spec_of(2, 8, top_k=3)
    errors = {0: np.zeros((8, 5)), 1: np.tile([8.0, 6, 4, 2, 0], (8, 1))}
    plan = planned(errors, spec, 0.5)
    assert sum(width > 0 for width in width_of(plan, 0)) >= 3
    assert sum(width > 0 for width in width_of(planned(errors, spec, 0.5, min_kept=1), 0)) == 1


def test_every_group_keeps_experts_with_channels() -> None:
    spec = spec_of(1, 8, top_k=2, n_group=2)
    errors = {0: np.tile([8.0, 6, 4, 2, 0], (8, 1))}
    errors[0][4:] = 0  # a group that costs nothing
    widths = width_of(planned(errors, spec, 0.5), 0)
    assert sum(width > 0 for width in widths[4:]) >= 2


def test_what_must_stay_has_to_fit_the_budget() -> None:
    spec = spec_of(1, 8, top_k=1)
    values = torch.full((1, 8), torch.inf, dtype=torch.float64)
    with pytest.raises(MoneError, match="take more than the ratio leaves"):
        planned(random_errors(spec, 0), spec, 0.5, values)
