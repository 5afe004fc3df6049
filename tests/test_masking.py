"""Novices in the loaded model against the definition; joint novices against a solution by brute force."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from families import COMMON, ROWS
from family_models import save_family
from reference import install
from tiny import random_model
from torch import Tensor
from transformers import PreTrainedModel

from mone_export.artifacts import Calibration, ExpertStats, Plan, Residual
from mone_export.calibration.corpus import read_corpus
from mone_export.calibration.loading import Model, load, load_module
from mone_export.calibration.masking import Divergence, masked, measure_residuals, recalibrate
from mone_export.calibration.observer import observe
from mone_export.calibration.passes import calibrate
from mone_export.calibration.sensitivity import damage_by_layer
from mone_export.calibration.sums import expert_stats
from mone_export.pruning.novices import joint_novices, novices
from mone_export.pruning.planning import plan
from mone_export.pruning.scoring import score
from mone_export.source import open_source
from mone_export.source.shape import Stream, expert_modules

PRUNED = {0: (1, 5, 6), 2: (0, 15)}
TOKENS = torch.randint(3, 400, (2, 50), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["MixtralForCausalLM", "GptOssForCausalLM"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return random_model(request.param, 400)


@pytest.fixture(scope="module")
def demo() -> Model:
    return load(open_source("demo").folder, device="cpu")


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits


def test_masked_model_is_the_definition(model: PreTrainedModel) -> None:
    vectors = {layer: torch.randn(16, 64, dtype=torch.float64) for layer in PRUNED}
    before = logits(model)
    with masked(model, PRUNED, vectors):
        found = logits(model)
    assert torch.equal(logits(model), before), "the model is as it was"
    install(model, {layer: {e: vectors[layer][e].float() for e in ids} for layer, ids in PRUNED.items()})
    torch.testing.assert_close(found, logits(model), rtol=1e-4, atol=1e-4)
    assert (found - before).abs().max() > 0.1


def test_layers_after_masked_ones_can_be_observed(model: PreTrainedModel) -> None:
    vectors = {0: torch.randn(16, 64)}
    with observe(model) as plain:
        logits(model)
    with masked(model, {0: (1, 5, 6)}, vectors), observe(model) as after:
        logits(model)
    assert not torch.equal(after[1].gate_sum, plain[1].gate_sum)
    install(model, {0: {e: vectors[0][e] for e in (1, 5, 6)}})
    gates = []
    hook = dict(model.named_modules())["model.layers.1.mlp.experts"].register_forward_pre_hook(
        lambda module, args, kwargs: gates.append((*args, *kwargs.values())[2]), with_kwargs=True
    )
    logits(model)
    hook.remove()
    assert after[1].gate_sum.sum().item() == pytest.approx(float(gates[0].sum()), rel=1e-5)


def test_observers_and_novices_stand_in_either_order_where_the_input_is_weighted(tmp_path: Path) -> None:
    """Of a family whose experts are outside transformers' interface: both take `module.forward`."""
    row = next(row for row in ROWS if row.hf_class == "Llama4ForCausalLM")
    module = load_module(save_family(row, tmp_path / "model"), device="cpu", dtype=torch.float32)
    layer, experts = next(iter(expert_modules(module)))
    pruned = {layer: (0, 2)}
    vectors = {layer: torch.randn(*experts.down_proj.shape[::2], dtype=torch.float64)}

    def hidden() -> Tensor:
        with torch.inference_mode():
            return module(TOKENS % COMMON["vocab_size"]).logits

    with observe(module) as plain:
        before = hidden()
    with masked(module, pruned, vectors):
        wanted = hidden()
        with observe(module) as inside:
            assert torch.equal(hidden(), wanted)
        assert torch.equal(hidden(), wanted)
    with observe(module) as outside:
        with masked(module, pruned, vectors):
            assert torch.equal(hidden(), wanted)
        assert torch.equal(hidden(), before) and not torch.equal(before, wanted)
    assert torch.equal(hidden(), before)
    for seen in (inside, outside):
        assert seen.keys() == plain.keys()
        assert torch.equal(seen[layer].out_mean, plain[layer].out_mean), "what the experts themselves compute"
    assert outside[layer].n_token == 2 * inside[layer].n_token == 2 * TOKENS.numel()


