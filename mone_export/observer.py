"""The reading seam: sees every expert's output in any model behind transformers' experts interface.

While a model is observed, its experts run under a name of our own: a forward that makes the same calls as
transformers' `grouped_mm` implementation (the fastest one, and the default), and looks at the rows between
the down projection and the weighting. Nothing here knows a family, and the model's output stays equal bit for
bit.

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
        n_expert, _ = _shape(module)
        n_token, top_k = top_k_index.shape
        ids, order = torch.sort(top_k_index.reshape(-1))  # [n_token * top_k], slots grouped by expert
        count = torch.bincount(ids, minlength=n_expert)
        outputs = _expert_outputs(module, hidden[order // top_k], ids, count)  # [n_token * top_k, d]
        gates = top_k_weights.reshape(-1)[order]
        layer = layer_of[module]
        batch = expert_stats(outputs, gates, count, n_token=n_token)
        gram = _gate_gram(top_k_index, top_k_weights, n_expert)
        stats[layer] = stats[layer].merge(replace(batch, gate_gram=gram))
        weighted = outputs * gates.unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return weighted[back].view(n_token, top_k, -1).sum(dim=1).to(hidden.dtype)

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
    hidden_size = outputs.shape[1]
    sizes = count.tolist()
    gates = gates.double()
    batch = ExpertStats.empty(len(sizes), hidden_size)
    # one buffer for all experts: fresh memory for each would cost more than the arithmetic
    scratch = torch.empty(max(sizes, default=0), hidden_size, dtype=torch.float64, device=outputs.device)
    for expert, (f, g) in enumerate(zip(outputs.split(sizes), gates.split(sizes), strict=True)):
        if len(g):
            _fill_expert(batch, expert, f, g, scratch[: len(g)])
    return replace(batch, n_token=n_token, count=count.cpu())


def _fill_expert(batch: ExpertStats, expert: int, f: Tensor, g: Tensor, f64: Tensor) -> None:
    """Write the sums over one expert's tokens, f [n, d] and g [n], into row `expert` of a batch's tensors."""
    f64.copy_(f)
    norm = torch.linalg.vector_norm(f64, dim=1)  # [n]
    g_sq, norm_sq = g.square(), norm.square()
    out_sum, gated, gated2 = torch.stack((torch.ones_like(g), g, g_sq)) @ f64  # each [d]
    mean = out_sum / len(g)
    batch.out_mean[expert] = mean
    batch.out_m2[expert] = torch.linalg.vector_norm(f64.sub_(mean)).square()
    batch.gated_out_sum[expert] = gated
    batch.gated2_out_sum[expert] = gated2
    batch.gate_sum[expert] = g.sum()
    batch.gate_sq_sum[expert] = g_sq.sum()
    batch.norm_sum[expert] = norm.sum()
    batch.norm_sq_sum[expert] = norm_sq.sum()
    batch.gated_norm_sum[expert] = g @ norm
    batch.gated2_norm_sq_sum[expert] = g_sq @ norm_sq
    low, high = torch.aminmax(f)
    batch.max_abs[expert] = torch.maximum(-low, high)


def _expert_outputs(module: Any, rows: Tensor, ids: Tensor, count: Tensor) -> Tensor:
    """Run rows [n_slot, d], grouped by expert, through experts `ids` [n_slot]; outputs before weighting."""
    ends = torch.cumsum(count, dim=0, dtype=torch.int32)

    def linear(x: Tensor, name: str) -> Tensor:
        bias = getattr(module, f"{name}_bias")[ids] if module.has_bias else None
        return _grouped_linear(x, getattr(module, name), ends, bias=bias, is_transposed=module.is_transposed)

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
