"""A GGUF as plain values, every tensor and every key; and a run of upstream's own converter."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mone_export.runtime import tree


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


def convert_upstream(folder: Path, outfile: Path, outtype: str) -> Path:
    """Run llama.cpp's own `convert_hf_to_gguf.py` of the pinned tree."""
    command = [sys.executable, str(tree() / "convert_hf_to_gguf.py"), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(tree() / "gguf-py")}
    command += ["--outtype", outtype, "--outfile", str(outfile)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return outfile
