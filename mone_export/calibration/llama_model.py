"""A GGUF in llama.cpp, and rows of tokens through it, with what an eval callback does on the way."""

import ctypes
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mone_export import runtime
from mone_export.calibration.cut_short import cut_short
from mone_export.calibration.eval_callback import EvalCallback, Tap, ggml
from mone_export.errors import MoneError
from mone_export.llama_options import LlamaOptions

log = logging.getLogger(__name__)

_DEBUG, _ERROR, _CONTINUED = 1, 4, 5  # ggml_log_level; debug: a line for every tensor
_N_SEQ = 64  # rows of one batch
_PATIENCE = 0.2  # seconds


class LlamaModel:
    """A model in memory; `close` frees it, as does the end of a `with`."""

    def __init__(self, path: Path, options: LlamaOptions) -> None:
        """Load the model; raises `MoneError` with llama.cpp's own reason."""
        if folder := runtime.linked_build():
            runtime.switch_on(folder)
        import llama_cpp

        self._lib, self._path, self._options = llama_cpp, path, options
        self._log = _log()
        self._log.listen()
        self._seam = EvalCallback()
        self._callback = llama_cpp.llama_cpp.ggml_backend_sched_eval_callback(self._seam)
        self._context: Any = None
        self._model: Any = None
        self.n_thread = options.n_threads or torch.get_num_threads()
        self._room = (0, 0)  # sequences, and tokens of all
        self.n_piece = min(options.n_batch, options.n_ubatch)
        self._batch = llama_cpp.llama_batch_init(self.n_piece, 0, 1)
        # llama.cpp is called in a thread of its own: a signal's exception would get lost in the callback
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="llama.cpp")
        self._model = self._in_worker(self._load)
        if not self._model:
            self.close()
            raise MoneError(f"llama.cpp cannot load {path}: {self._log.reason()}")

    def __enter__(self) -> "LlamaModel":
        """Return the model itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free the model."""
        self.close()

    @property
    def version(self) -> str:
        """The version of llama-cpp-python."""
        return str(self._lib.__version__)

    def rows_at_once(self, seq_len: int) -> int:
        """Return how many rows of `seq_len` tokens go into one batch."""
        return max(1, min(self.n_piece // seq_len, _N_SEQ))

    def run(self, rows: Tensor, tap: Tap) -> list[list[int]]:
        """Run rows int64 [n_row, seq_len], `rows_at_once` at most, as sequences of their own.

        Returns the layers that the tap took, for each piece of the rows. Raises what the tap raises, and
        `MoneError` where llama.cpp cannot compute.
        """
        return [seen for seen, _ in self._run(rows, tap, None)]

    def logits(self, row: Tensor, tap: Tap, outputs: Tensor) -> Tensor:
        """Run one row int64 [seq_len]; return float32 logits [n_output, n_vocab] where `outputs` is true.

        Other tokens go no further than into the last layer's attention.
        """
        return torch.cat([logits for _, logits in self._run(row[None], tap, outputs)])

    def begin(self, n_row: int, seq_len: int) -> None:
        """Have room for `n_row` rows of up to `seq_len` tokens, and forget all others.

        Raises `MoneError` where there is none, or not one token of each row fits into a batch.
        """
        if n_row > self.n_piece:
            raise MoneError(f"-ub {self.n_piece} for {n_row} rows at a time: pass {n_row} or more")
        self._make_room(n_row, n_row * seq_len)
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def extend(self, rows: Tensor, start: int) -> Tensor:
        """Run the tokens int64 [n_row, n] that follow in each row, the first of them the row's `start`.

        Returns the logits after the last one, float32 [n_row, n_vocab].
        """
        n_row, n = rows.shape
        width = self.n_piece // n_row
        last = torch.zeros(n, dtype=torch.bool)
        last[-1] = True
        found = [
            self._decode(rows[:, at : at + width], start + at, Tap(logits=True), last[at : at + width])[1]
            for at in range(0, n, width)
        ]
        return found[-1]

    @property
    def n_vocab(self) -> int:
        """How many tokens there are."""
        return int(self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model)))

    def end_tokens(self) -> list[int]:
        """Return the tokens by which the model says that a text is over."""
        vocab = self._lib.llama_model_get_vocab(self._model)
        return [token for token in range(self.n_vocab) if self._lib.llama_vocab_is_eog(vocab, token)]

    def close(self) -> None:
        """Free the model, when llama.cpp is done with what it is doing."""
        self._worker.shutdown()
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        if self._batch:
            self._lib.llama_batch_free(self._batch)
        self._context = self._model = self._batch = None

    def _load(self) -> Any:
        params = self._lib.llama_model_default_params()
        if self._options.n_gpu_layers is not None:
            params.n_gpu_layers = self._options.n_gpu_layers
        overrides = _on_cpu(self._options.n_cpu_moe)  # alive until the model is loaded
        params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
        going_on = self._lib.llama_progress_callback(lambda done, _: not self._seam.interrupted)
        params.progress_callback = going_on
        return self._lib.llama_model_load_from_file(str(self._path).encode(), params)

    def _run(self, rows: Tensor, tap: Tap, outputs: Tensor | None) -> list[tuple[list[int], Tensor]]:
        n_row, seq_len = rows.shape
        self.begin(n_row, seq_len)
        found = []
        for start in range(0, seq_len, self.n_piece):
            piece = rows[:, start : start + self.n_piece]
            wanted = None if outputs is None else outputs[start : start + self.n_piece]
            found.append(self._decode(piece, start, tap, wanted))
        return found

    def _decode(self, piece: Tensor, start: int, tap: Tap, wanted: Tensor | None) -> tuple[list[int], Tensor]:
        """Run the next tokens [n_row, n] of each row, which begin at `start`: layers seen, logits if any."""
        n_row, n = piece.shape
        batch, n_token = self._batch, piece.numel()
        batch.n_tokens = n_token
        _fill(batch.token, piece.flatten())
        _fill(batch.pos, torch.arange(start, start + n).repeat(n_row))
        _fill(batch.n_seq_id, torch.ones(n_token))
        wanted = torch.ones(n, dtype=torch.bool) if wanted is None else wanted
        _fill(batch.logits, wanted.repeat(n_row))
        for place in range(n_token):
            batch.seq_id[place][0] = place // n
        self._seam.begin(tap)
        self._log.listen()
        status = self._in_worker(lambda: _one_thread(self._lib.llama_decode, self._context, batch))
        if self._seam.error:
            raise self._seam.error
        if status:
            raise MoneError(
                f"llama.cpp could not compute {n_token} tokens ({self._log.reason()}): pass a smaller -ub or "
                "--ctx-size"
            )
        return self._seam.seen, self._logits(n_row * int(wanted.sum())) if tap.logits else torch.empty(0)

    def _logits(self, n_output: int) -> Tensor:
        if not n_output:
            return torch.empty(0, self.n_vocab)
        pointer = self._lib.llama_get_logits(self._context)
        return torch.from_numpy(np.ctypeslib.as_array(pointer, (n_output, self.n_vocab)).copy())

    def _make_room(self, n_seq: int, n_token: int) -> None:
        """Have a context for so many sequences, and tokens of all together."""
        if self._context and n_seq <= self._room[0] and n_token <= self._room[1]:
            return
        if self._context:
            self._lib.llama_free(self._context)
            self._context, self._room = None, (0, 0)
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = n_token, n_seq, True
        params.n_batch = params.n_ubatch = self.n_piece
        params.n_threads = params.n_threads_batch = self.n_thread
        params.cb_eval = self._callback
        if self._options.exact:
            params.type_k = params.type_v = self._lib.GGML_TYPE_F32
            params.flash_attn_type = self._lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._log.listen()
        self._context = self._in_worker(lambda: self._lib.llama_init_from_model(self._model, params))
        if not self._context:
            raise MoneError(
                f"llama.cpp has no room for {n_token} tokens ({self._log.reason()}): pass a smaller "
                "--ctx-size or -ub, or fewer -ngl"
            )
        self._room = n_seq, n_token

    def _in_worker(self, call: Callable[[], Any]) -> Any:
        """Return what a call of llama.cpp returns; an exception here, Ctrl-C for one, ends it first."""
        future = self._worker.submit(call)
        with cut_short() as files:
            try:
                while _runs(future) and not files:
                    pass
                if files:
                    raise MoneError(f"{files[0]} became shorter while llama.cpp read it: get it again")
            except BaseException:
                self._seam.interrupt()
                while _runs(future):
                    pass
                raise
        return future.result()


