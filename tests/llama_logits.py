"""Logits of a GGUF from llama-cpp-python, run as a program of its own so that libraries can be chosen."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np


def logits(model: Path, tokens: list[int], *, n_batch: int, libraries: Path | None = None) -> np.ndarray:
    """Return float32 [n_token, n_vocab] for all positions, `n_batch` tokens at a time.

    `libraries` names the folder of another build's shared libraries; it runs in a process of its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "logits.npy"
        env = dict(os.environ)
        if libraries is not None:
            env["LLAMA_CPP_LIB_PATH"] = str(libraries)
        command = [sys.executable, __file__, str(model), str(out), str(n_batch), *map(str, tokens)]
        result = subprocess.run(command, env=env, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(result.stderr[-2000:])
        return np.load(out)


def _main(model: str, out: str, n_batch: str, *tokens: str) -> None:
    import llama_cpp

    llama = llama_cpp.Llama(
        model,
        n_ctx=len(tokens) + 8,
        n_batch=int(n_batch),
        n_ubatch=int(n_batch),
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=True,
    )
    llama.eval([int(token) for token in tokens])
    np.save(out, llama.scores[: len(tokens)])


if __name__ == "__main__":
    _main(*sys.argv[1:])
