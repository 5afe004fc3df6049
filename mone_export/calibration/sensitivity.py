"""damage_by_layer(): how much the model's output changes when experts of one layer are pruned, for each.

The statistics say how far a layer's output strays, not how much harm that does. So a little text runs
through the model once whole and once for each layer with novices in that layer alone, and the last hidden
states are compared. A run starts where it begins to differ, from what the unpruned model hands to its layer:
all runs go through the layers together, so that streamed layers come once, and n layers cost the work of n/2
runs of the model. Hidden states, not logits: that saves the product with the vocabulary, and decides as well
(docs/methods.md).
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from mone_export.calibration.loading import Model
from mone_export.calibration.masking import masked
from mone_export.calibration.passes import Batches, decoder_of, forward
from mone_export.calibration.streaming import RowStates, Turn, only_layer
from mone_export.runtime import Progress

N_ROW, N_TOKEN = 8, 256
_UNPRUNED = -1  # among the numbers of pruned layers


def damage_by_layer(
    model: Model,
    tokens: Tensor,
    pruned: Mapping[int, Sequence[int]],
    novices: Mapping[int, Tensor],
    *,
    progress: Progress | None = None,
) -> dict[int, float]:
    """Return, for each layer of `pruned`, the mean of ||h' - h||^2 / ||h||^2 over some tokens.

    h is a token's last hidden state in the unpruned model, h' the one with `novices[layer]` [n_expert, d] in
    place of the experts `pruned[layer]`. Of `tokens`, int64 [n_row, seq_len], up to `N_ROW` evenly spaced
    rows take part with their first tokens, `N_TOKEN` or so few that this takes at most half the work of one
    pass over all; as many rows at once as the device's memory allows. Between layers one state per token is
    kept for each layer of `pruned`. Raises `MoneError` when not even one row fits.
    """
    rows = torch.linspace(0, len(tokens) - 1, min(N_ROW, len(tokens))).long()
    n_layer = len(decoder_of(model))
    most = max(16, tokens.numel() // n_layer // N_ROW)  # half the work of all the text
    probe = _Probe(model, tokens[rows, : min(N_TOKEN, most)], pruned, novices)
    with torch.inference_mode():
        for number in model.files.each() if model.files else range(n_layer):
            probe.run_layer(number)
            if progress:
                progress(number + 1, n_layer, "measuring how much layers matter (layers)")
    return probe.damage()


class _Probe:
    """The model unpruned, and once for each layer with novices in that layer alone, layer after layer."""

    def __init__(
        self,
        model: Model,
        tokens: Tensor,
        pruned: Mapping[int, Sequence[int]],
        novices: Mapping[int, Tensor],
    ) -> None:
        """Take what `damage_by_layer` takes, with the tokens that take part."""
        self._model, self._tokens, self._pruned, self._novices = model, tokens, pruned, novices
        self._decoder = decoder_of(model)
        self._batches = Batches(model, tokens)
        self._states = {_UNPRUNED: RowStates()}  # by the layer that is pruned
        self._last: dict[int, Tensor] = {}  # hidden states of the unpruned model, by row
        self._changes: dict[int, dict[int, Tensor]] = {}  # of each token, by pruned layer and row

    def run_layer(self, number: int) -> None:
        """Run all rows through one layer: of the unpruned model, and of each that is pruned up to here."""
        if number in self._pruned:
            self._states[number] = self._states[_UNPRUNED].copy()
        with only_layer(self._decoder, number) as turn:
            for which in self._states:
                with self._pruned_in(which) if which == number else nullcontext():
                    for _ in self._batches.run(partial(self._forward, number, which, turn), {}):
                        pass

    def damage(self) -> dict[int, float]:
        """Return the mean relative squared change of the last hidden states, by the layer that is pruned."""
        return {
            layer: float(torch.stack([by_row[row] for row in sorted(by_row)]).mean())
            for layer, by_row in self._changes.items()
        }

    def _forward(self, number: int, which: int, turn: Turn, rows: range) -> None:
        states = self._states[which]
        turn.state = states.get(number - 1, rows, self._model.module.device)
        hidden = forward(self._model, self._tokens, rows)
        assert turn.state is not None
        states.put(number, rows.start, turn.state)
        if number == len(self._decoder) - 1:
            self._compare(which, rows, hidden.float())

    def _compare(self, which: int, rows: range, last: Tensor) -> None:
        """Keep the last hidden states [n_row, n_token, d] of the unpruned model, or what changes in them."""
        for row, hidden in zip(rows, last, strict=True):
            if which == _UNPRUNED:  # comes first
                self._last[row] = hidden
            else:
                self._changes.setdefault(which, {})[row] = _change(self._last[row], hidden)

    def _pruned_in(self, layer: int) -> AbstractContextManager[None]:
        return masked(self._model.module, {layer: self._pruned[layer]}, {layer: self._novices[layer]})


def _change(before: Tensor, after: Tensor) -> Tensor:
    """Return the relative squared change of each token, from and to [n_token, d]."""
    return (after - before).square().sum(-1) / before.square().sum(-1).clamp(min=1e-30)
