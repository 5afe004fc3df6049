"""Budgets are kept, layers that matter get more, and nothing measured worse than even is taken."""

import time
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from small_layer import LAYER, N_EXPERT, SPEC
from torch import Tensor

from mone_export.artifacts import Calibration
from mone_export.pruning.allocation import error_curves, search, sensitivities, share_out
from mone_export.pruning.damage import relative_error
from mone_export.pruning.planning import plan
from mone_export.pruning.scoring import score
from mone_export.pruning.uncertainty import possible_use

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


def test_places_are_the_same_as_by_looking_at_all_layers_for_each() -> None:
    random = torch.Generator().manual_seed(3)
    for n_expert in (5, 16, 33):
        drops = torch.rand(7, n_expert, generator=random, dtype=torch.float64).square()
        drops[drops < 0.1] = 0
        curves = {layer: curve(*row.tolist()) for layer, row in enumerate(drops)}
        floors = dict.fromkeys(curves, 1)
        for n_place in range(7, 7 * n_expert + 1, 3):
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
