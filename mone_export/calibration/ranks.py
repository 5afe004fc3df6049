"""Several processes at one calibration: `torchrun --nproc-per-node N -m mone_export ...`.

Each rank takes its share of the rows and runs the whole model on it; the statistics meet in
their `merge`, in the order of the ranks, on rank 0, which alone scores, plans and writes. Should a rank die,
torchrun ends the others.
"""

import datetime
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any, TypeVar

from mone_export.artifacts import ExpertStats, Found, InputSums
from mone_export.errors import MoneError
from mone_export.lazily import Tensor, torch

T = TypeVar("T")
_PATIENCE = datetime.timedelta(hours=6)  # between the first rank that is done and the last


def n_rank() -> int:
    """Return how many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process among them, from 0."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def joined() -> Iterator[None]:
    """Join the other ranks for the length of the block."""
    if n_rank() == 1:
        yield
        return
    # gloo: what travels lies in the machine's memory, sums
    _answering(partial(torch.distributed.init_process_group, "gloo", timeout=_PATIENCE))
    try:
        yield
    except Exception as error:  # not a signal: then a call to the others may be under way
        torch.distributed.destroy_process_group()
        if not isinstance(error, RuntimeError) or "gloo" not in str(error):
            raise
        raise MoneError("another of the processes has ended: what it said last says why") from None
    torch.distributed.destroy_process_group()


def _answering(call: Callable[[], T]) -> T:
    """Return what a call gives that waits for other ranks, and answer signals meanwhile.

    Python answers between two steps of the main thread, and such a call may be a step of hours: it is made in
    a thread of its own, which nobody waits for once a signal has come.
    """
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(call())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not found.done():
        wait_for([found], timeout=0.1)
    return found.result()


def own_device(device: str) -> str:
    """Return the device of this rank: of `cuda`, and of `auto` where there are GPUs, each has its own.

    Raises `MoneError` when there are fewer GPUs than processes.
    """
    if n_rank() == 1 or device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    n_gpu, n_local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if n_local > n_gpu:
        raise MoneError(
            f"{n_local} processes for {n_gpu} GPUs: torchrun --nproc-per-node {n_gpu}, or --device cpu"
        )
    return f"cuda:{os.environ['LOCAL_RANK']}"


def share(tokens: Tensor) -> Tensor:
    """Return this rank's part of the rows of text, [n_row, seq_len]."""
    if len(tokens) < n_rank():
        raise MoneError(
            f"{len(tokens)} rows of text for {n_rank()} processes: more --chunks or fewer processes"
        )
    return tokens.tensor_split(n_rank())[rank()]


def from_first(value: T) -> T:
    """Return rank 0's value on all ranks; the own one where they are not, or no longer, joined."""
    if n_rank() == 1 or not torch.distributed.is_initialized():
        return value
    values = [value]
    _answering(partial(torch.distributed.broadcast_object_list, values, src=0))
    return values[0]


def wait() -> None:
    """Return when all ranks have come this far."""
    if n_rank() > 1:
        _answering(torch.distributed.barrier)


def merged(found: Found) -> Found:
    """Return, on rank 0, what was found over the rows of all ranks; nothing on the others."""
    if n_rank() == 1:
        return found
    result: dict[Any, ExpertStats | InputSums] = {}
    for key, own in found.items():  # one at a time: they may be large
        parts: list[Any] | None = [None] * n_rank() if rank() == 0 else None
        _answering(partial(torch.distributed.gather_object, own, parts))
        if parts is not None:
            result[key] = reduce(type(own).merge, parts)
    return result
