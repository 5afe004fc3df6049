"""damage_by_layer(): what the model makes of it when experts of one layer are pruned, for each layer.

The statistics say how far a layer's output strays, not how much the model minds. So a little text runs
through the model once whole and once for each layer with novices in that layer alone, and the last hidden
states are compared. A run starts where it begins to differ, from what the unpruned model hands to its layer:
all runs go through the layers together, so that streamed layers come once, and n layers cost the work of n/2
runs of the model. Hidden states, not logits: that spares the product with the vocabulary, and decides as well
(docs/methods.md).
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from mone_export.calibration.loading import Model
from mone_export.calibration.masking import masked
from mone_export.calibration.streaming import State, decoder_layers, only_layer
from mone_export.runtime import Progress

N_ROW, N_TOKEN = 8, 256


def damage_by_layer(
    model: Model,
    tokens: Tensor,
    pruned: Mapping[int, Sequence[int]],
    vectors: Mapping[int, Tensor],
    *,
    progress: Progress | None = None,
) -> dict[int, float]:
    """Return, for each layer of `pruned`, the mean of ||h' - h||^2 / ||h||^2 over some tokens.

    h is a token's last hidden state in the unpruned model, h' the one with `vectors[layer]` [n_expert, d] in
    place of the experts `pruned[layer]`. Of `tokens`, int64 [n_row, seq_len], up to `N_ROW` evenly spaced
    rows take part with their first tokens, `N_TOKEN` or so few that this takes at most half the work of one
    pass over all. Between layers one state per token is kept for each layer of `pruned`.
    """
    rows = torch.linspace(0, len(tokens) - 1, min(N_ROW, len(tokens))).long()
    files = model.files
    decoder = files.layers if files else decoder_layers(model.module)[1]
    most = max(16, tokens.numel() // len(decoder) // N_ROW)  # half the work of all the text
    probe = tokens[rows, : min(N_TOKEN, most)].to(model.module.device)
    states: dict[int, State | None] = {-1: None}  # by the layer that is pruned; -1: none is
    unpruned, damage = torch.empty(0), {}
    with torch.inference_mode():
        for number in files.each() if files else range(len(decoder)):
            with only_layer(decoder, number) as turn:
                if number in pruned:
                    states[number] = states[-1]
                for which, before in states.items():
                    novices: Any = nullcontext()
                    if which == number:
                        novices = masked(model.module, {number: pruned[number]}, {number: vectors[number]})
                    turn.state = tree_map(_copy, before)
                    with novices:
                        found = model.module.base_model(input_ids=probe, use_cache=False)[0]
                    states[which] = turn.state
                    if number == len(decoder) - 1:
                        if which == -1:  # comes first
                            unpruned = found.float()
                        else:
                            damage[which] = _change(unpruned, found.float())
            if progress:
                progress(number + 1, len(decoder), "measuring how much layers matter (layers)")
    return {layer: float(change) for layer, change in damage.items()}


def _copy(leaf: Any) -> Any:
    """Let a layer that works in place do so on its own copy."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _change(before: Tensor, after: Tensor) -> Tensor:
    """Return the mean over tokens of the relative squared change, [n_row, n_token, d] each."""
    return ((after - before).square().sum(-1) / before.square().sum(-1).clamp(min=1e-30)).mean()
