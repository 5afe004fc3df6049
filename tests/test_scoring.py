"""Every score against its formula, from explicit outputs and plain loops."""

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_layer import LAYER, N_EXPERT, N_TOKEN, SPEC, Layer
from tiny import random_model

from mone_export.artifacts import Calibration
from mone_export.calibration.sums import expert_stats
from mone_export.errors import MoneError
from mone_export.pruning.planning import plan
from mone_export.pruning.scoring import (
    SCORE_NAMES,
    SCORES,
    random_scores,
    score,
    score_weights,
    standard_deviation,
)
from mone_export.pruning.uncertainty import MARGIN
from mone_export.source.shape import expert_modules


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
    """The least of sum g^2 ||f - N||^2 over all N, per token of the layer, by solving for N.

    Each of the expert's n tokens counts as often as it does if (sqrt(n) + MARGIN)^2 of them come.
    """
    g, f = layer.gates[e], layer.outputs[e]
    novice = torch.linalg.lstsq(g[:, None], g[:, None] * f).solution
    times = (math.sqrt(len(g)) + MARGIN) ** 2 / len(g)
    return times * float((g[:, None] * (f - novice)).square().sum()) / N_TOKEN


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
    assert (*SCORES, "random", "aimer") == SCORE_NAMES


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
    for name in (*SCORES, "random"):
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


def reference_fluctuation(batches: list[torch.Tensor]) -> torch.Tensor:
    """The running variance as MoNE's reference code has it, per channel.

    Nothing is added for an expert's first batch; every later batch of m tokens, after n, gives
    V <- V (n - 1) / (n + m - 1) + sum (f - new mean)^2 / (n + m). Written anew from the formula.
    """
    n, mean, fluctuation = (
        0,
        torch.zeros(batches[0].shape[1]).double(),
        torch.zeros(batches[0].shape[1]).double(),
    )
    for f in batches:
        m = len(f)
        mean = (n * mean + f.sum(0)) / (n + m)
        if n > 0:
            fluctuation = fluctuation * (n - 1) / (n + m - 1) + (f - mean).square().sum(0) / (n + m)
        n += m
    return fluctuation


def test_the_reference_agrees_where_every_expert_is_in_every_batch() -> None:
    """Its first batch is missing for all experts alike: the same ranking, and nearly the same values."""
    n_batch, n_row, random = 50, 20, torch.Generator().manual_seed(1)
    outputs = [
        torch.randn(n_batch * n_row, 8, dtype=torch.float64, generator=random) * (1 + e / 3) for e in range(6)
    ]
    gates = [torch.rand(n_batch * n_row, dtype=torch.float64, generator=random) for _ in outputs]
    stats = expert_stats(
        torch.cat(outputs), torch.cat(gates), torch.tensor([n_batch * n_row] * 6), n_token=n_batch * n_row
    )
    exact = SCORES["mone"].function(stats)
    reference = torch.stack(
        [
            g.sum() / len(g) * reference_fluctuation(list(f.split(n_row))).sum().sqrt()
            for f, g in zip(outputs, gates, strict=True)
        ]
    )
    assert exact.argsort().tolist() == reference.argsort().tolist()
    share = (reference / exact).square() * n_batch / (n_batch - 1)
    torch.testing.assert_close(share, torch.ones_like(share), rtol=0.02, atol=0)


