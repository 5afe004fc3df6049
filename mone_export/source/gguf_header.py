"""The head of a GGUF, read without its weights and without trust: keys, tensors, and where each lies.

Values stay bytes until somebody asks, so that a file of other tensors can state the same keys unchanged. All
lengths are checked against the file before anything is allocated or sought. A model may be split over several
files, `NAME-00001-of-00003.gguf`: the first has the keys, each has some of the tensors.

Source: ggml's docs/gguf.md and `gguf_init_from_file` in the pinned tree.
"""

import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mone_export.errors import MoneError
from mone_export.source.gguf_format import GGUF_ALIGNMENT
from mone_export.source.gguf_types import gguf_constants

STRING, ARRAY = 8, 9
FORMATS: Mapping[int, str] = dict(enumerate("BbHhIif?", start=0)) | {10: "Q", 11: "q", 12: "d"}
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_NO_MODELS = {"mmproj": "a projector of images", "adapter": "an adapter", "imatrix": "an importance matrix"}
_FIRST_READ = 2**24  # bytes; heads with the largest vocabularies have about as many
_MOST_KEYS, _MOST_TENSORS, _MOST_DIMS, _LONGEST_NAME = 2**16, 2**20, 4, 63  # ggml's, or far above any model


@dataclass(frozen=True, slots=True)
class Entry:
    """A key's value: its type, and its bytes as the file has them, after the type."""

    kind: int
    raw: bytes


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor: its shape in ggml's order, the name of its type, and where its `size` bytes lie."""

    name: str
    shape: tuple[int, ...]
    kind: str
    file: Path
    offset: int
    size: int

    def values(self, dtype: type) -> np.ndarray:
        """Read the values of a tensor that is not packed, the outermost dimension first."""
        return np.frombuffer(self.read(self.size), dtype).reshape(self.shape[::-1])

    def read(self, n_byte: int, *, start: int = 0) -> bytes:
        """Read bytes of its data from `start`; raises `MoneError` where the file has lost them since."""
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset + start)
                found = file.read(n_byte)
        except OSError as error:
            raise MoneError(f"cannot read {self.file}: {error.strerror}") from None
        if len(found) < n_byte:
            raise MoneError(f"{self.file} became shorter while it was read: get it again")
        return found


@dataclass(frozen=True, slots=True)
class Header:
    """The keys of a GGUF by name and its tensors in the file's order, both as they are stored."""

    keys: Mapping[str, Entry]
    tensors: Mapping[str, TensorInfo]
    files: Sequence[Path] = field(default_factory=list)

    def value(self, name: str, default: Any = None) -> Any:
        """Return a key's value, decoded: a number, a text, or a list of either."""
        entry = self.keys.get(name)
        return default if entry is None else _decoded(entry)

    def integer(self, name: str, default: int = 0) -> int:
        """Return a whole number; raises `MoneError` where the key holds something else."""
        found = self.value(name, default)
        if isinstance(found, bool) or not isinstance(found, int):
            raise MoneError(f"{self.files[0]}: {name} is {str(found)[:40]}, not a whole number")
        return found

    def of_layer(self, name: str, layer: int, default: int = 0) -> int:
        """Return a whole number that is stated once, or for each layer; raises `MoneError` for others."""
        found = self.value(name, default)
        if isinstance(found, list):
            found = found[layer] if layer < len(found) else default
        if isinstance(found, bool) or not isinstance(found, int):
            raise MoneError(f"{self.files[0]}: {name} is {str(found)[:40]}, not a whole number")
        return found

    @property
    def alignment(self) -> int:
        """The number of bytes that every tensor's place is a multiple of."""
        return self.integer("general.alignment", GGUF_ALIGNMENT)


def read_header(path: Path) -> Header:
    """Read the head of a GGUF, and of the other files where it is split.

    Raises `MoneError` for what is no GGUF, is cut off or contradicts itself.
    """
    files = shards(path)
    keys, own = _read_one(files[0])
    tensors = dict(own)
    for file in files[1:]:
        _, more = _read_one(file)
        if both := tensors.keys() & more.keys():
            raise _broken(file, f"{min(both)} is in another of the model's files as well")
        tensors |= more
    count = _decoded(keys["split.count"]) if "split.count" in keys else 1
    if count not in (0, len(files)):
        raise MoneError(f"{path} is one of {count} files: keep them together, under the names they came with")
    return Header(keys, tensors, files)


