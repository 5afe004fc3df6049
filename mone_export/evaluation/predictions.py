"""What a file predicts of a text, token by token, and how far that is from what the original predicts.

All numbers are llama-perplexity's: the same chunks, the same predictions of them, the same means and standard
errors. It keeps the original's probabilities in 16 bits, we its logits in float32, in a file that vanishes
with its process. Sums are float64.

Source: `perplexity`, `kl_divergence` in llama.cpp's `tools/perplexity/perplexity.cpp`.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import IO

import numpy as np
import torch
from torch import Tensor

from mone_export.calibration.eval_callback import Tap
from mone_export.calibration.llama_model import LlamaModel
from mone_export.errors import MoneError
from mone_export.evaluation.results import Measured, Pair, TextResult
from mone_export.evaluation.slots import shares
from mone_export.evaluation.texts import Text
from mone_export.paths import check_temporary
from mone_export.runtime import Progress

_BLOCK = 32  # tokens whose probabilities are in memory in float64
_N_RESAMPLE, _SEED = 500, 0  # of the bootstrap
_QUANTILES = (0.5, 0.99, 0.999)

Fates = Mapping[int, list[str]]
"""What stands behind each slot of a layer, for the layers whose slots are counted."""


class Originals:
    """The original's logits on all texts, float32, on disk until `close`: written once, then read."""

    def __init__(self, texts: list[Text], n_vocab: int) -> None:
        """Make room; raises `MoneError` where temporary files cannot be made as large."""
        sizes = [4 * n_vocab * text.targets.size for text in texts]
        check_temporary(sum(sizes))
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `close`
        self._starts = dict(zip((text.name for text in texts), np.cumsum([0, *sizes]).tolist(), strict=False))
        self._n_vocab = n_vocab

    def close(self) -> None:
        """Give the room back."""
        self._file.close()

    def keep(self, text: Text, chunk: int, logits: Tensor) -> None:
        """Write the logits [n_scored, n_vocab] of a chunk."""
        try:
            self._file.seek(self._place(text, chunk))
            self._file.write(logits.numpy().tobytes())
            self._file.flush()
        except OSError as error:
            raise MoneError(
                f"cannot write temporary files ({error.strerror}): set TMPDIR to a folder with more room"
            ) from None

    def logits(self, text: Text, chunk: int) -> Tensor:
        """Read the logits [n_scored, n_vocab] of a chunk."""
        n = text.targets.shape[1]
        self._file.seek(self._place(text, chunk))
        content = bytearray(self._file.read(4 * n * self._n_vocab))
        return torch.frombuffer(content, dtype=torch.float32).reshape(n, self._n_vocab)

    def _place(self, text: Text, chunk: int) -> int:
        return int(self._starts[text.name] + chunk * text.targets.shape[1] * 4 * self._n_vocab)


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """A file's predictions of a text, float64 [n_chunk, n_scored]; the last two None without an original.

    `nll` is the negative logarithm of the probability of the token that came, `kl` the divergence of the
    original's probabilities from the file's, `same_top` 1 where both find the same token likeliest. `slots`
    are the shares of a layer's routed slots by fate, of the scored tokens; layers not observed are missing.
    """

    text: Text
    nll: np.ndarray
    kl: np.ndarray | None
    same_top: np.ndarray | None
    slots: Mapping[int, Mapping[str, float]]

    def result(self) -> TextResult:
        """Return what they come to."""
        n_chunk, n_ctx = self.text.rows.shape
        log_perplexity = mean(self.nll)
        perplexity = np.exp(log_perplexity.value)
        found = TextResult(
            name=self.text.name,
            sha256=self.text.sha256,
            n_ctx=n_ctx,
            n_chunk=n_chunk,
            n_token=self.nll.size,
            perplexity=Measured(float(perplexity), float(perplexity * (log_perplexity.error or 0))),
            slots=self.slots,
        )
        if self.kl is None or self.same_top is None:
            return found
        median, high, highest = quantiles(self.kl, _QUANTILES)
        return replace(
            found,
            kl_mean=mean(self.kl),
            kl_median=median,
            kl_99=high,
            kl_999=highest,
            same_top=mean(self.same_top),
        )


