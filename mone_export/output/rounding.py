"""What rounding weights to a type of GGUF costs, tried on some of the model's own."""

from collections.abc import Iterable

import numpy as np

from mone_export.source import Source
from mone_export.source.ggml import packed, unpacked

N_SAMPLE = 2**18  # weights, from all over the model
_EXACT = ("f32", "f16", "bf16", "mxfp4", "nvfp4")  # the latter where a checkpoint has them itself
_BLOCK = 256  # weights that K-quants take together


def rounding_errors(source: Source, types: Iterable[str]) -> dict[str, float]:
    """Return the squared error of each type relative to the squared weights, on a sample of a model's own.

    `types` are names of tensor types such as `q4_k`; those that a checkpoint may have count as exact. Rounded
    by ggml itself, without an importance matrix.
    """
    wanted = sorted(set(types) - set(_EXACT))
    sample = _sample(source) if wanted else np.empty(0, np.float32)
    return dict.fromkeys(_EXACT, 0.0) | {kind: _rounding_error(sample, kind) for kind in wanted}


def _rounding_error(sample: np.ndarray, kind: str) -> float:
    rows = sample.reshape(-1, _BLOCK)
    rounded = unpacked(packed(rows, kind), kind)
    return float(np.square(rounded - rows).sum() / np.square(rows).sum())


def _sample(source: Source) -> np.ndarray:
    """Return weights of matrices all over the model, float32 [n * 256]; of a bell curve if all are packed."""
    parts = [rows.ravel()[: rows.size // _BLOCK * _BLOCK] for rows in source.sample(N_SAMPLE)]
    if not parts:
        parts = [np.random.default_rng(0).standard_normal(N_SAMPLE, np.float32)]
    return np.ascontiguousarray(np.concatenate(parts))