def read_model(path: Path) -> Header:
    """Read the head of a language model; raises `MoneError` for other files, what else a GGUF may be too."""
    header = read_header(path)
    if what := _NO_MODELS.get(str(header.value("general.type"))):
        raise MoneError(f"{path} is {what}, no language model: pass the model's own GGUF")
    if not header.tensors:
        raise MoneError(f"{path} holds a vocabulary and no weights: pass the model's own GGUF")
    return header


def shards(path: Path) -> list[Path]:
    """Return all files of the model that `path` is one of; raises `MoneError` where one is missing."""
    match = SHARD.fullmatch(path.name)
    if not match:
        return [path]
    found = [path.with_name(f"{match[1]}-{i:05}-of-{match[3]}.gguf") for i in range(1, int(match[3]) + 1)]
    if missing := [file.name for file in found if not file.is_file()]:
        raise MoneError(f"{path} is one of {len(found)} files: get {missing[0]} as well")
    return found or [path]


def _read_one(path: Path) -> tuple[dict[str, Entry], dict[str, TensorInfo]]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head, wanted = b"", _FIRST_READ
            while True:
                head += file.read(wanted - len(head))
                try:
                    return _Reader(path, head, size).read()
                except _TooShortError:
                    if len(head) < wanted:  # that was all
                        raise _broken(path, "it ends in the middle of its head") from None
                    wanted *= 4
    except OSError as error:
        raise MoneError(f"cannot read {path}: {error.strerror}; pass a GGUF") from None


class _TooShortError(Exception):
    """More of the file is needed."""


