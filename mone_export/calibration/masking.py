"""The loaded model as it would be after pruning: novices in place of experts, and nothing rebuilt.

An experts module adds up `g_e E_e(x)` over the selected experts. With the weights of pruned experts set to
zero it gives what the kept ones contribute, with those of kept ones set to zero what the pruned ones do;
neither needs to know how a family computes its experts, and both work under `observe`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mone_export.artifacts import Calibration, Corpus, ExpertStats, Plan, Residual
from mone_export.calibration.loading import Model
from mone_export.calibration.observer import observe, run_experts
from mone_export.calibration.passes import Pass, finished
from mone_export.runtime import Progress
from mone_export.source.shape import expert_modules


@contextmanager
def masked(
    model: PreTrainedModel, pruned: Mapping[int, Sequence[int]], novices: Mapping[int, Tensor]
) -> Iterator[None]:
    """Let `novices[layer]` [n_expert, d] answer for the experts `pruned[layer]` inside the block."""
    forwards = {
        experts: Masked(experts, pruned[layer], novices[layer])
        for layer, experts in expert_modules(model)
        if len(pruned.get(layer, ()))
    }
    with standing_in(forwards):
        yield


class Masked:
    """The forward of an experts module in which novices stand in for the pruned experts."""

    def __init__(self, experts: Any, pruned: Sequence[int], novices: Tensor) -> None:
        """Prune the experts `pruned`; their rows of `novices` [n_expert, d] answer."""
        self._experts, self._pruned = experts, pruned
        self._novices = novices.to(experts.down_proj)

    def __call__(self, hidden: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        """Compute hidden [n_token, d] with the experts' ids and weights, [n_token, top_k] each.

        Where a block weights what goes into the experts, hidden comes alone, [n_expert * n_token, d].
        """
        routing = (*routing, *named.values())
        return self._routed(hidden, *routing) if routing else self._weighted(hidden)

    def _routed(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gone = _mask(self._pruned, self._experts, ids.device)[ids]  # [n_token, top_k]
        kept = run_experts(self._experts, hidden, ids, weights * ~gone)
        novices = self._novices
        spread = torch.zeros(len(ids), len(novices), dtype=novices.dtype, device=ids.device)
        spread.scatter_(1, ids, (weights * gone).to(novices.dtype))
        return kept + (spread @ novices).to(kept.dtype)

    def _weighted(self, hidden: Tensor) -> Tensor:
        output, novices = run_experts(self._experts, hidden), self._novices
        by_expert = output.view(len(novices), -1, hidden.shape[-1])
        selected = hidden.view_as(by_expert).any(-1, keepdim=True)  # all other rows are zero
        gone = _mask(self._pruned, self._experts, hidden.device)[:, None, None]
        return torch.where(gone, selected * novices[:, None], by_expert).view_as(output)


def measure_residuals(
    model: Model, corpus: Corpus, plan: Plan, *, memory: int | None = None, progress: Progress | None = None
) -> dict[int, Residual]:
    """Run the text once more through the unpruned model: what did each layer's pruned experts add to it?"""
    with torch.inference_mode(), _observed_residuals(model.module, plan) as found:
        Pass(model, corpus.tokens, memory=memory, progress=progress, what="second pass").run(found)
    return found