def test_nothing_holds_a_model_after_all_that_is_measured_on_it(text: Path) -> None:
    model = load("demo", device="cpu", dtype="float32", stream="off")
    corpus = read_corpus([text], open_source("demo").tokenizer(), n_row=1, seq_len=64)
    experts = dict(expert_modules(model.module))
    alive = [weakref.ref(model.module), *(weakref.ref(module) for module in experts.values())]
    del experts
    gc.disable()
    try:
        calibration = calibrate(model, corpus, model_sha256="")
        chosen = plan(score(calibration), ratio=0.5)
        assert len(measure_residuals(model, corpus, chosen)) == len(chosen.layers)
        pruned = {layer.layer: layer.pruned for layer in chosen.layers}
        vectors = {layer: novices(calibration.layers[layer], "mean") for layer in pruned}
        assert damage_by_layer(model, corpus.tokens, pruned, vectors).keys() == pruned.keys()
        del model
        assert [reference() for reference in alive] == [None] * len(alive)
    finally:
        gc.enable()


def test_divergence_is_the_mean_over_the_compared_positions(demo: Model) -> None:
    rows = torch.randint(3, 3000, (2, 40), generator=torch.Generator().manual_seed(1))
    divergence = Divergence(demo, rows, n_position=4)
    assert divergence({}, {}) == pytest.approx(0, abs=1e-9)
    pruned, vectors = {1: range(16)}, {1: torch.zeros(32, 256)}
    with torch.inference_mode():
        before = demo.module(rows).logits.log_softmax(-1)
        with masked(demo.module, pruned, vectors):
            after = demo.module(rows).logits.log_softmax(-1)
    wanted = (before.exp() * (before - after)).sum(-1)[:, [0, 13, 26, 39]].mean()
    assert divergence(pruned, vectors) == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize("stream", ["off", "on"])
def test_each_layer_is_measured_after_the_pruned_ones(demo: Model, text: Path, stream: Stream) -> None:
    corpus = read_corpus([text], demo.source.tokenizer(), n_row=2, seq_len=128)
    plain = calibrate(demo, corpus, model_sha256="")

    def decide(calibration: Calibration) -> Plan:
        return plan(score(calibration), ratio=0.5)

    model = load(open_source("demo").folder, device="cpu", dtype="float32", stream=stream)
    assert (model.files is None) == (stream == "off")
    found = recalibrate(model, corpus, plain, decide, lambda stats: novices(stats, "mean"))
    assert [stats.n_token for stats in found.layers.values()] == [corpus.tokens.numel()] * 5, "not twice"
    assert torch.equal(found.layers[0].gate_sum, plain.layers[0].gate_sum), "nothing stands before it"
    pruned = {layer.layer: layer.pruned for layer in decide(found).layers}
    for last in (1, 4):
        before = {layer: pruned[layer] for layer in range(last)}
        vectors = {layer: novices(found.layers[layer], "mean") for layer in before}
        with masked(demo.module, before, vectors), observe(demo.module) as seen, torch.inference_mode():
            demo.module.base_model(corpus.tokens)
        torch.testing.assert_close(found.layers[last].out_mean, seen[last].out_mean, rtol=1e-6, atol=1e-9)
        assert not torch.allclose(found.layers[last].out_mean, plain.layers[last].out_mean, rtol=1e-3)


@pytest.mark.parametrize("stream", ["off", "on"])
def test_damage_is_that_of_the_whole_model_with_one_layer_pruned(demo: Model, stream: Stream) -> None:
    tokens = torch.randint(3, 3000, (12, 300), generator=torch.Generator().manual_seed(1))
    pruned = {0: tuple(range(16)), 1: (3,), 4: (0, 31)}
    vectors = {layer: torch.randn(32, 256, dtype=torch.float64) / 10 for layer in pruned}
    model = load(open_source("demo").folder, device="cpu", dtype="float32", stream=stream)
    found = damage_by_layer(model, tokens, pruned, vectors)
    assert found.keys() == pruned.keys()
    probe = tokens[
        [0, 1, 3, 4, 6, 7, 9, 11], : 3600 // 5 // 8
    ]  # eight evenly spaced rows, half the work of all

    def last_hidden() -> Tensor:
        with torch.inference_mode():
            return demo.module.base_model(probe).last_hidden_state

    before = last_hidden()
    for layer in pruned:
        with masked(demo.module, {layer: pruned[layer]}, vectors):
            after = last_hidden()
        wanted = ((after - before).norm(dim=-1) / before.norm(dim=-1)).square().mean()
        assert found[layer] == pytest.approx(float(wanted), rel=1e-4)
    assert found[0] > 1e-3
    assert damage_by_layer(model, tokens[:2], {}, {}) == {}, "nothing is pruned"


