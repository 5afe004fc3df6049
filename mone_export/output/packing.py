"""Rounded: tensors in other types, made while a file is written. The bytes are llama-quantize's.

Rows are rounded each by itself, so that some at a time are, on all cores, while the next ones are read;
neither the file as it would be without rounding nor a whole tensor of it need be anywhere.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from mone_export.errors import MoneError
from mone_export.runtime.toolchain import n_core
from mone_export.source.ggml import all_finite, packed, unpacked
from mone_export.source.gguf_types import n_bytes

_N_WEIGHT = 2**18  # that a task takes at a time, about
_N_AHEAD = 4  # tasks that wait, for each thread
LARGEST = 1e15  # of a weight: ggml ends the process where a sum of squares is infinite


@dataclass(frozen=True, slots=True)
class Rounded:
    """The types of a file's tensors, by name, and the importance of what goes into some of its matrices.

    That is the mean squared input, float32 [n_matrix, n_column]. The work is shared by `n_thread`.
    """

    types: Mapping[str, str]
    importance: Mapping[str, np.ndarray] = field(default_factory=dict)
    n_thread: int = field(default_factory=n_core)

    def packed(
        self, name: str, kind: str, shape: Sequence[int], parts: Iterable[np.ndarray]
    ) -> Iterator[np.ndarray]:
        """Yield the rows of a tensor, uint8, in its type.

        `parts` have whole rows of it, of a `shape` in numpy's order: uint8, packed as `kind`, or float32, to
        be packed so first. Raises `MoneError` for weights that cannot be rounded, such as infinite ones.
        """
        waiting: deque[Future[np.ndarray]] = deque()
        with ThreadPoolExecutor(self.n_thread) as pool:
            try:
                for rows, importance in self._tasks(name, kind, shape, parts):
                    waiting.append(pool.submit(self._task, name, kind, rows, importance))
                    if len(waiting) > _N_AHEAD * self.n_thread:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _tasks(
        self, name: str, kind: str, shape: Sequence[int], parts: Iterable[np.ndarray]
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Yield some rows of one matrix at a time, and what matters to it."""
        importance = self.importance.get(name)
        n_row, n_column = shape[-2:]
        n_byte, most, at = n_bytes((n_column,), kind), max(1, _N_WEIGHT // n_column), 0
        for part in parts:
            rows = part.reshape(-1, n_byte if part.dtype == np.uint8 else n_column)
            while len(rows):
                matrix, row = divmod(at, n_row)
                n = min(len(rows), n_row - row, most)
                yield rows[:n], None if importance is None else importance[matrix]
                rows, at = rows[n:], at + n

    def _task(self, name: str, kind: str, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        kind_after = self.types[name]
        if rows.dtype != np.uint8:
            rows = packed(rows, kind)
            if kind == kind_after:
                return rows
        values = unpacked(rows, kind)
        if not (values.min() >= -LARGEST and values.max() <= LARGEST):  # not a number is neither
            raise MoneError(f"{name} cannot be rounded to {kind_after}: it has weights beyond {LARGEST:g}")
        found = packed(values, kind_after, importance)
        if not all_finite(found, kind_after):
            raise MoneError(f"{name} cannot be rounded to {kind_after}: that gives no finite numbers")
        return found
