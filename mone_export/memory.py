"""How much memory there is to work with, and giving back what is free."""

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from mone_export.lazily import torch

_PROC, _CGROUP = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def free_memory(device: str = "cpu") -> int:
    """Return the bytes that can still be used on a device: of a machine's memory, this process's share."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    if device == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    free = min([int(psutil.virtual_memory().available), *group_rooms()])
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun: so many processes share it


def group_rooms(membership: Path = _PROC, tree: Path = _CGROUP) -> Iterator[int]:
    """Yield the bytes that each control group around this process still grants; none where nothing limits.

    `membership` names the process's groups, `tree` is where they are mounted. The group itself and all groups
    above it count. Files in the page cache are no use of memory: the kernel drops them when it needs room.

    Source: the kernel's `cgroup-v2.rst` and `cgroup-v1/memory.rst`.
    """
    with suppress(OSError):
        for line in membership.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                for root in (tree, tree / "unified"):
                    yield from _rooms(root, path, ("memory.max", "memory.high"), "memory.current", "")
            elif "memory" in controllers.split(","):
                limits = ("memory.limit_in_bytes",)
                yield from _rooms(tree / "memory", path, limits, "memory.usage_in_bytes", "total_")


def give_back() -> None:
    """Return freed memory to the system: glibc keeps it otherwise, scattered over its threads' arenas."""
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):  # another C library; Windows wants a name
        ctypes.CDLL(None).malloc_trim(0)


def _rooms(root: Path, path: str, limits: tuple[str, ...], usage: str, prefix: str) -> Iterator[int]:
    """Yield the room of the group `path` and of those above it: a container may see the root alone."""
    below = [part for part in path.split("/") if part not in ("", "..")]
    for depth in range(len(below), -1, -1):
        group = root.joinpath(*below[:depth])
        granted = [limit for name in limits if (limit := _number(group / name)) is not None]
        used = _number(group / usage)
        if granted and used is not None:
            yield max(0, min(granted) - max(0, used - _cached(group / "memory.stat", prefix)))


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no such group, or no limit: "max"
        return None


def _cached(stat: Path, prefix: str) -> int:
    """Return the bytes of files that a group, and those below it, hold in the page cache."""
    wanted = {f"{prefix}{kind}" for kind in ("active_file", "inactive_file")}
    try:
        entries = [line.split() for line in stat.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return 0
    return sum(int(entry[1]) for entry in entries if entry[:1] and entry[0] in wanted)
