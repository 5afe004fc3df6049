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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from mone_export import __version__
from mone_export.architectures import factor_after_experts
from mone_export.artifacts import Calibration, Corpus, ExpertStats, InputSums, by_layer, by_matrix
from mone_export.calibration import ranks
from mone_export.calibration.corpus import head
from mone_export.calibration.loading import Model
from mone_export.calibration.observer import observe
from mone_export.calibration.rows import Layers, calibration_of, check_finite, row_by_row, stats_bytes
from mone_export.calibration.stability import Watch
from mone_export.calibration.streaming import RowStates, Turn, decoder_layers, only_layer
from mone_export.calibration.work_folder import WorkFolder
from mone_export.errors import MoneError
from mone_export.memory import free_memory
from mone_export.runtime import Progress
from mone_export.source.shape import misfit
from mone_export.terminal import as_size

log = logging.getLogger(__name__)

TOKENS_PER_BATCH = 4096

HandOn = Callable[[int, ExpertStats], AbstractContextManager[None]]
"""From a layer and its statistics: in this context the layer computes what it hands on to the next."""


def calibrate(
    model: Model,
    corpus: Corpus,
    *,
    model_sha256: str,
    work: WorkFolder | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> Calibration:
    """Run the corpus through the model once and return the exact statistics of all experts and inputs.

    Where `watch` says that the decision is stable, the rest of the corpus is left out: of a model in memory,
    in a single process.

    Rows are batched to about `TOKENS_PER_BATCH` tokens; the batch size does not change the result beyond
    float64 rounding of the sums and the matrix products' own. What `work` holds is not computed again.
    Beyond half of `memory` (default: what is free), what streamed layers hand on goes to disk. Raises
    `MoneError` when the model's outputs are not finite.
    """
    tokens = ranks.share(corpus.tokens)
    if work:
        work.reserve(disk_needed(model, tokens.numel()))
    with torch.inference_mode(), observe(model.module, inputs=True) as found:
        stop = (lambda found: watch(by_layer(found))) if watch else None
        seen = Pass(model, tokens, work=work, memory=memory, progress=progress).run(found, stop=stop)
    corpus = head(corpus, seen) if seen < len(tokens) else corpus
    own: dict[Any, ExpertStats | InputSums] = {
        layer: finished(model, stats) for layer, stats in by_layer(found).items()
    }
    own |= {matrix: sums.to("cpu") for matrix, sums in by_matrix(found).items()}
    merged = ranks.merged(own)
    check_finite(by_layer(merged), "try --dtype float32 or bfloat16")
    return calibration_of(
        merged,
        corpus,
        spec=model.spec,
        model_sha256=model_sha256,
        config=model.source.computing_config,
        made_with=made_with(model),
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


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """One pass of rows of tokens [n_row, seq_len] through a model, in the order its weights allow.

    What `work` holds is not computed again. Beyond half of `memory` bytes (default: what is free), what
    layers hand on goes to disk. `what` says in the progress what the pass is for.
    """

    model: Model
    tokens: Tensor
    work: WorkFolder | None = None
    memory: int | None = None
    progress: Progress | None = None
    what: str = "calibrating"

    def run(
        self, found: Layers, *, stop: Callable[[Layers], bool] | None = None, hand_on: HandOn | None = None
    ) -> int:
        """Run the rows, and return how many.

        Observers of the model put what they find into `found`; what a step that fails has put there is taken
        back. `stop` is asked after each batch whether `found` is enough; streamed layers do not stop. With
        `hand_on` each layer with experts computes twice: what `found` holds, and what it hands on.
        """
        if self.model.files is None and hand_on is None:
            return _row_by_row(self, found, stop)
        with ExitStack() as stack:
            folder = self.work.states if self.work else _spill(stack, self)
            _LayerByLayer(self, found, RowStates(folder), hand_on).run(stop)
        return len(self.tokens)

    def report(self, n_row: int, n_row_total: int, how: str = "") -> None:
        """Tell the progress how many rows are done, of how many."""
        if self.progress:
            seq_len = self.tokens.shape[1]
            self.progress(n_row * seq_len, n_row_total * seq_len, f"{self.what} (tokens{how})")


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
                torch.cuda.empty_cache()  # nothing where there is no GPU
                log.info("out of memory with %d rows at a time: going on with %d", len(rows), self.n_row)
                continue
            first = rows.stop
            yield rows


def disk_needed(model: Model, n_token: int) -> int:
    """Return how many bytes the work on `n_token` tokens will take on disk at most, about."""
    stats = stats_bytes(model.spec)
    # two of each: the new is complete before the old goes
    return 2 * stats if model.files is None else stats + 2 * _state_bytes(model, n_token)


def _row_by_row(run: Pass, found: Layers, stop: Callable[[Layers], bool] | None) -> int:
    """All layers for each batch: the model is in memory."""
    batches = Batches(run.model, run.tokens)
    return row_by_row(
        lambda first: batches.run(partial(_forward_rows, run), found, first=first),
        found,
        n_row=len(run.tokens),
        work=run.work,
        report=run.report,
        stop=stop,
        device=run.model.module.device,
    )


class _LayerByLayer:
    """All batches for each layer: streamed layers come one at a time."""

    def __init__(self, run: Pass, found: Layers, states: RowStates, hand_on: HandOn | None) -> None:
        """Take a pass, where its observers put what they find, and what its layers hand on."""
        self._run, self._found, self._states, self._hand_on = run, found, states, hand_on
        self._batches = Batches(run.model, run.tokens)
        self._decoder = decoder_of(run.model)

    def run(self, watch: Callable[[Layers], bool] | None) -> None:
        """Run all layers, from the first that is not finished on; `watch` is called after each batch."""
        work, files = self._run.work, self._run.model.files
        first = self._resume()
        for number in files.each(first) if files else range(len(self._decoder)):
            started, before = time.monotonic(), self._found.keys() | set()
            self._run_layer(number, watch)
            if work:
                own = self._found.keys() - before
                work.save(number + 1, {key: self._found[key].to("cpu") for key in own})
            self._states.drop(number - 1)
            seconds, n_layer = time.monotonic() - started, len(self._decoder)
            log.debug("layer %d of %d: %d rows in %.1f s", number, n_layer, len(self._run.tokens), seconds)

    def _resume(self) -> int:
        """Load what is finished, and return the first layer that is not."""
        work = self._run.work
        steps = work.steps() if work else []
        for step in steps:
            self._found |= work.load(step) if work else {}
        first = steps[-1] if steps else 0
        self._states.drop(first - 2)
        self._report(first, 0)
        return first

    def _run_layer(self, number: int, watch: Callable[[Layers], bool] | None) -> None:
        """Run all rows through one layer; twice where it hands on something else than what is measured."""
        hand_on = self._hand_on if number in self._run.model.spec.moe_layers else None
        with only_layer(self._decoder, number) as turn:
            forward = partial(self._forward, number, turn, keep=hand_on is None)
            for rows in self._batches.run(forward, self._found):
                self._report(number, rows.stop)
                if watch:
                    watch(self._found)
            if hand_on:
                seen = self._found[number]
                with hand_on(number, finished(self._run.model, seen)):
                    for _ in self._batches.run(partial(self._forward, number, turn, keep=True), self._found):
                        pass
                self._found[number] = seen  # without the second time

    def _forward(self, number: int, turn: Turn, rows: range, *, keep: bool) -> None:
        turn.state = self._states.get(number - 1, rows, self._run.model.module.device)
        _forward_rows(self._run, rows)
        if keep:
            assert turn.state is not None
            self._states.put(number, rows.start, turn.state)

    def _report(self, number: int, n_row: int) -> None:
        total = len(self._run.tokens)
        self._run.report(number * total + n_row, len(self._decoder) * total, ", layer by layer")


def decoder_of(model: Model) -> nn.ModuleList:
    """Return a model's decoder layers, with or without their weights."""
    return model.files.layers if model.files else decoder_layers(model.module)[1]


def _forward_rows(run: Pass, rows: range) -> None:
    forward(run.model, run.tokens, rows)


def forward(model: Model, tokens: Tensor, rows: range) -> Tensor:
    """Run rows through the model's body, and return its last hidden states [n_row, seq_len, d].

    Logits of a large vocabulary would cost more memory than the body. Raises `MoneError` where transformers'
    code of the model stumbles over its config.
    """
    input_ids = tokens[rows.start : rows.stop].to(model.module.device)
    try:
        hidden: Tensor = model.module.base_model(input_ids=input_ids, use_cache=False)[0]
    except (ArithmeticError, AttributeError, LookupError, NameError, TypeError, ValueError) as error:
        raise misfit("run", model.module.config, error) from None
    return hidden


def _tokens_per_batch(model: Model) -> int:
    """Return how many tokens to run at once: on a GPU, what a quarter of its free memory holds."""
    device, spec = model.module.device, model.spec
    if device.type == "cpu":
        return TOKENS_PER_BATCH
    # of each slot: rows in and out, weighted, a block of float64; the experts' intermediate values
    per_slot = (4 * spec.hidden_size + 4 * spec.expert_size) * model.module.dtype.itemsize + 8 * 1024
    fit = free_memory(str(device)) // 4 // (spec.top_k * per_slot)
    return max(TOKENS_PER_BATCH // 2, min(fit, 8 * TOKENS_PER_BATCH))


def _spill(stack: ExitStack, run: Pass) -> Path | None:
    """Return a folder for what the layers hand on, where it would take more than half of the memory."""
    room = (free_memory() if run.memory is None else run.memory) // 2
    needed = _state_bytes(run.model, run.tokens.numel())
    if needed <= room:
        return None
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mone-export-"))
    log.info("%s of hidden states go to %s", as_size(2 * needed), folder)
    return Path(folder)


def _state_bytes(model: Model, n_token: int) -> int:
    width = int(model.module.config.get_text_config().hidden_size)
    return n_token * width * model.module.dtype.itemsize
