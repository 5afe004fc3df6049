"""Functions that use llama.cpp, each call in a process of its own, forked from one that has it loaded."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["llama_cpp", "numpy"])  # most of what a new process would take


def in_a_process(function: Callable[..., Arrays], *arguments: Any) -> Arrays:
    """Return the arrays that a function of a module returns, called in another process.

    Raises `RuntimeError` with the end of what the process said where it fails or dies.
    """
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder)
        process = _server.Process(target=_call, args=(kept, dict(os.environ), function, arguments))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise RuntimeError((kept / "said").read_text(errors="replace")[-2000:])
        with np.load(kept / "arrays.npz") as arrays:
            return dict(arrays)


def _call(kept: Path, environment: dict[str, str], function: Callable[..., Arrays], arguments: Any) -> None:
    with (kept / "said").open("wb") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    np.savez(kept / "arrays.npz", **function(*arguments))
