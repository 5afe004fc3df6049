"""A GGUF rewritten with fewer experts: what stays is copied byte for byte, unless it is to be rounded.

An expert is a contiguous slice of its tensor, and so is its row of a router, bias or scale: an edit of a
tensor is a list of such slices, and perhaps rows of ours after them. Nothing is unpacked and no tensor is
held in memory; where the system can, it copies from file to file itself.
"""

import errno
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mone_export.errors import MoneError
from mone_export.recipe import Mtp
from mone_export.runtime import Progress
from mone_export.source.ggml import packed as pack
from mone_export.source.gguf_format import INPUTS_KEY, MEASURED_KEY, OPTIONS_KEY
from mone_export.source.gguf_header import ARRAY, FORMATS, STRING, Entry, Header, TensorInfo
from mone_export.source.gguf_types import block_of, dequantize, gguf_constants, kind_for, n_bytes
from mone_export.source.opened import Derived, Edits, Packing

_CHUNK = 2**23  # bytes that are copied at a time
_NO_COPY = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM)
_NEXT_TOKENS = "{arch}.nextn_predict_layers"
_BLOCK_COUNT = "{arch}.block_count"


class Slice(NamedTuple):
    """Bytes of a file."""

    file: Path
    offset: int
    size: int


class Made(NamedTuple):
    """Bytes that are made when they are to be written."""

    make: Callable[[], bytes]
    size: int


@dataclass(slots=True)
class _Written:
    """A tensor of the output: its shape in ggml's order, its type, and what it consists of."""

    shape: tuple[int, ...]
    kind: str
    pieces: list[Slice | Made | bytes] = field(default_factory=list)


