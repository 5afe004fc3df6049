"""The reading seam: sees every expert's output in any model with transformers' experts interface.

While a model is observed, its experts run under a name of our own: a forward that makes the same calls as
transformers' `grouped_mm` implementation (the default), and looks at the rows between the down projection and
the weighting. Nothing here knows a family, and the model's output stays equal bit for bit. Experts that are
laid out in the same way outside the interface get such a forward for themselves; where a model
weights what goes into them, the weight of their output is 1.

What transformers keeps under our name is a function without any state. What it finds goes to the sinks that
hang on the experts module that it is called for, as long as an observation lasts: nothing outlives that.

Source: `grouped_mm_experts_forward` in transformers' `integrations/moe.py`, whose grouped linear layer this
uses.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mone_export.artifacts import ExpertStats, InputSums
from mone_export.calibration.input_sums import DOWN, UP, sums_of_routed
from mone_export.calibration.linear_inputs import linear_inputs
from mone_export.calibration.rows import Layers, add_to
from mone_export.calibration.sums import Sums, expert_stats, grouped_stats
from mone_export.errors import MoneError
from mone_export.source.shape import expert_modules
from mone_export.transformers_internals import (
    ExpertsInterface,
    check_version,
    grouped_linear,
    with_experts_forward,
)

_NAME = "mone_observed"


@contextmanager
def observe(model: PreTrainedModel, *, inputs: bool = False) -> Iterator[Layers]:
    """Collect the statistics of every forward pass inside the block, per layer number, on the model's device.

    With `inputs`, what goes into the layers' matrices, too, per name (`input_sums`). Every token of a batch
    counts: batches must hold no padding. On leaving, the model is as it was before. Blocks may be
    nested: the outer one counts what runs in the inner one as well. Raises `MoneError` for a model with
    several expert stacks in one layer, and for an untested version of transformers.
    """
    check_version()
    found: Layers = {}
    modules = _by_layer(model)
    before = [(module, _own(module)) for module in modules.values()]
    ExpertsInterface.register(_NAME, observed)
    try:
        for layer, module in modules.items():
            module.mone_sinks = (*_sinks(module), Sink(layer, found, inputs=inputs))
            if _is_behind_interface(module):
                module.config = with_experts_forward(module.config, _NAME)
            elif "forward" not in vars(module):  # else what stands there calls `run_experts`
                module.forward = MethodType(run_experts, module)
        with linear_inputs(model, found) if inputs else nullcontext():
            yield found
    finally:
        for module, own in before:
            for name in _own(module).keys() - own.keys():
                delattr(module, name)
            for name, value in own.items():
                setattr(module, name, value)


class Sink:
    """Takes what one experts module does during one observation: it adds up in the layer's entries."""

    def __init__(self, layer: int, found: Layers, *, inputs: bool = False) -> None:
        """Keep layer `layer`'s sums in `found`, the observation's; with `inputs`, its matrices' too."""
        self._layer, self._found, self.inputs = layer, found, inputs

    def add(self, batch: ExpertStats, inputs: Sequence[InputSums] = ()) -> None:
        """Add the statistics of one call; `inputs` are of the first and of the last matrices."""
        add_to(self._found, self._layer, batch)
        for name, sums in zip((UP, DOWN), inputs, strict=False) if self.inputs else ():
            add_to(self._found, name.format(layer=self._layer), sums)


def run_experts(module: Any, *args: Tensor, **named: Tensor) -> Tensor:
    """Return what an experts module itself makes of its arguments, under every observation that it is in.

    For whatever stands in for `module.forward` and needs the experts below it. Families name the arguments as
    they like, in the same order.
    """
    args = (*args, *named.values())
    output: Tensor
    if _sinks(module) and not _is_behind_interface(module):
        output = (observed if len(args) > 1 else observed_weighted)(module, *args)
    else:
        output = type(module).forward(module, *args)
    return output


