"""Every score against its formula, from explicit outputs and plain loops."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from small_layer import LAYER, N_EXPERT, N_TOKEN, SPEC, Layer

from mone_export.artifacts import Calibration
from mone_export.errors import MoneError
from mone_export.planning import plan
from mone_export.scoring import SCORE_NAMES, SCORES, score, standard_deviation


def deviation(layer: Layer, e: int) -> float:
    """Root of the sum over channels of the sample variance; the layer's median for a single token."""

    def known(expert: int) -> float:
        return math.sqrt(sum(float(channel.var(unbiased=True)) for channel in layer.outputs[expert].T))

    if len(layer.outputs[e]) > 1:
        return known(e)
    values = sorted(known(other) for other in range(N_EXPERT) if len(layer.outputs[other]) > 1)
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2


def error_left(layer: Layer, e: int) -> float:
    """The least of sum g^2 ||f - N||^2 over all N, per token of the layer, by solving for N."""
    g, f = layer.gates[e], layer.outputs[e]
    novice = torch.linalg.lstsq(g[:, None], g[:, None] * f).solution
    return float((g[:, None] * (f - novice)).square().sum()) / N_TOKEN


def norms(layer: Layer, e: int) -> list[float]:
    return [math.sqrt(sum(float(x) ** 2 for x in f)) for f in layer.outputs[e]]


FORMULAS: dict[str, Callable[[Layer, int], float]] = {
    "mone": lambda layer, e: float(layer.gates[e].sum()) / N_TOKEN * deviation(layer, e),
    "mone-paper": lambda layer, e: float(layer.gates[e].mean()) * deviation(layer, e),
    "frequency": lambda layer, e: len(layer.gates[e]),
    "gate": lambda layer, e: float(layer.gates[e].sum()),
    "variance": deviation,
    "ean": lambda layer, e: sum(norms(layer, e)),
    "reap": lambda layer, e: (
        sum(float(g) * norm for g, norm in zip(layer.gates[e], norms(layer, e), strict=True))
        / len(layer.gates[e])
    ),
    "man": lambda layer, e: sum(norms(layer, e)) / len(layer.gates[e]),
    "msan": lambda layer, e: sum(norm**2 for norm in norms(layer, e)) / len(layer.gates[e]),
    "error": error_left,
}


def calibration(*layers: Layer) -> Calibration:
    return Calibration(
        spec=replace(SPEC, moe_layers=tuple(range(1, 1 + len(layers)))),
        model_sha256="",
        corpus_sha256="",
        corpus_name="",
        n_token=N_TOKEN,
        layers={number: layer.stats() for number, layer in enumerate(layers, start=1)},
    )


def test_every_score_has_a_formula_here() -> None:
    assert FORMULAS.keys() == SCORES.keys()
    assert (*SCORES, "random") == SCORE_NAMES


@pytest.mark.parametrize("name", FORMULAS)
def test_score_is_its_formula(name: str) -> None:
    scores = score(calibration(LAYER), name)
    assert scores.values.dtype == torch.float64 and scores.values.shape == (1, N_EXPERT)
    for e in range(N_EXPERT):
        n = len(LAYER.gates[e])
        wanted = FORMULAS[name](LAYER, e) if n else -math.inf
        assert scores.values[0, e].item() == pytest.approx(wanted, rel=1e-9, abs=1e-15), (
            f"expert {e}, n = {n}"
        )


@pytest.mark.parametrize("name", FORMULAS)
def test_expert_never_selected_is_pruned_first(name: str) -> None:
    chosen = plan(score(calibration(LAYER), name), ratio=1 / N_EXPERT)
    assert chosen.layers[0].pruned == (LAYER.unseen,)


def test_single_token_gets_the_median_of_an_even_number_too() -> None:
    layer = Layer(counts=(9, 8, 1, 7, 6, 0))
    known = sorted(deviation(layer, e) for e in (0, 1, 3, 4))
    assert standard_deviation(layer.stats())[2].item() == pytest.approx((known[1] + known[2]) / 2, rel=1e-12)


def test_layer_of_single_tokens_has_finite_scores() -> None:
    layer = Layer(counts=(1, 1, 1, 0, 0, 0))
    for name in SCORE_NAMES:
        values = score(calibration(layer), name).values[0]
        assert torch.isfinite(values[:3]).all() and not values.isnan().any()


def test_random_follows_its_seed() -> None:
    saved = calibration(LAYER, LAYER)
    first, again, other = (score(saved, "random", seed=seed).values for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1]), "layers differ"


def test_seed_changes_no_other_score() -> None:
    saved = calibration(LAYER)
    for name in SCORES:
        assert torch.equal(score(saved, name, seed=1).values, score(saved, name, seed=2).values)


def test_layers_stand_in_the_order_of_the_spec() -> None:
    other = Layer(counts=(3, 4, 5, 6, 7, 8))
    values = score(calibration(LAYER, other), "frequency").values
    assert values[1].tolist() == [3, 4, 5, 6, 7, 8]


def test_unknown_score_is_refused_with_the_choices() -> None:
    with pytest.raises(MoneError, match=r"unknown score magic: choose from mone, .*random"):
        score(calibration(LAYER), "magic")
