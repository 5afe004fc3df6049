"""Experts of extreme outputs are found, and stay whatever their score."""

from dataclasses import replace

import torch
from small_layer import N_EXPERT, SPEC, Layer

from mone_export.artifacts import Calibration
from mone_export.pruning.guard import FACTOR, guard, super_experts
from mone_export.pruning.planning import plan
from mone_export.pruning.scoring import score


def calibration(*magnitudes: list[float]) -> Calibration:
    stats = Layer(counts=(12, 7, 5, 20, 0, 3)).stats()
    layers = {
        number: replace(stats, max_abs=torch.tensor(values).double())
        for number, values in enumerate(magnitudes, start=1)
    }
    spec = replace(SPEC, moe_layers=tuple(layers))
    return Calibration(spec, "", "", "", 40, layers)


USUAL = [1.0, 2, 3, 2, 0, 4]


def test_an_extreme_expert_is_found() -> None:
    extreme = [1.0, 2, 3, 2, 0, FACTOR * 2.1]
    assert super_experts(calibration(USUAL, extreme)) == {2: (5,)}
    assert super_experts(calibration(USUAL, USUAL)) == {}


def test_layers_of_small_outputs_need_the_models_scale_too() -> None:
    """In a layer of tiny outputs a usual one is no super expert."""
    small = [0.01, 0.02, 0.03, 0.02, 0, 4]
    assert super_experts(calibration(USUAL, small, USUAL)) == {}
    large = [100.0, 200, 300, 200, 0, 400]
    assert super_experts(calibration(USUAL, USUAL, large)) == {}, "nor in one of large ones"


def test_a_guarded_expert_stays_though_its_score_is_the_lowest() -> None:
    found = calibration([1.0, 2, 3, 2, 0, 99])
    scores = score(found, "frequency", guarded=False)
    assert plan(scores, ratio=0.5).layers[0].pruned == (2, 4, 5)
    assert plan(guard(scores, found), ratio=0.5).layers[0].pruned == (1, 2, 4)
    assert plan(score(found, "frequency"), ratio=0.5).layers[0].pruned == (1, 2, 4), "the default"
    assert plan(guard(scores, found), ratio=4 / N_EXPERT).layers[0].kept == (3, 5)
    assert torch.equal(score(found, "frequency", guarded=False).values, scores.values), (
        "the scores themselves stay"
    )