class GgufConversion:
    """A GGUF opened for rewriting: every tensor of the output is known, none is read yet.

    It is to a GGUF what `llamacpp.Conversion` is to a checkpoint.
    """

    def __init__(self, header: Header, edits: Edits, *, mtp: Mtp = "keep") -> None:
        """Apply edits to all tensors; `mtp`: whether blocks that predict further tokens are kept."""
        self._header, self._keys = header, dict(header.keys)
        how_made = (OPTIONS_KEY, INPUTS_KEY, MEASURED_KEY)
        for key in [key for key in self._keys if key.startswith("split.") or key in how_made]:
            del self._keys[key]
        self.arch: str = header.value("general.architecture")
        self.block_count = header.integer(_BLOCK_COUNT.format(arch=self.arch))
        self.remark: str | None = None
        self._file: FileIO | None = None
        self._packing: Packing | None = None
        left_out = self._without_prediction() if mtp == "drop" else ()
        self._tensors: dict[str, _Written] = {}
        for name, info in header.tensors.items():
            if name not in left_out:
                self._tensors[name] = _edited(info, edits)
                for new in edits.derived(name, (*info.shape, 1)[2::-1]):
                    self._tensors[new.name] = _derived(info, new)
        if edits.rewrites:
            self.remark = "new experts are made of unpacked ones and stay so, unless --outtype rounds them"

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, in numpy's order of dimensions (the reverse of ggml's)."""
        return {name: tensor.shape[::-1] for name, tensor in self._tensors.items()}

    @property
    def types(self) -> Mapping[str, str]:
        """The type of every tensor, such as `q4_k`."""
        return {name: tensor.kind for name, tensor in self._tensors.items()}

    def key(self, name: str) -> Any:
        """Return what the file states under a key (with `{arch}` in place of the architecture), or None."""
        return self._header.value(name.format(arch=self.arch))

    def add_tensor(self, name: str, values: np.ndarray) -> None:
        """Add a float32 or int32 tensor of our own, or put it in the place of the file's."""
        kind = {"float32": "f32", "int32": "i32"}[str(values.dtype)]
        self._tensors[name] = _Written(values.shape[::-1], kind, [values.tobytes()])

    def write_head(
        self, part: Path, keys: Mapping[str, tuple[str, Any]], packing: Packing | None = None
    ) -> int:
        """Write header, keys and tensor list to `part`, and return the size the finished file will have.

        `keys` maps each key, additional or replaced, to (GGUF type, value); a list value makes an array of
        that type. All others are the file's own, untouched. `packing` rounds the tensors when they are
        written.
        """
        self._packing = packing
        stated = self._keys | {key: _entry(kind, value) for key, (kind, value) in keys.items()}
        alignment = self._header.alignment
        head = [b"GGUF", struct.pack("<IQQ", 3, len(self._tensors), len(stated))]
        for key, entry in stated.items():
            head += [_text(key), struct.pack("<I", entry.kind), entry.raw]
        offset = 0
        for name, tensor in self._tensors.items():
            number, *_ = block_of(self._kind(name))
            head += [_text(name), struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)]
            head.append(struct.pack("<IQ", number, offset))
            offset += self._padded_size(name)
        written = b"".join(head)
        self.head_length = len(written)
        self._file = FileIO(part, "w")
        _write(self._file, written.ljust(_padded(len(written), alignment), b"\0"))
        return self._file.tell() + offset

    def write_tensors(self, progress: Progress | None = None) -> None:
        """Write all tensor data after the head, and close the file.

        Raises `MoneError` where the source ends before its end: somebody has changed it.
        """
        file = self._file
        assert file is not None
        total, done = sum(self._size(name) for name in self._tensors), 0
        _reserve(file, file.tell() + sum(self._padded_size(name) for name in self._tensors))
        with _Sources() as sources:
            for name, tensor in self._tensors.items():
                n_byte = 0
                for n in self._written(name, tensor, file, sources):
                    n_byte += n
                    if progress:
                        progress((done + n_byte) // 2**20, total // 2**20, "writing (MiB)")
                assert n_byte == self._size(name), (name, tensor.shape, n_byte)
                _write(file, b"\0" * (self._padded_size(name) - n_byte))
                done += self._size(name)
        self.close()

    def _kind(self, name: str) -> str:
        """Return the type of a tensor in the file."""
        return self._packing.types[name] if self._packing else self._tensors[name].kind

    def _size(self, name: str) -> int:
        """Return the bytes of a tensor in the file."""
        return n_bytes(self._tensors[name].shape, self._kind(name))

    def _padded_size(self, name: str) -> int:
        return _padded(self._size(name), self._header.alignment)

    def _written(self, name: str, tensor: _Written, file: FileIO, sources: "_Sources") -> Iterator[int]:
        """Append a tensor to a file, and yield the bytes of each step."""
        if self._packing is None or self._packing.types[name] == tensor.kind:
            for piece in tensor.pieces:
                yield from _copied(piece, file, sources)
            return
        parts = _parts(tensor, sources)
        for data in self._packing.packed(name, tensor.kind, tensor.shape[::-1], parts):
            yield _write(file, data.data.cast("B"))

    def close(self) -> None:
        """Close the output file, if one is open."""
        if self._file is not None:
            self._file.close()

    def _without_prediction(self) -> list[str]:
        """Leave out the blocks that predict further tokens, and return their tensors' names."""
        key = _NEXT_TOKENS.format(arch=self.arch)
        n_block = self._header.integer(key)
        if not n_block:
            return []
        self.block_count -= n_block
        self._keys[key] = _entry("UINT32", 0)
        self._keys[_BLOCK_COUNT.format(arch=self.arch)] = _entry("UINT32", self.block_count)
        names = [name for name in self._header.tensors if _block_of(name) >= self.block_count]
        self.remark = f"the file leaves out the blocks for multi-token prediction ({len(names)} tensors)"
        return names


class _Sources:
    """The open files that slices are copied from."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def __enter__(self) -> "_Sources":
        return self

    def __exit__(self, *_: object) -> None:
        for number in self._open.values():
            os.close(number)

    def number(self, path: Path) -> int:
        """Return a file's descriptor."""
        if path not in self._open:
            self._open[path] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        return self._open[path]


def _edited(info: TensorInfo, edits: Edits) -> _Written:
    """Return what becomes of a tensor."""
    if (kept := edits.select(info.name)) is not None:
        if edits.rewrites:
            return _made(info, edits, len(kept))
        return _rows(replace(info, shape=(*info.shape, 1)[:3]), 2, kept)
    rows = edits.rows(info.name, info.shape[::-1])
    if rows is None:
        return _Written(info.shape, info.kind, [Slice(info.file, info.offset, info.size)])
    axis = max(axis for axis, n in enumerate(info.shape) if n == edits.spec.n_expert)
    if rows.others is not None and info.kind != "f32":
        raise MoneError(f"{info.name} is of type {info.kind}: novices need the model's biases in float32")
    return _rows(info, axis, rows.own, rows.filled(partial(info.values, np.float32)))


def _derived(info: TensorInfo, new: Derived) -> _Written:
    """Return a further tensor of experts: of rows as they are packed, or made of unpacked ones and packed.

    Packed as the original is where the new rows have whole blocks.
    """
    kind = info.kind if new.rows else kind_for(info.kind, new.shape[1])

    def packed(expert: int) -> bytes:
        import torch

        if new.rows:
            return bytes(_packed_rows(info, expert)[new.rows(expert)])
        matrix = torch.from_numpy(dequantize(_packed_rows(info, expert), info.kind).copy())
        return pack(new.make(expert, matrix).float().numpy(), kind).tobytes()

    size = n_bytes(new.shape, kind)
    pieces = [Made(partial(packed, expert), size) for expert in new.experts]
    return _Written((*new.shape[::-1], len(new.experts)), kind, [*pieces])


def _packed_rows(info: TensorInfo, expert: int) -> np.ndarray:
    """Return an expert's matrix as it is packed, uint8 [n_row, bytes of a row]."""
    _, n_row, n_expert = (*info.shape, 1)[:3]
    size = info.size // n_expert
    return np.frombuffer(info.read(size, start=expert * size), np.uint8).reshape(n_row, -1)


def _made(info: TensorInfo, edits: Edits, n_kept: int) -> _Written:
    """Return a tensor of experts that are made of unpacked ones: in float32, or float16 if it is packed."""
    *inner, n_expert = (*info.shape, 1)[:3]
    kind = "f32" if info.kind == "f32" else "f16"

    def read(expert: int) -> Any:
        import torch

        return torch.from_numpy(dequantize(_packed_rows(info, expert), info.kind).copy())

    def stored(make: Callable[[], Any]) -> bytes:
        values: np.ndarray = make().float().numpy()
        return values.astype(np.float32 if kind == "f32" else np.float16).tobytes()

    size = math.prod(inner) * (4 if kind == "f32" else 2)
    made = [Made(partial(stored, make), size) for make in edits.rewrite(info.name, read)]
    assert len(made) in (n_kept, n_expert)
    return _Written((*inner, len(made)), kind, [*made])


def _rows(info: TensorInfo, axis: int, own: Sequence[int], others: np.ndarray | None = None) -> _Written:
    """Return a tensor of some of its own slices along its last axis and, after them, `others`."""
    size = info.size // info.shape[axis]
    pieces: list[Slice | Made | bytes] = []
    begin = 0
    for end in range(1, len(own) + 1):
        if end == len(own) or own[end] != own[end - 1] + 1:  # neighbours are copied in one
            pieces.append(Slice(info.file, info.offset + own[begin] * size, (end - begin) * size))
            begin = end
    n_row = len(own)
    if others is not None:
        pieces.append(others.tobytes())
        n_row += len(others)
    inner = info.shape[:axis] if own or others is None else others.shape[:0:-1]
    return _Written((*inner, n_row, *info.shape[axis + 1 :]), info.kind, pieces)


def _copied(piece: Slice | Made | bytes, file: FileIO, sources: _Sources) -> Iterator[int]:
    """Append a piece to a file, and yield the bytes of each step."""
    if not isinstance(piece, Slice):
        yield _write(file, piece.make() if isinstance(piece, Made) else piece)
        return
    source, at, left = sources.number(piece.file), piece.offset, piece.size
    while left:
        n = _copy_some(source, file, at, min(left, _CHUNK))
        if n == 0:
            raise _became_shorter(piece.file)
        at, left = at + n, left - n
        yield n


def _parts(tensor: _Written, sources: _Sources) -> Iterator[np.ndarray]:
    """Yield the bytes of a tensor of matrices, uint8, some whole rows at a time."""
    row = n_bytes(tensor.shape[:1], tensor.kind)
    step = max(1, _CHUNK // row) * row
    for piece in tensor.pieces:
        if not isinstance(piece, Slice):
            yield np.frombuffer(piece.make() if isinstance(piece, Made) else piece, np.uint8)
            continue
        for at in range(0, piece.size, step):
            n = min(step, piece.size - at)
            source = sources.number(piece.file)
            os.lseek(source, piece.offset + at, os.SEEK_SET)
            data = os.read(source, n)
            if len(data) < n:
                raise _became_shorter(piece.file)
            yield np.frombuffer(data, np.uint8)


def _became_shorter(file: Path) -> MoneError:
    return MoneError(f"{file} became shorter while it was read: run the command again")


def _copy_some(source: int, file: FileIO, at: int, n: int) -> int:
    """Copy up to `n` bytes from `at` in one file to the place another is at, and return how many."""
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, file.fileno(), n, offset_src=at)
        except OSError as error:
            if error.errno not in _NO_COPY:
                raise
    os.lseek(source, at, os.SEEK_SET)
    return _write(file, os.read(source, n))


def _write(file: FileIO, data: bytes | memoryview) -> int:
    """Write all of some bytes, and return how many they are."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
    return len(data)


def _reserve(file: FileIO, size: int) -> None:
    """Take the space of a file of `size` bytes now, where the system can: a full disk says so at once."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
    with suppress(OSError):
        file.truncate(size)


def _entry(kind: str, value: Any) -> Entry:
    """Return a key's value as a GGUF stores it."""
    number = int(gguf_constants().GGUFValueType[kind])
    if isinstance(value, list):
        packed = b"".join(_packed(number, item) for item in value)
        return Entry(ARRAY, struct.pack("<IQ", number, len(value)) + packed)
    return Entry(number, _packed(number, value))


def _packed(number: int, value: Any) -> bytes:
    return _text(value) if number == STRING else struct.pack("<" + FORMATS[number], value)


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _block_of(name: str) -> int:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blk" and len(parts) > 1 and parts[1].isdecimal() else -1
