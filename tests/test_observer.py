"""The observer leaves the model's output alone, and its statistics are the definitions, token by token."""

import copy
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from families import COMMON, ROWS
from tiny import TINY, random_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mone_export.artifacts import ExpertStats, by_matrix
from mone_export.calibration.observer import all_together, observe, one_by_one
from mone_export.calibration.sums import expert_stats, grouped_stats
from mone_export.source.shape import expert_modules

N_VOCAB = 200
FIELDS = [field.name for field in fields(ExpertStats)]


APART = "Llama4ForCausalLM"  # its experts are outside transformers' interface, and get weighted rows


def fresh(family: str) -> PreTrainedModel:
    """Return a model that nobody else has."""
    if family != APART:
        return random_model(family, N_VOCAB)
    row = next(row for row in ROWS if row.hf_class == APART)
    torch.manual_seed(0)
    config = AutoConfig.for_model(row.model_type, **COMMON | row.config | {"vocab_size": N_VOCAB})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


class Call(NamedTuple):
    """One call of an expert stack: what went in, what came out."""

    module: Any
    hidden: Tensor  # [n_token, d]
    index: Tensor  # [n_token, top_k]
    weights: Tensor  # [n_token, top_k]
    output: Tensor  # [n_token, d]


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[int, Call]]:
    """Record the last call of every expert stack by hooks, per layer."""
    calls: dict[int, Call] = {}
    handles = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            layer = int(name.split(".")[2])

            def hook(module: Any, args: Any, named: Any, output: Tensor, layer: int = layer) -> None:
                calls[layer] = Call(module, *args, *named.values(), output)

            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    yield calls
    for handle in handles:
        handle.remove()


def linear(module: Any, e: int, a: Tensor, name: str) -> Tensor:
    weight = getattr(module, name)[e]
    bias = getattr(module, f"{name}_bias")[e] if module.has_bias else 0
    return a @ (weight if module.is_transposed else weight.T) + bias


def channels(module: Any, e: int, x: Tensor) -> Tensor:
    """What expert `e` has between its projections, for rows x [n, d]."""
    gated: Tensor = module._apply_gate(linear(module, e, x, "gate_up_proj"))
    return gated


def expert(module: Any, e: int, x: Tensor) -> Tensor:
    """Expert `e` alone, its output before weighting, for rows x [n, d]."""
    return linear(module, e, channels(module, e, x), "down_proj")


Tokens = list[list[tuple[int, float, Tensor]]]  # per token, its (expert, gate, output) triples
Exact = list[tuple[ExpertStats, Call, Tokens]]


def selections(call: Call) -> Tokens:
    """What happened in a call, one expert run on one token at a time."""
    return [
        [(int(e), float(g), expert(call.module, int(e), x[None])[0]) for e, g in zip(ids, gates, strict=True)]
        for x, ids, gates in zip(call.hidden, call.index, call.weights, strict=True)
    ]


def by_definition(tokens: Tokens, n_expert: int, width: int) -> ExpertStats:
    """The table of statistics, written out: two passes, plain loops, float64."""
    s = ExpertStats.empty(n_expert, width)
    for token in tokens:
        for e, g, output in token:
            f = output.double()
            norm = f.square().sum().sqrt()
            s.count[e] += 1
            s.weight[e] += 1
            s.gate_sum[e] += g
            s.gate_sq_sum[e] += g * g
            s.out_mean[e] += f
            s.gated_out_sum[e] += g * f
            s.gated2_out_sum[e] += g * g * f
            s.norm_sum[e] += norm
            s.norm_sq_sum[e] += norm**2
            s.gated_norm_sum[e] += g * norm
            s.gated2_norm_sq_sum[e] += (g * norm) ** 2
            s.max_abs[e] = max(s.max_abs[e], f.abs().max())
    s.out_mean.div_(s.count.clamp(min=1)[:, None])
    for token in tokens:
        for e, _, output in token:
            s.out_m2[e] += (output.double() - s.out_mean[e]).square().sum()
    values = {name: getattr(s, name) for name in FIELDS}
    return ExpertStats(**values | {"n_token": len(tokens)})


