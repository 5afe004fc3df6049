"""calibrate(): rows of text through the model, every expert's statistics out.

Two orders of the same work, which give the same sums: all layers for one batch of rows after the other, when
the model is in memory; all batches for one layer after the other, when its layers come one at a time, or when
what a layer hands on depends on what was found in it.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from mone_export import __version__
from mone_export.architectures import factor_after_experts
from mone_export.artifacts import Calibration, Corpus, ExpertStats, Part
from mone_export.calibration import ranks
from mone_export.calibration.checkpoint import Checkpoint
from mone_export.calibration.corpus import head
from mone_export.calibration.loading import Model
from mone_export.calibration.observer import observe
from mone_export.calibration.stability import Watch
from mone_export.calibration.streaming import RowStates, decoder_layers, only_layer
from mone_export.errors import MoneError
from mone_export.memory import free_memory
from mone_export.runtime import Progress

log = logging.getLogger(__name__)

TOKENS_PER_BATCH = 4096
SECONDS_PER_STEP = 60.0  # how much work a model in memory may lose

Layers = dict[int, ExpertStats]
Report = Callable[[int, int], None]  # rows done, of so many
HandOn = Callable[[int, ExpertStats], AbstractContextManager[None]]
"""From a layer and its statistics: in this context the layer computes what it hands on to the next."""


def calibrate(
    model: Model,
    corpus: Corpus,
    *,
    model_sha256: str,
    checkpoint: Checkpoint | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> Calibration:
    """Run the corpus through the model once and return the exact statistics of all its experts.

    Where `watch` says that the decision is stable, the rest of the corpus is left out: of a model in memory,
    in a single process.

    Rows are batched to about `TOKENS_PER_BATCH` tokens; the batch size does not change the result beyond
    float64 rounding of the sums and the matrix products' own. What a `checkpoint` holds is not computed
    again. Beyond half of `memory` (default: what is free), what streamed layers hand on goes to disk. Raises
    `MoneError` when the model's outputs are not finite.
    """
    tokens = ranks.share(corpus.tokens)
    if checkpoint:
        checkpoint.reserve(disk_needed(model, tokens.numel()))
    with torch.inference_mode(), observe(model.module) as layers:
        seen = run_rows(
            model, tokens, layers, checkpoint=checkpoint, memory=memory, progress=progress, stop=watch
        )
    corpus = head(corpus, seen) if seen < len(tokens) else corpus
    stats = ranks.merged({layer: finished(model, layers[layer]) for layer in sorted(layers)})
    _check_finite(stats)
    return Calibration(
        spec=model.spec,
        model_sha256=model_sha256,
        config=model.source.computing_config,
        made_with=made_with(model),
        corpus_sha256=corpus.sha256,
        corpus_name=corpus.name,
        n_token=corpus.tokens.numel(),
        layers=stats,
        parts=(Part(corpus.sha256, corpus.sources or {corpus.name: corpus.tokens.numel()}),),
    )


def made_with(model: Model) -> dict[str, str]:
    """Return what statistics of a model are computed by, as far as it may change a number."""
    return {
        "dtype": str(model.module.dtype).removeprefix("torch."),
        "device": model.module.device.type,
        "mone-export": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def finished(model: Model, stats: ExpertStats) -> ExpertStats:
    """Return a layer's statistics on the CPU, with the factor that the model applies after its experts."""
    factor = factor_after_experts(model.spec.arch, model.module.config.get_text_config())
    return stats.to("cpu").weighted(factor)


def run_rows(
    model: Model,
    tokens: Tensor,
    found: dict[int, Any],
    *,
    checkpoint: Checkpoint | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
    what: str = "calibrating",
    stop: Callable[[Layers], bool] | None = None,
    hand_on: HandOn | None = None,
) -> int:
    """Run rows of tokens [n_row, seq_len] once through the model, in the order its weights allow.

    `found` is where observers of the model put what they find, by layer, and never in place: what a pass that
    fails has put there is taken back. `stop` is asked after each batch whether `found` is enough; streamed
    layers do not stop. With `hand_on` each layer with experts computes twice: what `found` holds, and what it
    hands on. Returns the number of rows.
    """

    def report(done: int, total: int) -> None:
        if progress:
            progress(done * tokens.shape[1], total * tokens.shape[1], f"{what} (tokens{by_layer})")

    batches, by_layer = Batches(model, tokens), ", layer by layer" if model.files or hand_on else ""
    if model.files is None and hand_on is None:
        return _row_by_row(model, batches, found, checkpoint, report, stop)
    with ExitStack() as stack:
        folder = checkpoint.states if checkpoint else _spill(stack, model, tokens, memory)
        _layer_by_layer(model, batches, found, checkpoint, RowStates(folder), report, stop, hand_on)
    return len(tokens)


