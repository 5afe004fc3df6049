"""A GGUF as bytes that can be put together again: what tests compare and spoil.

Shares no code with the package.
"""

import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from gguf import GGMLQuantizationType, GGUFReader

ALIGNMENT = 32


class Stored(NamedTuple):
    """A tensor as a file has it: type, shape in ggml's order, bytes."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Parts:
    """A GGUF taken apart: the bytes of each key with its value, and the tensors, both in the file's order."""

    keys: dict[str, bytes] = field(default_factory=dict)
    tensors: dict[str, Stored] = field(default_factory=dict)

    def having(self, **values: int | float | bool) -> "Parts":
        """Return it with keys of the architecture (`__` for a dot) set, in their place where they exist."""
        arch = text_of(self.keys["general.architecture"])
        changed = {f"{arch}.{name.replace('__', '.')}": value for name, value in values.items()}
        return replace(self, keys=self.keys | {name: key(name, value) for name, value in changed.items()})


def taken_apart(file: Path) -> Parts:
    """Read a GGUF."""
    reader = GGUFReader(file)
    keys = {
        name: b"".join(part.tobytes() for part in each.parts)
        for name, each in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    tensors = {
        tensor.name: Stored(
            tensor.tensor_type, tuple(int(size) for size in tensor.shape), tensor.data.tobytes()
        )
        for tensor in reader.tensors
    }
    return Parts(keys, tensors)


def put_together(parts: Parts) -> bytes:
    """Return the bytes of the file."""
    infos, data = bytearray(), bytearray()
    for name, tensor in parts.tensors.items():
        infos += _string(name) + struct.pack("<I", len(tensor.shape))
        infos += struct.pack(f"<{len(tensor.shape)}QIQ", *tensor.shape, tensor.kind, len(data))
        data += tensor.data + bytes(-len(tensor.data) % ALIGNMENT)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(parts.tensors), len(parts.keys))
    head += b"".join(parts.keys.values()) + infos
    return head + bytes(-len(head) % ALIGNMENT) + data


def key(name: str, value: str | bool | int | float | list[int] | list[str], *, integer: int = 4) -> bytes:
    """Return a key with its value as a GGUF has them; `integer` is the type of integers, u32 unless said."""
    if isinstance(value, str):
        return _string(name) + struct.pack("<I", 8) + _string(value)
    if isinstance(value, bool):
        return _string(name) + struct.pack("<I?", 7, value)
    if isinstance(value, float):
        return _string(name) + struct.pack("<If", 6, value)
    if isinstance(value, int):
        return _string(name) + struct.pack("<II", integer, value)
    if value and isinstance(value[0], str):
        items = b"".join(_string(str(each)) for each in value)
        return _string(name) + struct.pack("<IIQ", 9, 8, len(value)) + items
    return _string(name) + struct.pack(f"<IIQ{len(value)}I", 9, integer, len(value), *value)


def text_of(stored: bytes) -> str:
    """Return the string that a key holds."""
    start = 8 + struct.unpack_from("<Q", stored)[0]
    assert struct.unpack_from("<I", stored, start)[0] == 8
    return stored[start + 12 :].decode()


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def plain_tokenizer(n_vocab: int) -> dict[str, bytes]:
    """Return the keys of llama.cpp's `test` tokenizer, which makes ids of any text."""
    values: dict[str, str | list[str]] = {
        "tokenizer.ggml.model": "test",
        "tokenizer.ggml.tokens": [f"tok_{token}" for token in range(n_vocab)],
    }
    return {name: key(name, value) for name, value in values.items()}
