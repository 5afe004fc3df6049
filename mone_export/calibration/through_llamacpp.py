"""Calibration of a GGUF: llama.cpp computes, an eval callback looks on. Nothing here needs transformers.

The same statistics, and the same measurements on a model with novices, as `passes.py`, `masking.py` and
`sensitivity.py` take from a model in PyTorch. llama.cpp has the whole model in memory; it holds its layers in
one graph, so that a run always begins at the first one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mone_export import __version__
from mone_export.artifacts import (
    Calibration,
    ChannelStats,
    Corpus,
    ExpertStats,
    MoeSpec,
    Plan,
    Residual,
    by_layer,
)
from mone_export.calibration.channel_sums import ChannelSums, groups, pass_name
from mone_export.calibration.eval_callback import Mask, Routed, Tap
from mone_export.calibration.llama_model import LlamaModel
from mone_export.calibration.rows import (
    Layers,
    add_to,
    calibration_of,
    check_finite,
    row_by_row,
    stats_bytes,
)
from mone_export.calibration.sums import routed_stats
from mone_export.calibration.work_folder import WorkFolder
from mone_export.errors import MoneError
from mone_export.llama_options import LlamaOptions
from mone_export.runtime import Progress

N_ROW, N_TOKEN = 8, 256  # what `damage_by_layer` runs: as in `sensitivity`, for the same decisions
_N_THREAD = 8  # for statistics: beyond, Python itself would be what they wait for


class LlamaEngine:
    """A GGUF in llama.cpp, with all that a calibration asks of a model; a context manager.

    `calibrate` does what `passes.calibrate` does, the other methods what functions of their names do in
    `masking.py` and `sensitivity.py`, and they raise `MoneError` where llama.cpp cannot compute, or hides the
    experts of an architecture.
    """

    def __init__(self, path: Path, spec: MoeSpec, *, options: LlamaOptions | None = None) -> None:
        """Load the model; raises `MoneError` with llama.cpp's own reason where it cannot."""
        self._spec = spec
        self._model = LlamaModel(path, options or LlamaOptions())
        self._pool = ThreadPoolExecutor(min(self._model.n_thread, _N_THREAD))

    def __enter__(self) -> "LlamaEngine":
        """Return the engine itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free the model."""
        self.close()

    def close(self) -> None:
        """Free the model."""
        self._model.close()
        self._pool.shutdown()

    def observe(
        self,
        corpus: Corpus,
        *,
        model_sha256: str,
        config: Mapping[str, Any],
        work: WorkFolder | None = None,
        progress: Progress | None = None,
        watch: Callable[[dict[int, ExpertStats]], bool] | None = None,
    ) -> Calibration:
        """Run the corpus once and return the exact statistics of all experts, and of the matrices' inputs.

        Where `watch` says that the decision is stable, the rest of the corpus is left out. What `work` holds
        is not computed again. `config` is the part of the model's that decides what is computed. Raises
        `MoneError` when the model's outputs are not finite.
        """
        if work:
            work.reserve(2 * stats_bytes(self._spec))  # the new is complete before the old goes
        found: Layers = {}
        tap = Tap(self._spec.moe_layers, partial(self._add, found), inputs=partial(add_to, found))
        seen = row_by_row(
            lambda first: self._batches(corpus.tokens, tap, first),
            found,
            n_row=len(corpus.tokens),
            work=work,
            report=_tokens(progress, corpus, "calibrating"),
            stop=(lambda found: watch(by_layer(found))) if watch else None,
        )
        check_finite(by_layer(found), "calibrate the original checkpoint")
        return calibration_of(
            found,
            _first_rows(corpus, seen),
            spec=self._spec,
            model_sha256=model_sha256,
            config=config,
            made_with=self.made_with(),
        )

    def made_with(self) -> dict[str, str]:
        """Return what statistics are computed by, as far as it may change a number."""
        return {
            "device": "llama.cpp",
            "mone-export": __version__,
            "torch": torch.__version__,
            "llama-cpp-python": self._model.version,
        }

    def damage_by_layer(
        self,
        tokens: Tensor,
        pruned: Mapping[int, Sequence[int]],
        novices: Mapping[int, Tensor],
        *,
        progress: Progress | None = None,
    ) -> dict[int, float]:
        """Return, for each layer of `pruned`, the mean of ||h' - h||^2 / ||h||^2 over some tokens.

        As `sensitivity.damage_by_layer`, of the same tokens; all runs go through the whole model, which takes
        at most as long as one pass over all text.
        """
        rows = torch.linspace(0, len(tokens) - 1, min(N_ROW, len(tokens))).long()
        most = max(16, tokens.numel() // self._spec.n_layer // N_ROW)
        tokens = tokens[rows, : min(N_TOKEN, most)]
        before, found = self._last_hidden(tokens, {}), {}
        for number, layer in enumerate(pruned, start=1):
            masks = self.masks({layer: pruned[layer]}, novices)
            after = self._last_hidden(tokens, masks)
            change = (after - before).square().sum(-1) / before.square().sum(-1).clamp(min=1e-30)
            found[layer] = float(change.mean())
            if progress:
                progress(number, len(pruned), "measuring how much layers matter (layers)")
        return found

    def measure_residuals(
        self, corpus: Corpus, plan: Plan, *, progress: Progress | None = None
    ) -> dict[int, Residual]:
        """Run the text once more through the unpruned model: what did each layer's pruned experts add?"""
        pruned = {layer.layer: layer.pruned for layer in plan.layers if layer.pruned}
        gone = {layer: self._gone(experts) for layer, experts in pruned.items()}
        found: dict[int, Residual] = {}

        def see(layer: int, routed: Routed) -> None:
            part = _residual(routed, gone[layer])
            found[layer] = found[layer].merge(part) if layer in found else part

        report = _tokens(progress, corpus, "second pass")
        for rows in self._batches(corpus.tokens, Tap(tuple(pruned), see)):
            report(rows.stop, len(corpus.tokens))
        return found

    def measure_channels(self, corpus: Corpus, folder: Path, *, progress: Progress | None = None) -> None:
        """Leave what thin experts are made of in a folder, layer by layer: as `channels.measure_channels`."""
        layers = list(self._spec.moe_layers)
        for group in groups(self._spec, layers, None):
            found: dict[int, ChannelStats] = {}
            tap = Tap(group, partial(self._add_channels, found), channels=True)
            report = _tokens(progress, corpus, pass_name(group, layers))
            for rows in self._batches(corpus.tokens, tap):
                report(rows.stop, len(corpus.tokens))
            for layer, stats in found.items():
                stats.save(folder, layer)

    def _add_channels(self, found: dict[int, ChannelStats], layer: int, routed: Routed) -> None:
        assert routed.channels is not None
        rows, gates, ids = routed.channels.flatten(0, 1), routed.gates.flatten(), routed.ids.flatten()
        sums = ChannelSums(self._spec.n_expert, rows.shape[1])
        ids, order = torch.sort(ids)
        slots = order.split(torch.bincount(ids, minlength=self._spec.n_expert).tolist())

        def add(expert: int) -> None:
            own = slots[expert]
            if len(own):
                sums.add(expert, rows[own], gates[own])

        for _ in self._pool.map(add, range(self._spec.n_expert)):
            pass
        batch = sums.stats()
        found[layer] = found[layer].merge(batch) if layer in found else batch

    def recalibrate(
        self,
        corpus: Corpus,
        calibration: Calibration,
        decide: Callable[[Calibration], Plan],
        novices_of: Callable[[ExpertStats], Tensor],
        *,
        progress: Progress | None = None,
    ) -> Calibration:
        """Measure each layer again after the layers before it have been pruned, in their order.

        `decide` gives the plan that statistics lead to, each layer by itself, `novices_of` a layer's novices.
        All text runs once for each layer, as far as that layer.
        """
        found: dict[int, ExpertStats] = {}
        masks: dict[int, Mask] = {}
        n_layer, n_row = len(self._spec.moe_layers), len(corpus.tokens)
        report = _tokens(progress, corpus, "calibrating")
        for number, layer in enumerate(self._spec.moe_layers):
            tap = Tap((layer,), partial(self._add, found), masks, until=layer)
            for rows in self._batches(corpus.tokens, tap):
                report(number * n_row + rows.stop, n_layer * n_row)
            so_far = replace(calibration, layers={**calibration.layers, layer: found[layer]})
            experts = next(part.pruned for part in decide(so_far).layers if part.layer == layer)
            masks |= self.masks({layer: experts}, {layer: novices_of(found[layer])})
        return replace(calibration, layers=found)

    def divergence(
        self, rows: Tensor, n_position: int = 64
    ) -> Callable[[Mapping[int, Sequence[int]], Mapping[int, Tensor]], float]:
        """Return a function like `masking.Divergence` for rows int64 [n_row, seq_len].

        From pruned experts and novices it gives the mean KL(unpruned || pruned) in nats over `n_position`
        evenly spaced predictions of each row.
        """
        last = rows.shape[1] - 1
        outputs = torch.zeros(rows.shape[1], dtype=torch.bool)
        outputs[torch.linspace(0, last, min(n_position, last + 1)).long()] = True

        def log_probabilities(masks: Mapping[int, Mask]) -> Tensor:
            tap = Tap(masks=masks, logits=True)
            return torch.stack([self._model.logits(row, tap, outputs).log_softmax(-1) for row in rows])

        wanted = log_probabilities({})

        def measured(pruned: Mapping[int, Sequence[int]], novices: Mapping[int, Tensor]) -> float:
            found = log_probabilities(self.masks(pruned, novices))
            return float((wanted.exp() * (wanted - found)).sum(-1).double().mean())

        return measured

    def _add(self, found: Layers, layer: int, routed: Routed) -> None:
        outputs, gates, ids = routed.outputs, routed.gates, routed.ids
        add_to(found, layer, routed_stats(outputs, gates, ids, self._spec.n_expert, pool=self._pool))

    def _batches(self, tokens: Tensor, tap: Tap, first: int = 0) -> Iterator[range]:
        """Run the rows from `first` on, and yield those of each batch when it is done."""
        n_row = self._model.rows_at_once(tokens.shape[1])
        wanted = sorted({*tap.layers, *tap.masks})
        for start in range(first, len(tokens), n_row):
            rows = range(start, min(start + n_row, len(tokens)))
            for seen in self._model.run(tokens[rows.start : rows.stop], tap):
                if sorted(seen) != wanted:
                    raise MoneError(
                        f"of the layers {wanted} only {sorted(seen)} could be observed in llama.cpp: export "
                        "the original checkpoint instead"
                    )
            yield rows

    def _last_hidden(self, tokens: Tensor, masks: Mapping[int, Mask]) -> Tensor:
        """Return the last hidden states [n_token, d] of all rows with novices where `masks` says."""
        found: list[Tensor] = []
        for _ in self._batches(tokens, Tap(masks=masks, hidden=lambda last: found.append(last.clone()))):
            pass
        if not found:
            raise MoneError("llama.cpp does not name this model's last hidden states")
        return torch.cat(found)

    def masks(self, pruned: Mapping[int, Sequence[int]], novices: Mapping[int, Tensor]) -> dict[int, Mask]:
        """Return novices [n_expert, d] in the place of each layer's pruned experts, for a `Tap`."""
        return {
            layer: Mask(self._gone(experts).numpy(), novices[layer].float().numpy())
            for layer, experts in pruned.items()
            if len(experts)
        }

    def _gone(self, experts: Sequence[int]) -> Tensor:
        """Return bool [n_expert], true for `experts`."""
        gone = torch.zeros(self._spec.n_expert, dtype=torch.bool)
        gone[list(experts)] = True
        return gone


def _residual(routed: Routed, gone: Tensor) -> Residual:
    """Return what the experts `gone` bool [n_expert] add to the output of a batch."""
    gates = (routed.gates * gone[routed.ids]).unsqueeze(1)  # [n_token, 1, top_k]
    residual = torch.bmm(gates, routed.outputs).squeeze(1).double()  # [n_token, d]
    spread = torch.zeros(len(residual), len(gone), dtype=torch.float64)
    spread.scatter_(1, routed.ids, gates.squeeze(1).double())
    return Residual(spread.T @ spread, spread.T @ residual, float(residual.square().sum()))


def _tokens(progress: Progress | None, corpus: Corpus, what: str) -> Callable[[int, int], None]:
    """Return what tells the progress how many rows are done, of how many, as tokens."""
    seq_len = corpus.tokens.shape[1]

    def report(n_row: int, n_row_total: int) -> None:
        if progress:
            progress(n_row * seq_len, n_row_total * seq_len, f"{what} (tokens)")

    return report


def _first_rows(corpus: Corpus, n_row: int) -> Corpus:
    if n_row == len(corpus.tokens):
        return corpus
    from mone_export.calibration.corpus import head  # which leads to tokenizers, and to transformers

    return head(corpus, n_row)