class _Reader:
    """Takes apart the bytes `head`, the beginning of a file of `size` bytes."""

    def __init__(self, path: Path, head: bytes, size: int) -> None:
        self._path, self._head, self._size, self._at = path, head, size, 0

    def read(self) -> tuple[dict[str, Entry], dict[str, TensorInfo]]:
        """Return the keys and the tensors."""
        if self._take(4) != _MAGIC:
            raise MoneError(f"{self._path} is no GGUF: pass one, or the folder of a checkpoint")
        version = self._number("I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            what = "big-endian" if swapped else f"version {version}"
            raise MoneError(f"{self._path} is a {what} GGUF: get a little-endian one of version 3")
        n_tensor, n_key = self._number("Q"), self._number("Q")
        if n_key > _MOST_KEYS or n_tensor > _MOST_TENSORS:
            raise _broken(self._path, f"it announces {n_key} keys and {n_tensor} tensors")
        keys: dict[str, Entry] = {}
        for _ in range(n_key):
            name = self._text()
            if name in keys:
                raise _broken(self._path, f"it states {name[:80]} twice")
            kind = self._number("I")
            start = self._at
            self._skip(kind)
            keys[name] = Entry(kind, self._head[start : self._at])
        listed = [self._tensor() for _ in range(n_tensor)]
        return keys, self._placed(listed, keys)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, n_dim = self._text(), self._number("I")
        if n_dim > _MOST_DIMS:
            raise _broken(self._path, f"{name[:80]} has {n_dim} dimensions")
        shape = tuple(self._number("Q") for _ in range(n_dim))
        return name, shape, self._number("I"), self._number("Q")

    def _placed(
        self, listed: Sequence[tuple[str, tuple[int, ...], int, int]], keys: Mapping[str, Entry]
    ) -> dict[str, TensorInfo]:
        """Return the tensors with their places; each must lie in the file, and alone."""
        alignment = Header(keys, {}, [self._path]).alignment
        if alignment < 1 or alignment > 2**20 or alignment & (alignment - 1):
            raise _broken(self._path, f"general.alignment is {alignment}")
        start = -(-self._at // alignment) * alignment
        found: dict[str, TensorInfo] = {}
        for name, shape, number, offset in listed:
            kind, size = self._measured(name, shape, number)
            if not 0 < len(name.encode("utf-8", "surrogateescape")) <= _LONGEST_NAME or name in found:
                raise _broken(self._path, f"a tensor is called {name[:80]!r}, or two are")
            if offset % alignment or start + offset + size > self._size:
                raise _broken(
                    self._path, f"{name} would end at {start + offset + size} of {self._size} bytes"
                )
            found[name] = TensorInfo(name, shape, kind, self._path, start + offset, size)
        end = start
        for info in sorted(found.values(), key=lambda info: (info.offset, info.size)):
            if info.offset < end:
                raise _broken(self._path, f"{info.name} overlaps another tensor")
            end = info.offset + info.size
        return found

    def _measured(self, name: str, shape: tuple[int, ...], number: int) -> tuple[str, int]:
        """Return the type's name and the bytes of a tensor."""
        gguf = gguf_constants()
        try:
            kind = gguf.GGMLQuantizationType(number)
            n_block, n_byte = gguf.GGML_QUANT_SIZES[kind]
        except (KeyError, ValueError):
            raise _broken(
                self._path, f"{name[:80]} is of type {number}, which llama.cpp does not know"
            ) from None
        if not shape or min(shape) < 1 or shape[0] % n_block:
            raise _broken(self._path, f"{name[:80]} of type {kind.name} has the shape {list(shape)}")
        return kind.name.lower(), math.prod(shape) // n_block * n_byte

    def _take(self, n: int) -> bytes:
        if n > self._size:
            raise _broken(self._path, f"it announces {n} bytes in a file of {self._size}")
        if self._at + n > len(self._head):
            raise _TooShortError
        self._at += n
        return self._head[self._at - n : self._at]

    def _number(self, code: str) -> int:
        return int(struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0])

    def _text(self) -> str:
        return self._take(self._number("Q")).decode("utf-8", "surrogateescape")

    def _skip(self, kind: int, *, inside: bool = False) -> None:
        """Go past a value of a type."""
        if kind == STRING:
            self._take(self._number("Q"))
        elif kind == ARRAY and not inside:
            of, n = self._number("I"), self._number("Q")
            if of == STRING:
                self._skip_texts(n)
            else:
                self._take(n * self._width(of))
        else:
            self._take(self._width(kind))

    def _skip_texts(self, n: int) -> None:
        """Go past the texts of an array; a vocabulary has hundreds of thousands."""
        if n * 8 > self._size:
            raise _broken(self._path, f"it announces {n} texts in a file of {self._size} bytes")
        head, at, unpack = self._head, self._at, struct.Struct("<Q").unpack_from
        end = len(head) - 8
        for _ in range(n):
            if at > end:
                raise _TooShortError
            at += 8 + unpack(head, at)[0]
            if at > self._size:
                raise _broken(self._path, "a text ends after the file")
        self._at = at
        if at > len(head):
            raise _TooShortError

    def _width(self, kind: int) -> int:
        if kind not in FORMATS:
            raise _broken(self._path, f"a key has the type {kind}")
        return struct.calcsize("<" + FORMATS[kind])


def _decoded(entry: Entry) -> Any:
    values = list(_values(entry))
    return values if entry.kind == ARRAY else values[0]


def _values(entry: Entry) -> Iterator[Any]:
    raw = entry.raw
    if entry.kind != ARRAY:
        yield (
            _text_of(raw, 0)[0] if entry.kind == STRING else struct.unpack("<" + FORMATS[entry.kind], raw)[0]
        )
        return
    of, n = struct.unpack_from("<IQ", raw)
    if of != STRING:
        yield from struct.unpack_from(f"<{n}{FORMATS[of]}", raw, 12)
        return
    at = 12
    for _ in range(n):
        text, at = _text_of(raw, at)
        yield text


def _text_of(raw: bytes, at: int) -> tuple[str, int]:
    end = at + 8 + struct.unpack_from("<Q", raw, at)[0]
    return raw[at + 8 : end].decode("utf-8", "replace"), end


def _broken(path: Path, what: str) -> MoneError:
    told = "".join(letter if letter.isprintable() else "?" for letter in what)  # names are the file's own
    return MoneError(f"{path} is broken: {told}; get it again")
