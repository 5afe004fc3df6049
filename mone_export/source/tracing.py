"""Which matrix of a checkpoint each matrix of its GGUF is made of, and which input channels it reads.

llama.cpp's converter renames, splits, joins and reorders. It is not asked how: it is shown matrices whose
values are the numbers of their columns, and what it makes of them says from which column each value comes.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mone_export.artifacts import MoeSpec
from mone_export.lazily import Tensor, torch
from mone_export.source.llamacpp import Conversion
from mone_export.source.opened import Derived, Opened, Read, Rows

Channels = tuple[str, np.ndarray]
"""A matrix of a checkpoint, and which of its columns are read: int64 [n_matrix, n_in]."""


def traced(
    path: Path, spec: MoeSpec, matrices: Mapping[str, int], *, trust_remote_code: bool = False
) -> dict[str, Channels]:
    """Return what the matrices of a checkpoint's GGUF are made of, by their names there.

    `matrices` are those of the checkpoint that are looked for, by name, with the columns of each. A matrix
    that is not made of rows of one of them, such as a transposed one, is not there.
    """
    edits = _Unedited(spec, matrices)
    conversion = _Tracing(path, edits, outtype="f32", trust_remote_code=trust_remote_code)
    try:
        return dict(conversion.channels(edits))
    finally:
        conversion.close()


class _Unedited:
    """Edits that change nothing."""

    rewrites = False

    def __init__(self, spec: MoeSpec, matrices: Mapping[str, int]) -> None:
        """Take the matrices that are looked for, and the columns of each."""
        self.spec, self.matrices = spec, matrices
        self.origins: dict[str, str] = {}  # names of the files, by those that the converter uses
        self.made: dict[str, str] = {}  # names of the files, by those of the GGUF

    def select(self, name: str) -> Sequence[int] | None:
        return None

    def derived(self, name: str, shape: Sequence[int]) -> Sequence[Derived]:
        return ()

    def rows(self, name: str, shape: Sequence[int]) -> Rows | None:
        return None

    def edit(self, name: str, tensor: Tensor) -> Tensor:
        return tensor

    def rewrite(self, name: str, read: Read) -> Sequence[Any]:
        return ()


class _Traced(Opened):
    """A converter's class that is shown numbers of columns."""

    edits: _Unedited

    @classmethod
    def filter_tensors(cls, item: tuple[str, Any]) -> Any:
        """Note what the converter calls a tensor of the files."""
        found = super().filter_tensors(item)
        if found is not None and item[0] in cls.edits.matrices:
            cls.edits.origins[found[0]] = item[0]
        return found

    def get_tensors(self) -> Iterator[tuple[str, Any]]:
        """Show numbers in place of what is in the files."""
        for name, tensor in self.base.get_tensors(self):
            if name in self.edits.origins:
                n_row, n_column = tensor.shape
                numbers = torch.arange(n_column, dtype=torch.float32).expand(n_row, n_column)
                yield name, self.lazy_tensor.from_eager(numbers)
            else:
                yield name, tensor

    def modify_tensors(self, data: Any, name: str, bid: int | None) -> Iterator[tuple[str, Any]]:
        """Note what becomes of a tensor of the files."""
        for new_name, tensor in super().modify_tensors(data, name, bid):
            if name in self.edits.origins:
                self.edits.made[new_name] = self.edits.origins[name]
            yield new_name, tensor


class _Tracing(Conversion):
    opened = _Traced

    def channels(self, edits: _Unedited) -> Iterator[tuple[str, Channels]]:
        """Yield, for each matrix that is made of rows of a matrix of the files, its `Channels`."""
        infos = self._model.gguf_writer.tensors[0]
        with torch.inference_mode():
            for name, origin in edits.made.items():
                values = np.asarray(self._gguf.LazyNumpyTensor.to_eager(infos[name].tensor))
                infos[name].tensor = None  # frees it
                if values.ndim < 2 or values.dtype != np.float32:
                    continue
                n_out, n_in = values.shape[-2:]
                rows = values.reshape(-1, n_out, n_in)
                if (rows == rows[:, :1]).all() and rows.max() < edits.matrices[origin]:
                    yield name, (origin, rows[:, 0].astype(np.int64))