def recalibrate(
    model: Model,
    corpus: Corpus,
    calibration: Calibration,
    decide: Callable[[Calibration], Plan],
    novices_of: Callable[[ExpertStats], Tensor],
    *,
    memory: int | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Measure each layer again after the layers before it have been pruned, in their order.

    `decide` gives the plan that statistics lead to, each layer by itself, `novices_of` a layer's novices. All
    text runs through a layer twice, first whole, to be measured, then pruned, for the layers after it.
    """

    def pruned(layer: int, stats: ExpertStats) -> AbstractContextManager[None]:
        so_far = replace(calibration, layers={**calibration.layers, layer: stats})
        experts = next(part.pruned for part in decide(so_far).layers if part.layer == layer)
        return masked(model.module, {layer: experts}, {layer: novices_of(stats)})

    with torch.inference_mode(), observe(model.module) as layers:
        Pass(model, corpus.tokens, memory=memory, progress=progress).run(layers, hand_on=pruned)
    return replace(calibration, layers={layer: finished(model, layers[layer]) for layer in sorted(layers)})


class Divergence:
    """How far a model with novices strays from the unpruned one on some rows of text."""

    def __init__(self, model: Model, rows: Tensor, *, n_position: int = 64) -> None:
        """Take rows int64 [n_row, seq_len]; in each, `n_position` evenly spaced predictions are compared."""
        self._model = model.module
        self._rows = rows
        last = rows.shape[1] - 1
        self._positions = torch.linspace(0, last, min(n_position, last + 1)).long().unique()
        self._wanted = self._log_probabilities()

    def __call__(self, pruned: Mapping[int, Sequence[int]], novices: Mapping[int, Tensor]) -> float:
        """Return the mean KL(unpruned || pruned) in nats with `novices` in place of `pruned` experts."""
        with masked(self._model, pruned, novices):
            found = self._log_probabilities()
        return float((self._wanted.exp() * (self._wanted - found)).sum(-1).double().mean())

    def _log_probabilities(self) -> Tensor:
        device = self._model.device
        keep = self._positions.to(device)
        with torch.inference_mode():
            logits = [
                self._model(input_ids=row[None].to(device), use_cache=False, logits_to_keep=keep).logits
                for row in self._rows
            ]
            return torch.cat(logits).float().log_softmax(-1)  # [n_row, n_position, n_vocab]


@contextmanager
def _observed_residuals(model: PreTrainedModel, plan: Plan) -> Iterator[dict[int, Residual]]:
    pruned = {layer.layer: layer.pruned for layer in plan.layers if layer.pruned}
    found: dict[int, Residual] = {}
    forwards = {
        experts: _MeasuredResidual(experts, pruned[layer], layer, found)
        for layer, experts in expert_modules(model)
        if layer in pruned
    }
    with standing_in(forwards):
        yield found


class _MeasuredResidual:
    """The forward of an experts module that adds what its pruned experts contribute to `found[layer]`."""

    def __init__(self, experts: Any, pruned: Sequence[int], layer: int, found: dict[int, Residual]) -> None:
        self._experts, self._pruned = experts, pruned
        self._layer, self._found = layer, found

    def __call__(self, hidden: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        ids, weights = (*routing, *named.values())
        is_pruned = _mask(self._pruned, self._experts, ids.device)
        gates = weights * is_pruned[ids]  # [n_token, top_k]
        residual = run_experts(self._experts, hidden, ids, gates).double()  # [n_token, d]
        spread = torch.zeros(len(ids), len(is_pruned), dtype=torch.float64, device=ids.device)
        spread.scatter_(1, ids, gates.double())
        part = Residual(
            gram=(spread.T @ spread).cpu(),
            cross=(spread.T @ residual).cpu(),
            norm_sq=float(residual.square().sum()),
        )
        so_far = self._found.get(self._layer)
        self._found[self._layer] = so_far.merge(part) if so_far else part
        return run_experts(self._experts, hidden, ids, weights)


@contextmanager
def standing_in(forwards: Mapping[Any, Any]) -> Iterator[None]:
    """Let each of `forwards` stand in for the forward of its experts module inside the block."""
    before = {experts: vars(experts).get("forward") for experts in forwards}  # of an observer
    try:
        for experts, forward in forwards.items():
            experts.forward = forward
        yield
    finally:
        for experts, forward_before in before.items():
            vars(experts).pop("forward", None)
            if forward_before:
                experts.forward = forward_before


def _mask(ids: Sequence[int], experts: Any, device: torch.device) -> Tensor:
    """Return bool [n_expert], true for `ids`."""
    mask = torch.zeros(len(experts.down_proj), dtype=torch.bool, device=device)
    mask[list(ids)] = True
    return mask
