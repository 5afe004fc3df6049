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
from mone_export.errors import MoneError
from mone_export.source.shape import expert_modules
from mone_export.transformers_internals import (
    ExpertsInterface,
    check_version,
    grouped_linear,
    with_experts_forward,
)

_NAME = "mone_observed"
_CACHED_ROWS = 128  # of float64 output: 2 MB at 2048 channels
_BLOCK = 32  # slots that are summed in float32 where all experts are taken together
_CANCELLATION = 1e-3  # a difference that small has lost 3 of float64's 16 digits


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


def expert_stats(outputs: Tensor, gates: Tensor, count: Tensor, *, n_token: int) -> ExpertStats:
    """Return the statistics of one batch.

    Args:
        outputs: [n_slot, d], experts' outputs before weighting, grouped by ascending expert.
        gates: [n_slot], the weights that multiply them.
        count: int64 [n_expert], slots of each expert; sums to n_slot.
        n_token: tokens the batch holds.
    """
    sums = _Sums(count, outputs.shape[1])
    sums.add(slice(0, len(count)), outputs, gates)
    return replace(sums.stats(), n_token=n_token)


def grouped_stats(outputs: Tensor, gates: Tensor, count: Tensor, ids: Tensor) -> ExpertStats:
    """Return what `expert_stats` returns, without a loop over experts and without waiting for the device.

    `ids` int64 [n_slot] names each slot's expert; `n_token` stays 0. A GPU is slow in float64, and where rows
    of one expert are added one after the other. So slots are laid in blocks of `_BLOCK` that belong to one
    expert; a block is summed as a product of matrices, in float32 (relative error about 1e-6) unless the
    outputs have more digits, and blocks are added in float64.
    """
    (n_slot, width), n_expert, device = outputs.shape, len(count), outputs.device
    n_block = n_slot // _BLOCK + n_expert  # at most; how many are needed would have to be asked for
    blocks = (count + _BLOCK - 1) // _BLOCK
    begin, first = torch.cumsum(count, 0) - count, torch.cumsum(blocks, 0) - blocks
    slot = torch.arange(n_slot, device=device)
    place = first[ids] * _BLOCK + slot - begin[ids]  # where a slot goes: [n_block * _BLOCK]

    def totals(values: Tensor, reduce: str = "sum") -> Tensor:
        # unsafe: unchecked, since a check of the lengths would wait for the device
        return torch.segment_reduce(values, reduce, lengths=blocks, axis=0, unsafe=True, initial=0)

    g, exact = gates.double(), torch.promote_types(outputs.dtype, torch.float32)
    norm = torch.linalg.vector_norm(outputs, dim=1, dtype=exact).double()
    largest = torch.linalg.vector_norm(outputs, torch.inf, dim=1).double()
    powers = torch.stack((torch.ones_like(g), g, g.square()), dim=1)  # [n_slot, 3]
    table = torch.zeros(n_block * _BLOCK, 10, dtype=torch.float64, device=device)
    table[place] = torch.cat(
        (powers, powers * norm[:, None], powers * norm[:, None].square(), largest[:, None]), 1
    )
    table = table.view(n_block, _BLOCK, 10)
    _, gate, gate_sq, n, gn, _, n_sq, _, g2n_sq = totals(table[..., :9].sum(1)).unbind(1)

    source = torch.zeros(n_block * _BLOCK, dtype=torch.int64, device=device)
    source[place] = slot  # places of no slot hold the first one, weighted by 0
    rows = outputs[source].view(n_block, _BLOCK, width).to(exact)
    sums = totals(torch.bmm(table[..., :3].to(exact).mT, rows).double().flatten(1)).view(n_expert, 3, width)
    mean = sums[:, 0] / count.clamp(min=1)[:, None]
    expert = torch.zeros(n_block, dtype=torch.int64, device=device)
    expert[place // _BLOCK] = ids
    deviation = torch.linalg.vector_norm(rows.sub_(mean.to(exact)[expert][:, None]), dim=2).double()
    return replace(
        ExpertStats.empty(n_expert, 0, device=device),
        count=count,
        weight=count.double(),
        gate_sum=gate,
        gate_sq_sum=gate_sq,
        out_mean=mean,
        out_m2=totals((table[..., 0] * deviation.square()).sum(1)),
        gated_out_sum=sums[:, 1],
        gated2_out_sum=sums[:, 2],
        norm_sum=n,
        norm_sq_sum=n_sq,
        gated_norm_sum=gn,
        gated2_norm_sq_sum=g2n_sq,
        max_abs=totals(table[..., 9].amax(1), "max"),
    )


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
    sums, start = _Sums(count, width), 0
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


class _Sums:
    """The statistics of one batch in the making, on a CPU: experts come block by block."""

    def __init__(self, count: Tensor, width: int) -> None:
        self._sizes = count.tolist()
        self._batch = ExpertStats.empty(len(self._sizes), width)
        # one buffer for all experts: fresh memory for each would cost more than the arithmetic
        n_row = min(max(self._sizes), _CACHED_ROWS)
        self._scratch = torch.empty(n_row, width, dtype=torch.float64)

    def add(self, experts: slice, outputs: Tensor, gates: Tensor) -> None:
        """Add the outputs [n_slot, d] of a block of experts, grouped by expert, and their gates [n_slot]."""
        sizes = self._sizes[experts]
        rows = zip(outputs.split(sizes), gates.double().split(sizes), strict=True)
        for expert, (f, g) in enumerate(rows, start=experts.start):
            if len(g):
                self._add_expert(expert, f, g)

    def stats(self) -> ExpertStats:
        """Return the sums; all experts must have been added."""
        count = torch.tensor(self._sizes)
        return replace(self._batch, count=count, weight=count.double())

    def _add_expert(self, expert: int, f: Tensor, g: Tensor) -> None:
        """Write the sums over one expert's tokens, f [n, d] and g [n], into row `expert`."""
        batch, n_row = self._batch, len(self._scratch)
        g_sq = g.square()
        powers = torch.stack((torch.ones_like(g), g, g_sq))  # [3, n]
        sums = torch.zeros(3, f.shape[1], dtype=torch.float64)
        norm = torch.empty_like(g)
        for part, rows in enumerate(f.split(n_row)):  # a part stays in the cache while it is used
            span = slice(part * n_row, part * n_row + len(rows))
            f64 = self._scratch[: len(rows)].copy_(rows)
            torch.linalg.vector_norm(f64, dim=1, out=norm[span])
            sums.addmm_(powers[:, span], f64)
        norm_sq = norm.square()
        mean = sums[0] / len(g)
        batch.out_mean[expert] = mean
        batch.out_m2[expert] = self._squared_deviation(f, mean, norm_sq.sum())
        batch.gated_out_sum[expert] = sums[1]
        batch.gated2_out_sum[expert] = sums[2]
        batch.gate_sum[expert] = g.sum()
        batch.gate_sq_sum[expert] = g_sq.sum()
        batch.norm_sum[expert] = norm.sum()
        batch.norm_sq_sum[expert] = norm_sq.sum()
        batch.gated_norm_sum[expert] = g @ norm
        batch.gated2_norm_sq_sum[expert] = g_sq @ norm_sq
        low, high = torch.aminmax(f)
        batch.max_abs[expert] = torch.maximum(-low, high)

    def _squared_deviation(self, f: Tensor, mean: Tensor, norm_sq_sum: Tensor) -> Tensor:
        """Return sum (f - mean)^2 as sum f^2 - n mean^2, or term by term where that would cancel digits."""
        m2 = norm_sq_sum - len(f) * mean.square().sum()
        if m2 > _CANCELLATION * norm_sq_sum:
            return m2
        parts = f.split(len(self._scratch))
        return torch.stack([(rows.double() - mean).square().sum() for rows in parts]).sum()


def _expert_outputs(module: Any, rows: Tensor, experts: slice, ids: Tensor, count: Tensor) -> Tensor:
    """Run rows [n_slot, d], grouped by expert, through a block of experts; outputs before weighting.

    `ids` [n_slot] names each row's expert, `count` [n_expert] all experts' numbers of rows.
    """
    ends = torch.cumsum(count[experts], dim=0, dtype=torch.int32)

    def linear(x: Tensor, name: str) -> Tensor:
        weight = getattr(module, name)[experts]
        bias = getattr(module, f"{name}_bias")[ids] if module.has_bias else None
        return grouped_linear(x, weight, ends, bias=bias, is_transposed=module.is_transposed)

    if module.has_gate:
        hidden = module._apply_gate(linear(rows, "gate_up_proj"))
    else:
        hidden = module.act_fn(linear(rows, "up_proj"))
    outputs = linear(hidden, "down_proj")
    return outputs if not module.has_post_expert_norm else module.post_expert_norm(outputs)


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
