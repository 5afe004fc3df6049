"""The reading seam: sees every expert's output in any model behind transformers' experts interface.

While a model is observed, its experts run under a name of our own: a forward that makes the same calls as
transformers' `grouped_mm` implementation (the default), and looks at the rows between the down projection and
the weighting. Nothing here knows a family, and the model's output stays equal bit for bit.

Source: `grouped_mm_experts_forward` in transformers' `integrations/moe.py`, whose grouped linear layer this
uses.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface, _grouped_linear

from mone_export.artifacts import ExpertStats
from mone_export.errors import MoneError
from mone_export.model import expert_modules

_NAME = "mone_observed"
_CACHED_ROWS = 128  # of float64 output: 2 MB at 2048 channels
_CANCELLATION = 1e-3  # a difference that small has lost 3 of float64's 16 digits


@contextmanager
def observe(model: PreTrainedModel) -> Iterator[Mapping[int, ExpertStats]]:
    """Collect the statistics of every forward pass inside the block, per layer number.

    Every token of a batch counts: batches must hold no padding. On leaving, the model is as it was before.
    """
    stats: dict[int, ExpertStats] = {}
    layer_of: dict[Any, int] = {}
    for layer, module in expert_modules(model):
        if layer in stats:
            raise MoneError(f"layer {layer} has several expert stacks; such models are not supported")
        stats[layer] = ExpertStats.empty(*_shape(module))
        layer_of[module] = layer

    def forward(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        n_expert, width = _shape(module)
        n_token, top_k = top_k_index.shape
        ids, order = torch.sort(top_k_index.reshape(-1))  # [n_token * top_k], slots grouped by expert
        count = torch.bincount(ids, minlength=n_expert)
        gates = top_k_weights.reshape(-1)[order]
        dtype = torch.result_type(module.down_proj, gates)
        weighted = torch.empty(len(order), width, dtype=dtype, device=hidden.device)  # slots as they came
        sums = _Sums(count, width)
        for experts, slots in _blocks(count):
            outputs = _expert_outputs(module, hidden[order[slots] // top_k], experts, ids[slots], count)
            sums.add(experts, outputs, gates[slots])
            weighted[order[slots]] = outputs * gates[slots].unsqueeze(-1)
        layer = layer_of[module]
        gram = _gate_gram(top_k_index, top_k_weights, n_expert)
        stats[layer] = stats[layer].merge(replace(sums.stats(n_token=n_token), gate_gram=gram))
        return weighted.view(n_token, top_k, -1).sum(dim=1).to(hidden.dtype)

    before = model.config._experts_implementation
    ExpertsInterface.register(_NAME, forward)
    model.set_experts_implementation(_NAME)
    try:
        yield stats
    finally:
        model.set_experts_implementation(before)


def expert_stats(outputs: Tensor, gates: Tensor, count: Tensor, *, n_token: int) -> ExpertStats:
    """Return the statistics of one batch, but for `gate_gram`, which needs the tokens side by side.

    Args:
        outputs: [n_slot, d], experts' outputs before weighting, grouped by ascending expert.
        gates: [n_slot], the weights that multiply them.
        count: int64 [n_expert], slots of each expert; sums to n_slot.
        n_token: tokens the batch holds.
    """
    sums = _Sums(count, outputs.shape[1])
    sums.add(slice(0, len(count)), outputs, gates)
    return sums.stats(n_token=n_token)


class _Sums:
    """The statistics of one batch in the making: experts come block by block."""

    def __init__(self, count: Tensor, width: int) -> None:
        self._sizes = count.tolist()
        self._batch = ExpertStats.empty(len(self._sizes), width)
        # one buffer for all experts: fresh memory for each would cost more than the arithmetic
        n_row = min(max(self._sizes), _CACHED_ROWS) if count.is_cpu else max(self._sizes)
        self._scratch = torch.empty(n_row, width, dtype=torch.float64, device=count.device)

    def add(self, experts: slice, outputs: Tensor, gates: Tensor) -> None:
        """Add the outputs [n_slot, d] of a block of experts, grouped by expert, and their gates [n_slot]."""
        sizes = self._sizes[experts]
        rows = zip(outputs.split(sizes), gates.double().split(sizes), strict=True)
        for expert, (f, g) in enumerate(rows, start=experts.start):
            if len(g):
                self._add_expert(expert, f, g)

    def stats(self, *, n_token: int) -> ExpertStats:
        """Return the sums; all experts must have been added."""
        return replace(self._batch, n_token=n_token, count=torch.tensor(self._sizes))

    def _add_expert(self, expert: int, f: Tensor, g: Tensor) -> None:
        """Write the sums over one expert's tokens, f [n, d] and g [n], into row `expert`."""
        batch, n_row = self._batch, len(self._scratch)
        g_sq = g.square()
        powers = torch.stack((torch.ones_like(g), g, g_sq))  # [3, n]
        sums = torch.zeros(3, f.shape[1], dtype=torch.float64, device=f.device)
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


def _blocks(count: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield the experts to run together, with their slots: all at once on a GPU, one by one on a CPU.

    There a grouped product is a loop over experts anyway, and rows that stay in the cache are worth more than
    all the statistics cost.
    """
    sizes = count.tolist()
    if not count.is_cpu:
        yield slice(0, len(sizes)), slice(0, sum(sizes))
        return
    start = 0
    for expert, size in enumerate(sizes):
        if size:
            yield slice(expert, expert + 1), slice(start, start + size)
        start += size


def _expert_outputs(module: Any, rows: Tensor, experts: slice, ids: Tensor, count: Tensor) -> Tensor:
    """Run rows [n_slot, d], grouped by expert, through a block of experts; outputs before weighting.

    `ids` [n_slot] names each row's expert, `count` [n_expert] all experts' numbers of rows.
    """
    ends = torch.cumsum(count[experts], dim=0, dtype=torch.int32)

    def linear(x: Tensor, name: str) -> Tensor:
        weight = getattr(module, name)[experts]
        bias = getattr(module, f"{name}_bias")[ids] if module.has_bias else None
        return _grouped_linear(x, weight, ends, bias=bias, is_transposed=module.is_transposed)

    if module.has_gate:
        hidden = module._apply_gate(linear(rows, "gate_up_proj"))
    else:
        hidden = module.act_fn(linear(rows, "up_proj"))
    outputs = linear(hidden, "down_proj")
    return outputs if not module.has_post_expert_norm else module.post_expert_norm(outputs)


def _gate_gram(top_k_index: Tensor, top_k_weights: Tensor, n_expert: int) -> Tensor:
    """Return sum over tokens of g_e g_e' for experts selected together, [n_expert, n_expert]."""
    gates = torch.zeros(len(top_k_index), n_expert, dtype=torch.float64, device=top_k_index.device)
    gates.scatter_(1, top_k_index, top_k_weights.double())
    return (gates.T @ gates).cpu()


def _shape(module: Any) -> tuple[int, int]:
    """Return (n_expert, output width) of an experts module."""
    n_expert, *widths = module.down_proj.shape
    return n_expert, widths[1 if module.is_transposed else 0]