@pytest.mark.parametrize(("n_batch", "share"), [(1, 0), (2, 1 / 2), (4, 3 / 4)])
def test_the_reference_parts_where_an_expert_is_in_few_batches(n_batch: int, share: float) -> None:
    """One batch of the n is never counted: an expert seen in one only has no variance and goes first."""
    random = torch.Generator().manual_seed(2)
    f = torch.randn(400, 8, dtype=torch.float64, generator=random)
    stats = expert_stats(f, torch.ones(400).double(), torch.tensor([400]), n_token=400)
    exact = float(standard_deviation(stats)[0]) ** 2
    assert exact == pytest.approx(float(f.var(0).sum()), rel=1e-9)
    reference = float(reference_fluctuation(list(f.split(400 // n_batch))).sum())
    assert reference / exact == pytest.approx(share, abs=0.02)


def test_the_reference_misses_what_differs_between_batches() -> None:
    """Batches of different means: each is compared with the mean so far, never with the final one."""
    early, late = torch.zeros(100, 4).double(), torch.full((100, 4), 2.0).double()
    exact = float(torch.cat([early, late]).var(0, unbiased=False).sum())  # 4 channels of variance 1
    assert exact == pytest.approx(4)
    assert float(reference_fluctuation([early, late]).sum()) == pytest.approx(2), "half of it"
    assert float(reference_fluctuation([torch.cat([early, late])]).sum()) == 0


def test_aimer_is_its_formula() -> None:
    module = random_model("MixtralForCausalLM", 100)
    spec = replace(SPEC, moe_layers=(0, 1, 2), n_expert=16)
    found = score_weights(spec, expert_modules(module))
    assert found.score == "aimer" and found.values.shape == (3, 16)
    layer = module.model.layers[1].mlp.experts
    for e in range(16):
        w = torch.cat([layer.gate_up_proj[e].flatten(), layer.down_proj[e].flatten()]).double()
        wanted = -w.abs().mean() / w.square().mean().sqrt()
        assert found.values[1, e].item() == pytest.approx(wanted.item(), rel=1e-9)


def test_aimer_leaves_the_weights_alone() -> None:
    module = random_model("MixtralForCausalLM", 100).double()
    before = copy.deepcopy(module.state_dict())
    score_weights(replace(SPEC, moe_layers=(0, 1, 2), n_expert=16), expert_modules(module))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("n_expert", [1, 64])
def test_aimer_needs_no_copy_of_the_experts(n_expert: int) -> None:
    program = f"""
import pathlib, re, torch
from types import SimpleNamespace
from mone_export.artifacts import MoeSpec
from mone_export.pruning.scoring import score_weights
torch.set_num_threads(1)
status = pathlib.Path("/proc/self/status")
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", status.read_text())[1]) * 1024
spec = MoeSpec("Tiny", 1, (0,), {n_expert}, 1, 1, 512, 512)

def score(width):
    down = torch.ones({n_expert}, 64 * 512 // {n_expert}, width, dtype=torch.bfloat16)
    score_weights(spec, [(0, SimpleNamespace(down_proj=down))])
    return down.nbytes

score(1)  # what torch itself takes
before = peak()
size = score(2048)
print((peak() - before) / size)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    print(f"peak: {float(result.stdout):.2f} of the experts' bytes, themselves among them")
    assert 1 <= float(result.stdout) < 1.5


def test_aimer_prunes_the_evenly_spread_expert() -> None:
    module = random_model("MixtralForCausalLM", 100)
    with torch.no_grad():
        for matrix in (
            module.model.layers[0].mlp.experts.gate_up_proj,
            module.model.layers[0].mlp.experts.down_proj,
        ):
            matrix[3] = matrix[3].sign()
    spec = replace(SPEC, moe_layers=(0, 1, 2), n_expert=16)
    values = score_weights(spec, expert_modules(module)).values
    assert values[0].argmin() == 3 and values[0, 3].item() == pytest.approx(-1)


@pytest.mark.parametrize("name", ["magic", "aimer", ""])
def test_unknown_score_is_refused_with_the_choices(name: Any) -> None:
    """`aimer` needs the weights: `score_weights`."""
    with pytest.raises(MoneError) as error:
        score(calibration(LAYER), name)
    assert str(error.value) == f"unknown score {name}: choose from {', '.join(SCORES)}, random"


def test_scores_know_their_name_and_where_they_are_from() -> None:
    saved = calibration(LAYER)
    for name in (*SCORES, "random"):
        found = score(saved, name)
        assert (found.score, found.spec, found.calibration) == (name, saved.spec, saved)
        assert found.values.dtype == torch.float64
    assert score(saved).score == "error" and torch.equal(score(saved).values, score(saved, "error").values)
    alone = random_scores(saved.spec, seed=4)
    assert (alone.score, alone.spec, alone.calibration) == ("random", saved.spec, None)
    assert alone.values.dtype == torch.float64
    assert torch.equal(alone.values, score(saved, "random", seed=4, guarded=False).values)
    assert torch.equal(random_scores(saved.spec).values, random_scores(saved.spec, seed=0).values)
    assert torch.equal(score(saved, "random").values, score(saved, "random", seed=0).values)


@pytest.mark.parametrize("name", [*SCORES, "random"])
def test_constants_of_an_earlier_pruning_stand_below_all(name: str) -> None:
    saved = calibration(LAYER, LAYER)
    pruned = replace(saved, spec=replace(saved.spec, kept_before=(4, 6)))
    values, plain = score(pruned, name).values, score(saved, name).values
    assert (values[0, 4:] == -torch.inf).all()
    assert torch.equal(values[0, :4], plain[0, :4]) and torch.equal(values[1], plain[1])


def test_super_experts_stand_above_all_unless_they_are_not_guarded() -> None:
    stats = LAYER.stats()
    extreme = replace(stats, max_abs=stats.max_abs * torch.tensor([1, 1, 1, 1, 1, 1e6]))
    saved = replace(calibration(LAYER), layers={1: extreme})
    assert score(saved).values[0, 5] == torch.inf
    assert torch.equal(score(saved, guarded=False).values, score(calibration(LAYER)).values)


@pytest.mark.parametrize("name", SCORES)
def test_a_score_is_a_number_for_every_expert(name: str) -> None:
    """Of one that was never seen as well, before `score` puts it below all: nothing is divided by 0."""
    for counts in ((12, 7, 1, 20, 0, 3), (1, 1, 0, 0, 0, 0), (0,) * 6):
        values = SCORES[name].function(Layer(counts).stats())
        assert values.isfinite().all() and (values >= 0).all()
        assert not values[[e for e, n in enumerate(counts) if not n]].any() or name in ("variance",)


def test_two_tokens_are_enough_for_a_variance_and_one_is_not() -> None:
    layer = Layer(counts=(2, 1, 0, 3, 0, 0))
    found = standard_deviation(layer.stats())
    assert found[0].item() == pytest.approx(deviation(layer, 0), rel=1e-12)
    assert found[1].item() == pytest.approx((deviation(layer, 0) + deviation(layer, 3)) / 2, rel=1e-12)
    assert not standard_deviation(Layer(counts=(1, 1, 0, 0, 0, 0)).stats()).any(), (
        "unknown in the whole layer"
    )


@pytest.mark.parametrize("name", ["mone-paper", "reap", "man", "msan", "variance"])
def test_means_stay_where_each_token_counts_more_often(name: str) -> None:
    """A weight of the text changes sums, and no mean over an expert's tokens: of a single one, too."""
    stats = Layer(counts=(12, 7, 1, 20, 0, 3)).stats()
    function = SCORES[name].function
    torch.testing.assert_close(function(stats.reweighted(3.0)), function(stats), rtol=1e-12, atol=0)


def test_scores_of_a_single_token_are_shares_of_it() -> None:
    layer = Layer(counts=(1, 1, 0, 0, 0, 0))
    stats = replace(
        layer.stats(),
        n_token=1,
        out_m2=torch.tensor([4.0, 9, 0, 0, 0, 0]).double(),
        count=torch.tensor([2, 2, 0, 0, 0, 0]),
    )
    stats = replace(stats, weight=stats.count.double())
    wanted = float(layer.gates[0].sum()) * 2.0
    assert SCORES["mone"].function(stats)[0].item() == pytest.approx(wanted, rel=1e-12)
    more = replace(stats, n_token=2)
    assert SCORES["error"].function(stats)[0].item() == pytest.approx(
        2 * SCORES["error"].function(more)[0].item()
    )


@pytest.mark.parametrize("names", [("up_proj", "down_proj"), ("gate_up_proj", "down_proj"), ("down_proj",)])
def test_aimer_takes_all_matrices_there_are(names: tuple[str, ...]) -> None:
    """Of several shapes, some of more weights than are taken at once; what is no tensor is none of them."""
    random = torch.Generator().manual_seed(0)
    matrices = {
        name: torch.randn(3, 2, 5 + 400_000 * (name == "down_proj"), generator=random) * (1 + number)
        for number, name in enumerate(names)
    }
    experts = SimpleNamespace(
        **matrices, act_fn=None, **({"up_proj": None} if "up_proj" not in names else {})
    )
    found = score_weights(replace(SPEC, moe_layers=(7,), n_expert=3), [(7, experts)])
    assert found.values.shape == (1, 3) and found.values.dtype == torch.float64
    for e in range(3):
        w = torch.cat([matrix[e].flatten() for matrix in matrices.values()]).double()
        wanted = -w.abs().mean() / w.square().mean().sqrt()
        assert found.values[0, e].item() == pytest.approx(wanted.item(), rel=1e-9)


def test_experts_without_weights_are_no_division_by_zero() -> None:
    nothing = SimpleNamespace(down_proj=torch.zeros(2, 3, 4))
    before = replace(SPEC, moe_layers=(0,), n_expert=2, kept_before=(1,))
    assert score_weights(before, [(0, nothing)]).values.tolist() == [[0.0, -math.inf]]
    assert score_weights(before, [(0, nothing)]).spec is before