class Batches:
    """Rows of tokens [n_row, seq_len], as many at a time as the device's memory allows."""

    def __init__(self, model: Model, tokens: Tensor) -> None:
        """Start with what seems to fit."""
        self.tokens = tokens
        self.n_row = max(1, _tokens_per_batch(model) // tokens.shape[1])

    def run(self, forward: Callable[[range], None], layers: Layers, *, first: int = 0) -> Iterator[range]:
        """Call `forward` for all rows from `first` on, and yield the rows of each call when it is done.

        Where the device's memory does not suffice, half as many rows are tried from there on, and `layers`
        loses what the failed call has added.
        """
        while first < len(self.tokens):
            rows = range(first, min(first + self.n_row, len(self.tokens)))
            before = dict(layers)
            try:
                forward(rows)
            except torch.OutOfMemoryError:
                if len(rows) == 1:
                    raise MoneError(
                        f"one row of {self.tokens.shape[1]} tokens does not fit the device's memory: "
                        "pass a smaller --ctx-size, --stream on, or --device cpu"
                    ) from None
                self.n_row = (len(rows) + 1) // 2
                layers.clear()
                layers.update(before)
                log.info("out of memory with %d rows at a time: going on with %d", len(rows), self.n_row)
                continue
            first = rows.stop
            yield rows


def disk_needed(model: Model, n_token: int) -> int:
    """Return how many bytes a checkpoint of `n_token` tokens will take at most, about."""
    spec = model.spec
    stats = 8 * len(spec.moe_layers) * spec.n_expert * (3 * spec.hidden_size + 10)
    # two of each: the new is complete before the old goes
    return 2 * stats if model.files is None else stats + 2 * _state_bytes(model, n_token)


def _row_by_row(
    model: Model,
    batches: Batches,
    layers: Layers,
    checkpoint: Checkpoint | None,
    report: Report,
    stop: Callable[[Layers], bool] | None,
) -> int:
    """All layers for each batch: the model is in memory."""
    n_row = len(batches.tokens)
    done = 0
    if checkpoint and (steps := checkpoint.steps()):
        done = steps[-1]
        layers |= {layer: stats.to(model.module.device) for layer, stats in checkpoint.load(done).items()}
    saved = time.monotonic()

    report(done, n_row)
    for rows in batches.run(lambda rows: _forward(model, batches.tokens, rows), layers, first=done):
        report(rows.stop, n_row)
        if checkpoint and (rows.stop == n_row or time.monotonic() - saved >= SECONDS_PER_STEP):
            older = checkpoint.steps()
            checkpoint.save(rows.stop, {layer: stats.to("cpu") for layer, stats in layers.items()})
            for step in older:
                checkpoint.forget(step)
            saved = time.monotonic()
        if stop and stop(layers):
            return rows.stop
    return n_row


def _layer_by_layer(
    model: Model,
    batches: Batches,
    layers: Layers,
    checkpoint: Checkpoint | None,
    states: RowStates,
    report: Report,
    watch: Callable[[Layers], bool] | None,
    hand_on: HandOn | None,
) -> None:
    """All batches for each layer: streamed layers come one at a time."""
    n_row, files = len(batches.tokens), model.files
    decoder = files.layers if files else decoder_layers(model.module)[1]
    steps = checkpoint.steps() if checkpoint else []
    for step in steps:
        layers |= checkpoint.load(step) if checkpoint else {}
    first = steps[-1] if steps else 0
    states.drop(first - 2)
    report(first * n_row, len(decoder) * n_row)
    for number in files.each(first) if files else range(len(decoder)):
        started = time.monotonic()
        twice = hand_on is not None and number in model.spec.moe_layers
        with only_layer(decoder, number) as turn:

            def forward(rows: range, number: int = number, turn: Any = turn, keep: bool = not twice) -> None:
                turn.state = states.get(number - 1, rows, model.module.device)
                _forward(model, batches.tokens, rows)
                if keep:
                    states.put(number, rows.start, turn.state)

            for rows in batches.run(forward, layers):
                report(number * n_row + rows.stop, len(decoder) * n_row)
                if watch:
                    watch(layers)
            if hand_on and twice:
                seen = layers[number]
                with hand_on(number, finished(model, seen)):
                    for _ in batches.run(partial(forward, keep=True), layers):
                        pass
                layers[number] = seen  # without the second time
        if checkpoint:
            own = {number: layers[number].to("cpu")} if number in layers else {}
            checkpoint.save(number + 1, own)
        states.drop(number - 1)
        seconds = time.monotonic() - started
        log.debug("layer %d of %d: %d rows in %.1f s", number, len(decoder), n_row, seconds)


def _forward(model: Model, tokens: Tensor, rows: range) -> None:
    """Run rows through the model's body: logits of a large vocabulary would cost more memory than it."""
    input_ids = tokens[rows.start : rows.stop].to(model.module.device)
    model.module.base_model(input_ids=input_ids, use_cache=False)


def _tokens_per_batch(model: Model) -> int:
    """Return how many tokens to run at once: on a GPU, what a quarter of its free memory holds."""
    device, spec = model.module.device, model.spec
    if device.type == "cpu":
        return TOKENS_PER_BATCH
    # of each slot: rows in and out, weighted, a block of float64; the experts' intermediate values
    per_slot = (4 * spec.hidden_size + 4 * spec.expert_size) * model.module.dtype.itemsize + 8 * 1024
    fit = free_memory(str(device)) // 4 // (spec.top_k * per_slot)
    return max(TOKENS_PER_BATCH // 2, min(fit, 8 * TOKENS_PER_BATCH))


def _spill(stack: ExitStack, model: Model, tokens: Tensor, memory: int | None) -> Path | None:
    """Return a folder for what the layers hand on, where it would take more than half of the memory."""
    needed, room = _state_bytes(model, tokens.numel()), (memory or free_memory()) // 2
    if needed <= room:
        return None
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mone-export-"))
    log.info("%.2f GB of hidden states go to %s", 2 * needed / 1e9, folder)
    return Path(folder)


def _state_bytes(model: Model, n_token: int) -> int:
    width = int(model.module.config.get_text_config().hidden_size)
    return n_token * width * model.module.dtype.itemsize


def _check_finite(layers: Layers) -> None:
    for layer, stats in layers.items():
        if not torch.isfinite(stats.norm_sq_sum).all():
            raise MoneError(
                f"layer {layer}: expert outputs are not finite; the weights overflow in this precision: "
                "try --dtype float32 or bfloat16"
            )
