"""A GGUF as plain values, every tensor and every key; and a run of upstream's own converter."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mone_export.runtime import tree
from mone_export.source.gguf_format import INPUTS_KEY, OPTIONS_KEY
from mone_export.source.gguf_header import Entry, read_header


class Tensor(NamedTuple):
    """A tensor as stored: `data` has one row per entry of the slowest dimension."""

    kind: str
    shape: tuple[int, ...]  # ggml's order
    data: np.ndarray


class Contents(NamedTuple):
    """Everything a GGUF says, in its own order."""

    tensors: dict[str, Tensor]
    keys: dict[str, tuple[tuple[str, ...], Any]]  # name -> (GGUF types, value)


def read(path: Path) -> Contents:
    """Read a GGUF with the reader of the pinned tree."""
    if (folder := str(tree() / "gguf-py")) not in sys.path:
        sys.path.insert(0, folder)
    from gguf import GGUFReader

    reader = GGUFReader(path)
    tensors = {
        tensor.name: Tensor(
            tensor.tensor_type.name, tuple(int(n) for n in tensor.shape), np.array(tensor.data)
        )
        for tensor in reader.tensors
    }
    keys = {
        name: (tuple(kind.name for kind in field.types), field.contents())
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    return Contents(tensors, keys)


def without_command(path: Path) -> tuple[dict[str, Entry], bytes]:
    """Return a file's keys without those that state which command made it, and the bytes of its tensors."""
    header = read_header(path)
    keys = {name: entry for name, entry in header.keys.items() if name not in (OPTIONS_KEY, INPUTS_KEY)}
    return keys, path.read_bytes()[min(info.offset for info in header.tensors.values()) :]


def convert_upstream(folder: Path, outfile: Path, outtype: str) -> Path:
    """Run llama.cpp's own `convert_hf_to_gguf.py` of the pinned tree."""
    command = [sys.executable, str(tree() / "convert_hf_to_gguf.py"), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(tree() / "gguf-py")}
    command += ["--outtype", outtype, "--outfile", str(outfile)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return outfile
