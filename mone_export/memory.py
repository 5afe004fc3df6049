"""How much memory there is to work with, and giving back what is free."""

import ctypes
import gc
import os
import re
from contextlib import suppress
from pathlib import Path

import torch

# what a container may use, and uses: control groups, version 2 and 1
_CGROUP = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def free_memory(device: str = "cpu") -> int:
    """Return the bytes that can still be used on a device: of a machine's memory, this process's share."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    if device == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    free = min([_available(), *_container_room()])
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun: so many processes share it


def give_back() -> None:
    """Return freed memory to the system: glibc keeps it otherwise, scattered over its threads' arenas."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _available() -> int:
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    names = ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES")  # macOS knows the second only
    name = next(name for name in names if name in os.sysconf_names)
    return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")


def _container_room() -> list[int]:
    rooms = []
    for limit, usage in _CGROUP:
        try:
            rooms.append(int(limit.read_text()) - int(usage.read_text()))
        except (OSError, ValueError):  # no such group, or no limit: "max"
            continue
    return [room for room in rooms if room > 0]