def assert_equal(found: ExpertStats, wanted: ExpertStats, *, rtol: float) -> None:
    assert found.n_token == wanted.n_token
    assert torch.equal(found.count, wanted.count)
    for name in FIELDS[2:]:
        a, b = getattr(found, name), getattr(wanted, name)
        assert a.dtype == torch.float64
        # relative to the largest entry of a vector: sums of mixed sign may cancel in single entries
        torch.testing.assert_close(
            a, b, rtol=rtol, atol=rtol * float(b.abs().max()), msg=lambda m, n=name: f"{n}: {m}"
        )


def tokens_for(seed: int, n_row: int = 2, seq_len: int = 12) -> Tensor:
    return torch.randint(0, N_VOCAB, (n_row, seq_len), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=TINY)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return random_model(request.param, N_VOCAB).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_observed_logits_are_the_models_own_bit_for_bit(model: PreTrainedModel, dtype: torch.dtype) -> None:
    model = copy.deepcopy(model).to(dtype)
    assert model.get_experts_implementation()[""] == "grouped_mm", "transformers' default"
    own = model(tokens_for(1)).logits
    with observe(model):
        observed = model(tokens_for(1)).logits
    assert torch.equal(observed, own)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_model_is_as_before_afterwards(model: PreTrainedModel, implementation: str) -> None:
    model.set_experts_implementation(implementation)
    experts = dict(expert_modules(model))
    before = {layer: dict(module.__dict__) for layer, module in experts.items()}
    try:
        with observe(model), observe(model):
            assert model.get_experts_implementation()[""] == implementation, (
                "what else reads it sees no change"
            )
        with pytest.raises(ZeroDivisionError), observe(model):
            _ = 1 / 0
        assert {layer: module.__dict__ for layer, module in experts.items()} == before
    finally:
        model.set_experts_implementation("grouped_mm")


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Python's collector would also end what is held by a cycle; memory is needed before it comes."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("family", [*TINY, APART])
@pytest.mark.usefixtures("no_collector")
def test_nothing_holds_a_model_after_it_was_observed(family: str) -> None:
    model = fresh(family)
    alive = [weakref.ref(model), *(weakref.ref(module) for _, module in expert_modules(model))]
    with observe(model) as layers, torch.inference_mode():
        model(tokens_for(1))
    assert len(layers) == len(alive) - 1
    del model
    assert [reference() for reference in alive] == [None] * len(alive)


@pytest.mark.usefixtures("no_collector")
def test_nothing_holds_a_model_whose_observation_failed() -> None:
    model = fresh("MixtralForCausalLM")
    alive = [weakref.ref(model), *(weakref.ref(module) for _, module in expert_modules(model))]
    with pytest.raises(IndexError), observe(model):
        model(torch.tensor([[N_VOCAB]]))
    del model
    assert [reference() for reference in alive] == [None] * len(alive)


@pytest.mark.parametrize("family", ["MixtralForCausalLM", APART])
def test_each_observation_counts_what_runs_in_its_block(family: str) -> None:
    model = fresh(family).requires_grad_(False)
    with observe(model) as alone:
        model(tokens_for(1))
    with observe(model) as outer:
        model(tokens_for(1))
        with observe(model) as inner:
            model(tokens_for(2))
        assert {stats.n_token for stats in outer.values()} == {48}, "the inner one's are within it as well"
        model(tokens_for(3))
    model(tokens_for(4))
    with observe(model) as again:
        model(tokens_for(2))
    with observe(model) as whole:
        for seed in (1, 2, 3):
            model(tokens_for(seed))
    for layer in alone:
        assert_equal(inner[layer], again[layer], rtol=0)
        assert_equal(outer[layer], whole[layer], rtol=0)
        assert not torch.equal(inner[layer].gate_sum, alone[layer].gate_sum)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_other_models_of_the_same_config_run_as_ever(implementation: str) -> None:
    model = fresh("Qwen3MoeForCausalLM")
    model.set_experts_implementation(implementation)
    other = type(model)(model.config)
    assert other.config is model.config
    with torch.inference_mode():
        own = other(tokens_for(1)).logits
        with observe(model) as layers, observe(fresh("Qwen3MoeForCausalLM")) as third:
            assert torch.equal(other(tokens_for(1)).logits, own)
            assert not layers and not third
            model(tokens_for(1))
        assert len(layers) == 3 and not third