def observed(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run an experts module as `grouped_mm` does, and tell its sinks: hidden [n_token, d], top_k of each."""
    n_token, top_k = top_k_index.shape
    ids, order = torch.sort(top_k_index.reshape(-1))  # [n_token * top_k], slots grouped by expert
    slots = Slots(ids, order, top_k_weights.reshape(-1)[order])
    n_expert, _, n_channel = _shape(module)
    wanted = any(sink.inputs for sink in _sinks(module))
    squares = torch.zeros(n_expert, n_channel, device=hidden.device) if wanted else None
    weighted, sums = (one_by_one if hidden.is_cpu else all_together)(module, hidden, slots, squares)
    batch = replace(sums, n_token=n_token)
    inputs: tuple[InputSums, ...] = ()
    if squares is not None:
        up = sums_of_routed(hidden[:, None], top_k_index, n_expert)
        inputs = up, InputSums(squares.to(up.squares.device).double(), up.n_row.clone())
    for sink in _sinks(module):
        sink.add(batch, inputs)
    return weighted.view(n_token, top_k, -1).sum(dim=1).to(hidden.dtype)


def observed_weighted(module: Any, hidden: Tensor) -> Tensor:
    """Do so where a block weights what goes into the experts: hidden [n_expert * n_token, d], mostly zero."""
    output: Tensor = type(module).forward(module, hidden)
    by_expert = hidden.view(len(module.down_proj), -1, hidden.shape[-1])
    selected = by_expert.any(-1)  # [n_expert, n_token]
    rows = output[selected.flatten()]
    batch = expert_stats(rows, rows.new_ones(len(rows)), selected.sum(1), n_token=selected.shape[1])
    inputs: list[InputSums] = []
    if any(sink.inputs for sink in _sinks(module)):
        gate, up = (by_expert @ module.gate_up_proj).chunk(2, dim=-1)
        for each in (by_expert, up * module.act_fn(gate)):  # zero for the tokens of other experts
            squares = each.float().square().sum(1).to(batch.weight.device)
            inputs.append(InputSums(squares.double(), batch.weight.clone()))
    for sink in _sinks(module):
        sink.add(batch, inputs)
    return output


@dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """The selected (token, expert) pairs of one call, grouped by ascending expert; all [n_slot]."""

    ids: Tensor  # the expert of each
    order: Tensor  # where each stood before: token times top_k, and which of its experts
    gates: Tensor  # the weights that multiply their outputs


def one_by_one(
    module: Any, hidden: Tensor, slots: Slots, squares: Tensor | None = None
) -> tuple[Tensor, ExpertStats]:
    """Run the experts one after the other: on a CPU a grouped product is a loop over experts anyway.

    Rows that stay in its cache are worth more than all the statistics cost. Returns the weighted outputs
    [n_slot, d], slots as they came before they were grouped, and the statistics; `n_token` stays 0. What goes
    into the last matrices is squared and added to `squares` [n_expert, I].
    """
    n_expert, width, _ = _shape(module)
    ids, order, gates = slots.ids, slots.order, slots.gates
    count = torch.bincount(ids, minlength=n_expert)
    dtype = torch.result_type(module.down_proj, gates)
    weighted = torch.empty(len(order), width, dtype=dtype)
    sums, start = Sums(count, width), 0
    top_k = len(order) // len(hidden)
    for expert, size in enumerate(count.tolist()):
        if size:
            experts, own = slice(expert, expert + 1), slice(start, start + size)
            channels = hidden_channels(module, hidden[order[own] // top_k], experts, ids[own], count)
            if squares is not None:
                squares[expert] += channels.float().square().sum(0)
            outputs = outputs_of(module, channels, experts, ids[own], count)
            sums.add(experts, outputs, gates[own])
            weighted[order[own]] = outputs * gates[own].unsqueeze(-1)
        start += size
    return weighted, sums.stats()


def all_together(
    module: Any, hidden: Tensor, slots: Slots, squares: Tensor | None = None
) -> tuple[Tensor, ExpertStats]:
    """Run all experts at once, as a GPU wants it: nothing here waits for the device.

    Returns, and adds, what `one_by_one` does.
    """
    n_expert, width, _ = _shape(module)
    ids, order, gates = slots.ids, slots.order, slots.gates
    # bincount would wait
    count = torch.zeros(n_expert, dtype=torch.int64, device=ids.device)
    count.scatter_add_(0, ids, torch.ones_like(ids))
    rows = hidden[order // (len(order) // len(hidden))]
    channels = hidden_channels(module, rows, slice(0, n_expert), ids, count)
    if squares is not None:
        squares += sums_of_routed(channels[:, None], ids[:, None], n_expert).squares.to(squares.device)
    outputs = outputs_of(module, channels, slice(0, n_expert), ids, count)
    weighted = torch.empty(
        len(order), width, dtype=torch.result_type(module.down_proj, gates), device=hidden.device
    )
    weighted[order] = outputs * gates.unsqueeze(-1)
    seen = (outputs, gates, count, ids)
    if hidden.device.type == "mps":  # which has no float64
        seen = (outputs.cpu(), gates.cpu(), count.cpu(), ids.cpu())
    return weighted, grouped_stats(*seen)


def hidden_channels(module: Any, rows: Tensor, experts: slice, ids: Tensor, count: Tensor) -> Tensor:
    """Return what rows [n_slot, d], grouped by expert, have between their experts' projections, [n_slot, I].

    `experts` is a block of them, `ids` [n_slot] names each row's, `count` [n_expert] all experts' numbers of
    rows.
    """
    if module.has_gate:
        gated: Tensor = module._apply_gate(_linear(module, "gate_up_proj", rows, experts, ids, count))
        return gated
    activated: Tensor = module.act_fn(_linear(module, "up_proj", rows, experts, ids, count))
    return activated


def outputs_of(module: Any, hidden: Tensor, experts: slice, ids: Tensor, count: Tensor) -> Tensor:
    """Return the outputs [n_slot, d] of hidden activations [n_slot, I]; the other arguments are the same."""
    outputs = _linear(module, "down_proj", hidden, experts, ids, count)
    return outputs if not module.has_post_expert_norm else module.post_expert_norm(outputs)


def _linear(module: Any, name: str, rows: Tensor, experts: slice, ids: Tensor, count: Tensor) -> Tensor:
    ends = torch.cumsum(count[experts], dim=0, dtype=torch.int32)
    bias = getattr(module, f"{name}_bias")[ids] if module.has_bias else None
    weight = getattr(module, name)[experts]
    return grouped_linear(rows, weight, ends, bias=bias, is_transposed=module.is_transposed)


def _by_layer(model: PreTrainedModel) -> dict[int, Any]:
    """Return the experts module of each layer that has one."""
    modules: dict[int, Any] = {}
    for layer, module in expert_modules(model):
        if layer in modules:
            raise MoneError(f"layer {layer} has several expert stacks; such models are not supported")
        modules[layer] = module
    return modules


def _sinks(module: Any) -> tuple[Sink, ...]:
    """Return where an experts module's statistics go, one sink for each observation that it is in."""
    return getattr(module, "mone_sinks", ())


def _is_behind_interface(module: Any) -> bool:
    """Return whether transformers' decorator has given an experts module its forward."""
    return "kwargs" in inspect.signature(type(module).forward, follow_wrapped=False).parameters


def _own(module: Any) -> dict[str, Any]:
    """Return what `observe` changes of an experts module, as far as the module has it for itself."""
    return {name: vars(module)[name] for name in ("mone_sinks", "config", "forward") if name in vars(module)}


def _shape(module: Any) -> tuple[int, int, int]:
    """Return (n_expert, output width, channels between the projections) of an experts module."""
    n_expert, *widths = module.down_proj.shape
    n_channel, width = widths if module.is_transposed else widths[::-1]
    return n_expert, width, n_channel