@pytest.fixture
def toy() -> tuple[Tensor, Tensor]:
    """Gates [40, 6], 2 of 6 selected, and outputs [40, 6, 5] of a layer, float64."""
    random = torch.Generator().manual_seed(0)
    gates = torch.rand(40, 6, dtype=torch.float64, generator=random)
    gates *= gates >= gates.topk(2).values[:, 1:]
    return gates, torch.randn(40, 6, 5, dtype=torch.float64, generator=random) + 1


def test_joint_novices_are_the_least_squares_solution_of_the_layer(toy: tuple[Tensor, Tensor]) -> None:
    gates, outputs = toy
    pruned = [0, 2, 3, 5]
    own = gates.clone()
    own[:, [1, 4]] = 0
    residual = (own[:, :, None] * outputs).sum(1)  # [40, 5]
    found = Residual(own.T @ own, own.T @ residual, float(residual.square().sum()))
    stats = layer_stats(gates, outputs)
    best = torch.linalg.lstsq(own[:, pruned], residual).solution  # by brute force: all novices at once
    joint = joint_novices(stats, found)
    torch.testing.assert_close(joint[pruned], best, rtol=0, atol=5e-3)  # the ridge is 1e-3
    error = float((residual - own[:, pruned] @ joint[pruned]).square().sum())
    assert found.error(joint) == pytest.approx(error, rel=1e-9)
    least = float((residual - own[:, pruned] @ best).square().sum())
    assert least <= error < least * (1 + 1e-4)
    assert error < found.error(novices(stats, "least-squares"))


def test_experts_always_chosen_together_keep_their_least_squares_novices_sum() -> None:
    gates = torch.zeros(20, 4, dtype=torch.float64)
    gates[:, 0], gates[:, 1] = 0.5, 0.5
    outputs = torch.randn(20, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    residual = (gates[:, :, None] * outputs).sum(1)
    found = joint_novices(
        layer_stats(gates, outputs),
        Residual(gates.T @ gates, gates.T @ residual, float(residual.square().sum())),
    )
    assert torch.isfinite(found).all()
    torch.testing.assert_close(0.5 * (found[0] + found[1]), residual.mean(0), rtol=1e-2, atol=1e-3)


def layer_stats(gates: Tensor, outputs: Tensor) -> ExpertStats:
    ids = [gates[:, e].nonzero()[:, 0] for e in range(gates.shape[1])]
    f = torch.cat([outputs[rows, e] for e, rows in enumerate(ids)])
    g = torch.cat([gates[rows, e] for e, rows in enumerate(ids)])
    return expert_stats(f, g, torch.tensor([len(rows) for rows in ids]), n_token=len(gates))


def test_layers_error_falls_from_novice_to_novice(demo: Model, text: Path) -> None:
    """On the calibration text of the demo, with all experts of a layer counted together."""
    corpus = read_corpus([text], demo.source.tokenizer(), n_row=4, seq_len=512)
    calibration = calibrate(demo, corpus, model_sha256="")
    chosen = plan(score(calibration), ratio=0.5)
    residuals = measure_residuals(demo, corpus, chosen)
    for layer, residual in residuals.items():
        stats = calibration.layers[layer]
        errors = [residual.error(novices(stats, name)) for name in ("zero", "mean", "least-squares")]
        errors.append(residual.error(joint_novices(stats, residual)))
        print(f"layer {layer}: " + ", ".join(f"{error / errors[0]:.4f}" for error in errors))
        assert errors == sorted(errors, reverse=True)
        own = residual.gram[list(chosen.layers[layer].pruned)][:, list(chosen.layers[layer].pruned)]
        gate_sq_sum = stats.gate_sq_sum[list(chosen.layers[layer].pruned)]
        torch.testing.assert_close(own.diagonal(), gate_sq_sum, rtol=1e-5, atol=1e-6)