def grouped_linear(
    x: Tensor, weight: Tensor, ends: Tensor, *, bias: Tensor | None, is_transposed: bool
) -> Tensor:
    """What transformers' grouped product computes, group by group, in any precision."""
    groups = x.tensor_split(ends[:-1].tolist())
    out = torch.cat([rows @ (w if is_transposed else w.T) for rows, w in zip(groups, weight, strict=True)])
    return out if bias is None else out + bias


@pytest.fixture(scope="module", params=[one_by_one, all_together], ids=["cpu", "gpu"])
def exact(model: PreTrainedModel, request: pytest.FixtureRequest) -> Exact:
    """Per layer of a float64 copy: statistics, the recorded call, and its tokens' selections by a loop.

    Both ways to run the experts are tried, the one for GPUs on a CPU.

    torch's grouped product knows no float64, so a loop takes its place: then the statistics can be held to
    1e-9 end to end, where in float32 any comparison would be one of matrix products.
    """
    model = copy.deepcopy(model).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mone_export.calibration.observer.grouped_linear", grouped_linear)
        patch.setattr("mone_export.calibration.observer.one_by_one", request.param)
        with recorded(model) as calls, observe(model) as layers:
            model(tokens_for(2))
    return [(layers[layer], call, selections(call)) for layer, call in calls.items()]


def test_every_statistic_is_its_definition(exact: Exact) -> None:
    for stats, call, tokens in exact:
        assert_equal(stats, by_definition(tokens, call.module.num_experts, call.hidden.shape[1]), rtol=1e-9)


