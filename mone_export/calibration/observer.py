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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mone_export.artifacts import ExpertStats
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
def observe(model: PreTrainedModel) -> Iterator[dict[int, ExpertStats]]:
    """Collect the statistics of every forward pass inside the block, per layer number, on the model's device.

    Every token of a batch counts: batches must hold no padding. On leaving, the model is as it was before.
    Blocks may be nested: the outer one counts what runs in the inner one as well. Raises `MoneError` for a
    model with several expert stacks in one layer, and for an untested version of transformers.
    """
    check_version()
    stats: dict[int, ExpertStats] = {}
    modules = _by_layer(model)
    before = [(module, _own(module)) for module in modules.values()]
    ExpertsInterface.register(_NAME, observed)
    try:
        for layer, module in modules.items():
            module.mone_sinks = (*_sinks(module), Sink(layer, stats))
            if _is_behind_interface(module):
                module.config = with_experts_forward(module.config, _NAME)
            elif "forward" not in vars(module):  # else what stands there calls `run_experts`
                module.forward = MethodType(run_experts, module)
        yield stats
    finally:
        for module, own in before:
            for name in _own(module).keys() - own.keys():
                delattr(module, name)
            for name, value in own.items():
                setattr(module, name, value)


class Sink:
    """Takes what one experts module does during one observation: it adds up in the layer's entry."""

    def __init__(self, layer: int, stats: dict[int, ExpertStats]) -> None:
        """Keep layer `layer`'s sums in `stats`, the observation's; an entry is replaced, never changed."""
        self._layer, self._stats = layer, stats

    def add(self, batch: ExpertStats) -> None:
        """Add the statistics of one call."""
        so_far = self._stats.get(self._layer)
        self._stats[self._layer] = so_far.merge(batch) if so_far else batch


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
    weighted, sums = (one_by_one if hidden.is_cpu else all_together)(module, hidden, slots)
    batch = replace(sums, n_token=n_token)
    for sink in _sinks(module):
        sink.add(batch)
    return weighted.view(n_token, top_k, -1).sum(dim=1).to(hidden.dtype)


def observed_weighted(module: Any, hidden: Tensor) -> Tensor:
    """Do so where a block weights what goes into the experts: hidden [n_expert * n_token, d], mostly zero."""
    output: Tensor = type(module).forward(module, hidden)
    selected = hidden.view(len(module.down_proj), -1, hidden.shape[-1]).any(-1)  # [n_expert, n_token]
    rows = output[selected.flatten()]
    batch = expert_stats(rows, rows.new_ones(len(rows)), selected.sum(1), n_token=selected.shape[1])
    for sink in _sinks(module):
        sink.add(batch)
    return output


@dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """The selected (token, expert) pairs of one call, grouped by ascending expert; all [n_slot]."""

    ids: Tensor  # the expert of each
    order: Tensor  # where each stood before: token times top_k, and which of its experts
    gates: Tensor  # the weights that multiply their outputs


def one_by_one(module: Any, hidden: Tensor, slots: Slots) -> tuple[Tensor, ExpertStats]:
    """Run the experts one after the other: on a CPU a grouped product is a loop over experts anyway.

    Rows that stay in its cache are worth more than all the statistics cost. Returns the weighted outputs
    [n_slot, d], slots as they came before they were grouped, and the statistics; `n_token` stays 0.
    """
    n_expert, width = _shape(module)
    ids, order, gates = slots.ids, slots.order, slots.gates
    count = torch.bincount(ids, minlength=n_expert)
    dtype = torch.result_type(module.down_proj, gates)
    weighted = torch.empty(len(order), width, dtype=dtype)
    sums, start = Sums(count, width), 0
    top_k = len(order) // len(hidden)
    for expert, size in enumerate(count.tolist()):
        if size:
            experts, own = slice(expert, expert + 1), slice(start, start + size)
            outputs = _expert_outputs(module, hidden[order[own] // top_k], experts, ids[own], count)
            sums.add(experts, outputs, gates[own])
            weighted[order[own]] = outputs * gates[own].unsqueeze(-1)
        start += size
    return weighted, sums.stats()


def all_together(module: Any, hidden: Tensor, slots: Slots) -> tuple[Tensor, ExpertStats]:
    """Run all experts at once, as a GPU wants it: nothing here waits for the device.

    Returns what `one_by_one` returns.
    """
    n_expert, width = _shape(module)
    ids, order, gates = slots.ids, slots.order, slots.gates
    # bincount would wait
    count = torch.zeros(n_expert, dtype=torch.int64, device=ids.device)
    count.scatter_add_(0, ids, torch.ones_like(ids))
    rows = hidden[order // (len(order) // len(hidden))]
    outputs = _expert_outputs(module, rows, slice(0, n_expert), ids, count)
    weighted = torch.empty(
        len(order), width, dtype=torch.result_type(module.down_proj, gates), device=hidden.device
    )
    weighted[order] = outputs * gates.unsqueeze(-1)
    seen = (outputs, gates, count, ids)
    if hidden.device.type == "mps":  # which has no float64
        seen = (outputs.cpu(), gates.cpu(), count.cpu(), ids.cpu())
    return weighted, grouped_stats(*seen)


def _expert_outputs(module: Any, rows: Tensor, experts: slice, ids: Tensor, count: Tensor) -> Tensor:
    """Run rows [n_slot, d], grouped by expert, through a block of experts; outputs before weighting.

    `ids` [n_slot] names each row's expert, `count` [n_expert] all experts' numbers of rows.
    """
    hidden = hidden_channels(module, rows, experts, ids, count)
    return outputs_of(module, hidden, experts, ids, count)


def hidden_channels(module: Any, rows: Tensor, experts: slice, ids: Tensor, count: Tensor) -> Tensor:
    """Return what rows have between their experts' projections, [n_slot, I]; the arguments are the same."""
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


def _shape(module: Any) -> tuple[int, int]:
    """Return (n_expert, output width) of an experts module."""
    n_expert, *widths = module.down_proj.shape
    return n_expert, widths[1 if module.is_transposed else 0]