def predict(
    model: LlamaModel,
    text: Text,
    fates: Fates,
    *,
    keep: Originals | None = None,
    against: Originals | None = None,
    progress: Progress | None = None,
) -> Predictions:
    """Run a text through a model once; `keep` takes its logits, `against` has those to compare with.

    Raises `MoneError` where llama.cpp cannot compute, or what it computes is no number.
    """
    counted = _Slots(fates, text)
    tap = Tap(layers=counted.layers, route=counted.take, logits=True)
    rows, targets = torch.from_numpy(text.rows), torch.from_numpy(text.targets)
    n_chunk, n_ctx = rows.shape
    outputs = torch.zeros(n_ctx, dtype=torch.bool)
    outputs[text.first : -1] = True
    found: list[list[np.ndarray]] = [[], [], []]
    for chunk in range(n_chunk):
        if progress:
            progress(chunk * n_ctx, n_chunk * n_ctx, f"{text.name} (tokens)")
        logits = model.logits(rows[chunk], tap, outputs)
        if not bool(torch.isfinite(logits).all()):
            raise MoneError(f"what the model computes of {text.name} is no number: the file is broken")
        counted.add()
        if keep:
            keep.keep(text, chunk, logits)
        other = against.logits(text, chunk) if against else None
        for numbers, own in zip(found, _compared(logits, targets[chunk], other), strict=False):
            numbers.append(own)
    if progress:
        progress(n_chunk * n_ctx, n_chunk * n_ctx, f"{text.name} (tokens)")
    nll, kl, same_top = (np.stack(numbers) if numbers else None for numbers in found)
    assert nll is not None
    return Predictions(text, nll, kl, same_top, counted.shares())


def paired(first: tuple[str, Predictions], second: tuple[str, Predictions]) -> Pair:
    """Return how two files, each with its name, differ on one text."""
    (one, own), (two, other) = first, second
    kl = None if own.kl is None or other.kl is None else mean(own.kl - other.kl)
    return Pair(own.text.name, one, two, mean(own.nll - other.nll), kl)


def mean(values: np.ndarray) -> Measured:
    """Return the mean of numbers and its standard error, as if they were drawn one by one."""
    n = values.size
    return Measured(float(values.mean()), float(values.std() / np.sqrt(n - 1)) if n > 1 else None)


def quantiles(values: np.ndarray, shares: tuple[float, ...]) -> list[Measured]:
    """Return quantiles of values [n_chunk, n], with standard errors by a bootstrap over the chunks.

    The resamples are the same every time. Of one chunk the errors are not known.
    """
    found = np.quantile(values, shares)
    n_chunk = len(values)
    if n_chunk < 2:
        return [Measured(float(value)) for value in found]
    rng = np.random.default_rng(_SEED)
    resampled = [np.quantile(values[rng.integers(n_chunk, size=n_chunk)], shares) for _ in range(_N_RESAMPLE)]
    errors = np.std(resampled, axis=0, ddof=1)
    return [Measured(float(value), float(error)) for value, error in zip(found, errors, strict=True)]


def _compared(logits: Tensor, targets: Tensor, original: Tensor | None) -> list[np.ndarray]:
    """Return [nll], or [nll, kl, same top] where the original's logits are given; each [n_scored]."""
    parts = []
    for at in range(0, len(logits), _BLOCK):
        block = slice(at, at + _BLOCK)
        own = logits[block].double().log_softmax(-1)
        numbers = [-own.gather(1, targets[block, None])[:, 0]]
        if original is not None:
            wanted = original[block].double().log_softmax(-1)
            numbers.append((wanted.exp() * (wanted - own)).sum(-1))
            numbers.append((own.argmax(-1) == wanted.argmax(-1)).double())
        parts.append(torch.stack(numbers))
    return list(torch.cat(parts, 1).numpy())


class _Slots:
    """Counts the slots to which the scored tokens of a text are routed, of layers whose slots differ."""

    def __init__(self, fates: Fates, text: Text) -> None:
        self._fates, self._text = fates, text
        self.layers = tuple(layer for layer, own in fates.items() if len(set(own)) > 1)
        self._pieces: dict[int, list[Tensor]] = {}  # of one chunk
        self._counts = {layer: np.zeros(len(fates[layer]), np.int64) for layer in self.layers}

    def take(self, layer: int, slots: Tensor) -> None:
        """Take the slots int64 [n, top_k] of the chunk's next tokens, as a `Tap` gives them."""
        self._pieces.setdefault(layer, []).append(slots)

    def add(self) -> None:
        """Count a chunk: after the last layer's attention only scored tokens are left, before it all."""
        first, n_ctx = self._text.first, self._text.rows.shape[1]
        for layer, pieces in self._pieces.items():
            slots = torch.cat(pieces)
            scored = slots[first:-1] if len(slots) == n_ctx else slots
            self._counts[layer] += np.bincount(scored.numpy().ravel(), minlength=len(self._fates[layer]))
        self._pieces.clear()

    def shares(self) -> dict[int, dict[str, float]]:
        """Return the shares of a layer's slots by fate; layers that llama.cpp did not show are missing."""
        counted = {layer: counts for layer, counts in self._counts.items() if counts.sum()}
        return {
            layer: shares(own, counted[layer]) if layer in counted else {own[0]: 1.0}
            for layer, own in self._fates.items()
            if layer in counted or layer not in self.layers
        }
