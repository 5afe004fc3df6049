"""How large a file this machine can hold: what `--fit auto` stands for.

That is the memory of the GPUs that the newest build of llama.cpp sees, or else the machine's own, as much as
is free now, less the cache of keys and values for a text, and less what llama.cpp's own `--fit` leaves free
on every device for buffers.
"""

import re
import subprocess
from dataclasses import dataclass

from mone_export.errors import MoneError
from mone_export.inspection.cache_memory import memory
from mone_export.memory import free_memory
from mone_export.output.writing import Edits, make_holes, written_head
from mone_export.pruning.planning import plan_without_scores
from mone_export.recipe import Recipe
from mone_export.runtime import path as find_programs
from mone_export.runtime import program
from mone_export.source import Source
from mone_export.source.gguf_header import read_header
from mone_export.terminal import as_size

N_CTX = 8192  # tokens of a text, unless another number is asked for or the model was made for fewer
MARGIN = 2**30  # bytes on each device, llama.cpp's default for --fit-target
_DEVICE = re.compile(r"^ +(\w+): (.*) \((\d+) MiB, (\d+) MiB free\)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Room:
    """What a machine has: free bytes by device, and the bytes of a cache of `n_ctx` tokens."""

    devices: dict[str, int]
    n_ctx: int
    cache: int

    @property
    def size(self) -> int:
        """The largest size of a file."""
        return max(0, sum(max(0, free - MARGIN) for free in self.devices.values()) - self.cache)

    def __str__(self) -> str:
        """Return the sum in words."""
        free = ", ".join(f"{as_size(size)} free of {name}" for name, size in self.devices.items())
        return (
            f"{free}, less {as_size(self.cache)} for the cache of {self.n_ctx} tokens and {as_size(MARGIN)} "
            f"of each for buffers: {as_size(self.size)}"
        )


def room(source: Source, asked: str) -> Room:
    """Return the room there is for a model; `asked` is `auto`, or `auto:N` for a text of N tokens.

    Raises `MoneError` for anything else, and for a machine without room.
    """
    match = re.fullmatch(r"auto(?::(\d{1,9}))?", asked)
    if not match:
        raise MoneError(
            f"--fit {asked}: pass a size (16GiB; from Python a number of bytes), auto, or auto:32768 for "
            "texts that long"
        )
    window = source.limits[1]
    n_ctx = int(match[1] or min(N_CTX, window or N_CTX))
    found = Room(gpus() or {"main memory": free_memory()}, n_ctx, _cache(source, n_ctx))
    if not found.size:
        raise MoneError(f"--fit {asked} finds no room ({found}): end other programs, or pass a size")
    return found


def gpus() -> dict[str, int]:
    """Return the free bytes of each GPU that the newest build sees, by its name; empty without a build."""
    try:
        command = [str(program(find_programs(), "llama-bench")), "--list-devices"]
        listed = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60, check=False)
    except (MoneError, OSError, subprocess.TimeoutExpired):
        return {}
    return devices(listed.stdout)


def devices(listed: str) -> dict[str, int]:
    """Return the free bytes of each device that llama.cpp's `--list-devices` prints, by its name.

    Those without memory of their own (BLAS) are libraries for the CPU.
    """
    found = _DEVICE.findall(listed)
    return {f"{name} ({what})": int(free) * 2**20 for name, what, total, free in found if int(total)}


def _cache(source: Source, n_ctx: int) -> int:
    """Return the bytes of a cache of `n_ctx` tokens, from the head of the unpruned file."""
    plan = plan_without_scores(source.spec, Recipe.of(0.0))
    with written_head(Edits(plan, {}, {}), source, {}, outtype="auto") as (head, size, _):
        make_holes(head, size)
        header = read_header(head)
        arch = str(header.value("general.architecture"))
        n_layer = header.integer(f"{arch}.block_count") - header.integer(f"{arch}.nextn_predict_layers")
        return memory(header, arch, n_layer, n_ctx).cache
