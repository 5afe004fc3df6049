"""The second pass of thin experts in PyTorch: the hidden activations of every expert, over the text again.

Streamed layers are written as soon as the next one begins; of a model in memory as many layers as there is
room for are measured in one pass, and the next ones in another (`channel_sums`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mone_export.architectures import factor_after_experts
from mone_export.artifacts import ChannelStats, Corpus
from mone_export.calibration.channel_sums import ChannelSums, groups, pass_name
from mone_export.calibration.loading import Model
from mone_export.calibration.masking import standing_in
from mone_export.calibration.observer import hidden_channels, outputs_of
from mone_export.calibration.passes import Pass
from mone_export.calibration.rows import Layers
from mone_export.runtime import Progress
from mone_export.source.shape import expert_modules


def measure_channels(
    model: Model,
    corpus: Corpus,
    folder: Path,
    *,
    memory: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Run the text once more and leave each layer's `ChannelStats` in a folder."""
    layers = model.spec.moe_layers
    for group in [layers] if model.files else groups(model.spec, layers, memory):
        what = pass_name(group, layers)
        with torch.inference_mode(), _observed(model, group, folder) as found:
            Pass(model, corpus.tokens, memory=memory, progress=progress, what=what).run(found)


@contextmanager
def _observed(model: Model, layers: Sequence[int], folder: Path) -> Iterator[Layers]:
    found: Layers = {}
    factor = factor_after_experts(model.spec.arch, model.module.config.get_text_config())
    watched = _Watched(found, folder, factor, at_once=model.files is None)
    forwards = {
        experts: _MeasuredChannels(experts, layer, watched)
        for layer, experts in expert_modules(model.module)
        if layer in layers
    }
    with standing_in(forwards):
        yield found
    watched.finish()


class _Watched:
    """Takes what the layers' experts compute, and writes the sums of layers that are complete."""

    def __init__(self, found: Layers, folder: Path, factor: float, *, at_once: bool) -> None:
        self._found, self._folder, self._factor, self._at_once = found, folder, factor, at_once

    def add(self, layer: int, batch: ChannelStats) -> None:
        if not self._at_once:
            self.finish(except_for=layer)
        so_far = self._found.get(layer)
        self._found[layer] = so_far.merge(batch) if so_far else batch

    def finish(self, except_for: int | None = None) -> None:
        for layer in [layer for layer in self._found if layer != except_for]:
            self._found.pop(layer).weighted(self._factor).save(self._folder, layer)


class _MeasuredChannels:
    """The forward of an experts module that adds up its experts' hidden activations on the way."""

    def __init__(self, experts: Any, layer: int, watched: _Watched) -> None:
        self._experts, self._layer, self._watched = experts, layer, watched

    def __call__(self, hidden: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        top_k_index, weights = (*routing, *named.values())
        module, (n_token, top_k) = self._experts, top_k_index.shape
        n_expert = len(module.down_proj)
        ids, order = torch.sort(top_k_index.reshape(-1))
        gates = weights.reshape(-1)[order]
        count = torch.bincount(ids, minlength=n_expert)
        sums, start, weighted = None, 0, None
        for expert, size in enumerate(count.tolist()):
            own, one = slice(start, start + size), slice(expert, expert + 1)
            start += size
            if not size:
                continue
            rows = hidden[order[own] // top_k]
            channels = hidden_channels(module, rows, one, ids[own], count)
            outputs = outputs_of(module, channels, one, ids[own], count) * gates[own].unsqueeze(-1)
            if sums is None or weighted is None:
                sums = ChannelSums(n_expert, channels.shape[1])
                weighted = outputs.new_empty(len(order), outputs.shape[1])
            sums.add(expert, channels, gates[own])
            weighted[order[own]] = outputs
        assert sums is not None and weighted is not None, "a batch without tokens"
        self._watched.add(self._layer, sums.stats())
        return weighted.view(n_token, top_k, -1).sum(dim=1).to(hidden.dtype)