class _Log:
    """What llama.cpp says: to our log, and its errors kept."""

    def __init__(self) -> None:
        """Begin with nothing said."""
        import llama_cpp

        self.errors: list[str] = []
        self._line, self._level = "", 0
        self._set, self._callback = llama_cpp.llama_log_set, llama_cpp.llama_log_callback(self._hear)

    def listen(self) -> None:
        """Take llama.cpp's log from now on, whoever had it before; what was said is forgotten."""
        self.errors.clear()
        self._set(self._callback, ctypes.c_void_p(0))

    def reason(self) -> str:
        """Return the last error that says why; the very last ones only say that something failed."""
        telling = [line for line in self.errors if "error loading model" in line] or self.errors
        return telling[-1].rpartition("error loading model: ")[2] if telling else "it does not say why"

    def _hear(self, level: int, text: bytes, _: object) -> None:
        self._level = self._level if level == _CONTINUED else level
        self._line += text.decode(errors="replace")
        if self._line.endswith("\n"):
            line, self._line = self._line.strip(), ""
            if self._level > _DEBUG:
                log.debug("%s", line)
            if self._level == _ERROR:
                self.errors.append(line)


@cache
def _log() -> _Log:
    """Return where llama.cpp's log goes, which is one for the whole process."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    return _Log()


def _runs(future: Future[Any]) -> bool:
    """Wait for a call, but no longer than a signal may wait for its handler; returns whether it goes on."""
    return bool(wait([future], timeout=_PATIENCE).not_done)


def _one_thread(call: Callable[..., Any], *args: Any) -> Any:
    """Return what a call returns, torch using one thread meanwhile: others would wait for those of ggml."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return call(*args)
    finally:
        torch.set_num_threads(before)


def _on_cpu(n_layer: int) -> Any:
    """Return llama.cpp's overrides by which the experts of the first layers stay in main memory."""

    class Override(ctypes.Structure):
        """`llama_model_tensor_buft_override` of `llama.h`."""

        _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))

    buft = ggml().cpu_buffer_type()
    patterns = [rf"blk\.{layer}\.ffn_\w+_exps".encode() for layer in range(n_layer)]
    return (Override * (n_layer + 1))(*(Override(pattern, buft) for pattern in patterns))  # ends with NULL


def _fill(pointer: Any, values: Tensor) -> None:
    """Write values into a batch's array."""
    np.ctypeslib.as_array(pointer, (len(values),))[:] = values.numpy()
