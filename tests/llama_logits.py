"""Logits of a GGUF from llama-cpp-python, in a process of its own: it may die, or have other libraries."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from forked import Arrays, in_a_process

LIBRARIES = "LLAMA_CPP_LIB_PATH"


def logits(model: Path, tokens: list[int], *, n_batch: int, libraries: Path | None = None) -> np.ndarray:
    """Return float32 [n_token, n_vocab] for all positions, `n_batch` tokens at a time.

    `libraries` names the folder of another build's shared libraries. Raises `RuntimeError` where it fails.
    """
    if libraries is None and LIBRARIES not in os.environ:
        return in_a_process(_logits, str(model), n_batch, tokens)["logits"]
    environment = os.environ if libraries is None else os.environ | {LIBRARIES: str(libraries)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "logits.npz"
        command = [sys.executable, __file__, str(model), str(out), str(n_batch), *map(str, tokens)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(result.stderr[-2000:])
        with np.load(out) as found:
            return found["logits"]


def _logits(model: str, n_batch: int, tokens: list[int]) -> Arrays:
    import llama_cpp

    llama = llama_cpp.Llama(
        model,
        n_ctx=len(tokens) + 8,
        n_batch=n_batch,
        n_ubatch=n_batch,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=True,
    )
    llama.eval(tokens)
    found = llama.scores[: len(tokens)].copy()
    llama.close()
    return {"logits": found}


if __name__ == "__main__":
    model, out, n_batch, *tokens = sys.argv[1:]
    np.savez(out, **_logits(model, int(n_batch), [int(token) for token in tokens]))