def test_gates_are_what_multiplies_the_outputs(exact: Exact) -> None:
    for _, call, tokens in exact:
        y = torch.stack([sum(g * f for _, g, f in token) for token in tokens])
        torch.testing.assert_close(y, call.output, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("way", [one_by_one, all_together], ids=["cpu", "gpu"])
def test_inputs_of_matrices_are_their_definition(model: PreTrainedModel, way: Any) -> None:
    """Of experts by their GGUF names, of all other matrices by their own."""
    taken: dict[str, Tensor] = {}

    def take(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        taken[name] = inputs[0].flatten(0, -2).double()

    hooks = [
        module.register_forward_pre_hook(partial(take, f"{name}.weight"))
        for name, module in model.named_modules()
        if ".layers." in name and isinstance(module, nn.Linear)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mone_export.calibration.observer.one_by_one", way)
        with recorded(model) as calls, observe(model, inputs=True) as found:
            model(tokens_for(2))
    for hook in hooks:
        hook.remove()
    named = by_matrix(found)
    assert named.keys() == taken.keys() | {
        f"blk.{layer}.ffn_{matrix}_exps.weight" for layer in calls for matrix in ("up", "down")
    }
    for name, rows in taken.items():
        torch.testing.assert_close(named[name].squares[0], rows.square().sum(0), rtol=1e-5, atol=0)
        assert named[name].n_row.tolist() == [len(rows)]
    for layer, call in calls.items():
        up, down = (named[f"blk.{layer}.ffn_{matrix}_exps.weight"] for matrix in ("up", "down"))
        for e in range(call.module.num_experts):
            rows = call.hidden[(call.index == e).any(1)]
            for sums, inputs in ((up, rows), (down, channels(call.module, e, rows))):
                wanted = inputs.double().square().sum(0)
                torch.testing.assert_close(sums.squares[e], wanted, rtol=1e-4, atol=1e-9)
                assert sums.n_row[e] == len(rows)


def test_statistics_of_a_float32_model_differ_by_its_matrix_products_only(model: PreTrainedModel) -> None:
    with recorded(model) as calls, observe(model) as layers:
        model(tokens_for(3, n_row=1))
    for layer, call in calls.items():
        wanted = by_definition(selections(call), call.module.num_experts, call.hidden.shape[1])
        assert_equal(layers[layer], wanted, rtol=1e-5)


@pytest.mark.parametrize("mean", [0, 1, 20, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sums_over_given_outputs_are_exact(dtype: torch.dtype, mean: float) -> None:
    """The same low-precision outputs into the package and into float64 loops: 1e-9 between them."""
    random = torch.Generator().manual_seed(0)
    count = torch.tensor([5, 0, 1, 40, 2])
    outputs = (torch.randn(48, 7, generator=random, dtype=torch.float64) + mean).to(dtype)
    gates = torch.rand(48, generator=random).to(dtype)
    ids = torch.repeat_interleave(count)
    rtol = 1e-9 if dtype == torch.float64 else 2e-6  # the GPU's way adds up to 32 numbers in float32
    assert_sums(expert_stats(outputs, gates, count, n_token=30), outputs, gates, count, mean == 0, 1e-9)
    assert_sums(grouped_stats(outputs, gates, count, ids), outputs, gates, count, mean == 0, rtol)


def assert_sums(
    found: ExpertStats, outputs: Tensor, gates: Tensor, count: Tensor, cancels: bool, rtol: float
) -> None:
    slots = zip(torch.repeat_interleave(count).tolist(), gates.tolist(), outputs, strict=True)
    wanted = by_definition([[slot] for slot in slots], 5, 7)
    for name in FIELDS[1:]:
        a, b = getattr(found, name), getattr(wanted, name)
        # sums around a mean of 0 may cancel in single channels
        torch.testing.assert_close(a, b, rtol=rtol, atol=0.1 * rtol if cancels else 0)


def test_batches_add_up(model: PreTrainedModel) -> None:
    rows = tokens_for(4, n_row=4)
    with observe(model) as whole:
        model(rows)
    with observe(model) as parts:
        for row in rows.split(1):
            model(row)
    for layer, stats in whole.items():
        assert_equal(parts[layer], stats, rtol=1e-5)  # matrix products of another height
    assert {stats.n_token for stats in parts.values()} == {rows.numel()}


def test_a_gpu_is_never_waited_for() -> None:
    """Tensors without values cannot be read: any look at them while the experts run would be an error."""
    with torch.device("meta"):
        model = random_model("Qwen3MoeForCausalLM", N_VOCAB, dtype=torch.bfloat16)
        hidden, gates = torch.empty(24, 64, dtype=torch.bfloat16), torch.empty(24, 4, dtype=torch.bfloat16)
        ids = torch.empty(24, 4, dtype=torch.int64)
    with observe(model) as layers, torch.inference_mode():
        for _, module in 2 * list(expert_modules(model)):
            assert module(hidden, ids, gates).shape == hidden.shape
    assert sorted(layers) == [0, 1, 2]
    assert all(stats.n_token == 48 for stats in layers.values())
    assert all(stats.out_mean.device.type == "meta" for stats in layers.values())


def test_dense_layers_are_not_observed() -> None:
    model = random_model("DeepseekV2ForCausalLM", N_VOCAB)  # layer 0 is dense
    with observe(model) as layers, torch.inference_mode():
        model(tokens_for(1))
    assert sorted(layers) == [1, 2]
