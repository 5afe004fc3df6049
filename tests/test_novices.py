"""Every novice against its formula, and what makes it the best stand-in of its kind."""

import pytest
import torch
from small_layer import LAYER, N_EXPERT, N_TOKEN, WIDTH, Layer
from torch import Tensor

from mone_export.errors import MoneError
from mone_export.pruning.novices import NOVICES, novices
from mone_export.pruning.scoring import SCORES

SEEN = [e for e in range(N_EXPERT) if len(LAYER.gates[e])]


def weighted(power: int, e: int) -> Tensor:
    """Mean of an expert's outputs, weighted by g to a power."""
    g = LAYER.gates[e] ** power
    return sum(g[t] * LAYER.outputs[e][t] for t in range(len(g))) / g.sum()


FORMULAS = {
    "mean": lambda e: weighted(0, e),
    "gate-weighted": lambda e: weighted(1, e),
    "least-squares": lambda e: weighted(2, e),
    "zero": lambda e: torch.zeros(WIDTH, dtype=torch.float64),
}


def layer_error(novice: Tensor, e: int) -> float:
    """The sum over tokens of g^2 ||f - novice||^2."""
    return float((LAYER.gates[e][:, None] * (LAYER.outputs[e] - novice)).square().sum())


def test_every_novice_has_a_formula_here() -> None:
    assert FORMULAS.keys() == NOVICES.keys()


@pytest.mark.parametrize("name", FORMULAS)
def test_novice_is_its_formula(name: str) -> None:
    vectors = novices(LAYER.stats(), name)
    assert vectors.dtype == torch.float64 and vectors.shape == (N_EXPERT, WIDTH)
    for e in SEEN:
        torch.testing.assert_close(vectors[e], FORMULAS[name](e), rtol=1e-12, atol=1e-14)


def test_least_squares_is_the_default() -> None:
    assert torch.equal(novices(LAYER.stats()), novices(LAYER.stats(), "least-squares"))


@pytest.mark.parametrize("name", ["mean", "gate-weighted", "least-squares"])
def test_expert_never_selected_gets_the_gate_weighted_mean_of_the_layer(name: str) -> None:
    gates, outputs = torch.cat(LAYER.gates), torch.cat(LAYER.outputs)
    wanted = (gates[:, None] * outputs).sum(0) / gates.sum()
    torch.testing.assert_close(novices(LAYER.stats(), name)[LAYER.unseen], wanted, rtol=1e-12, atol=0)


def test_zero_is_zero_for_experts_never_selected_too() -> None:
    assert not novices(LAYER.stats(), "zero").any()


@pytest.mark.parametrize("e", SEEN)
def test_least_squares_leaves_the_least_error(e: int) -> None:
    best = novices(LAYER.stats(), "least-squares")[e]
    least = layer_error(best, e)
    random = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-1, 1):
        for _ in range(20):
            step = size * torch.randn(WIDTH, dtype=torch.float64, generator=random)
            assert layer_error(best + step, e) > least
    for other in FORMULAS:
        assert layer_error(novices(LAYER.stats(), other)[e], e) >= least * (1 - 1e-12)


@pytest.mark.parametrize("e", SEEN)
def test_error_score_is_what_least_squares_leaves_where_an_expert_is_used_most(e: int) -> None:
    n_seen = int(LAYER.stats().count[e])
    left = layer_error(novices(LAYER.stats(), "least-squares")[e], e) / N_TOKEN
    left *= (n_seen**0.5 + 7) ** 2 / n_seen
    assert SCORES["error"].function(LAYER.stats())[e].item() == pytest.approx(left, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("e", SEEN)
def test_gate_weighted_keeps_the_mean_of_the_layers_output(e: int) -> None:
    g, f = LAYER.gates[e][:, None], LAYER.outputs[e]
    kept = (g * novices(LAYER.stats(), "gate-weighted")[e]).sum(0)
    torch.testing.assert_close(kept, (g * f).sum(0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NOVICES)
def test_layer_without_any_token_has_finite_novices(name: str) -> None:
    assert torch.isfinite(novices(Layer(counts=(0,) * N_EXPERT).stats(), name)).all()


def test_unknown_novice_is_refused_with_the_choices() -> None:
    with pytest.raises(MoneError, match=r"unknown novice magic: choose from mean, .*zero"):
        novices(LAYER.stats(), "magic")
