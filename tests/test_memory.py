"""The memory that there is: a machine's, less what the control groups around a process do not grant."""

from pathlib import Path

import psutil
import pytest

from mone_export import memory
from mone_export.memory import free_memory, group_rooms

MB = 10**6


def group(folder: Path, *, version: int, limit: int | str, used: int, cached: int = 0) -> None:
    """Write a group's files as the kernel shows them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    lines = {"anon": used - cached, "inactive_file": cached // 4, "active_file": cached - cached // 4}
    text = "".join(f"{names[2]}{name} {value}\n" for name, value in lines.items())
    if version == 1:  # without its children's
        text = f"inactive_file {cached // 8}\nactive_file 0\n{text}"
    (folder / "memory.stat").write_text(text)


@pytest.fixture(params=[1, 2])
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


class Machine:
    """A tree of control groups, and a process in it."""

    def __init__(self, folder: Path, version: int) -> None:
        self.version, self.membership, self.tree = version, folder / "cgroup", folder / "tree"
        self.root = self.tree if version == 2 else self.tree / "memory"

    def place(self, path: str) -> None:
        line = f"0::{path}" if self.version == 2 else f"4:memory:{path}"
        self.membership.write_text(f"7:pids:/elsewhere\n{line}\n")

    def rooms(self) -> list[int]:
        return list(group_rooms(self.membership, self.tree))


@pytest.fixture
def machine(tmp_path: Path, version: int) -> Machine:
    return Machine(tmp_path, version)


def test_the_groups_above_count(machine: Machine) -> None:
    machine.place("/slice/job/step")
    group(machine.root / "slice" / "job", version=machine.version, limit=300 * MB, used=250 * MB)
    group(machine.root / "slice" / "job" / "step", version=machine.version, limit=200 * MB, used=50 * MB)
    assert machine.rooms() == [150 * MB, 50 * MB]


def test_page_cache_is_not_used_memory(machine: Machine) -> None:
    machine.place("/job")
    group(machine.root / "job", version=machine.version, limit=100 * MB, used=99 * MB, cached=80 * MB)
    assert machine.rooms() == [81 * MB]


def test_no_room_is_no_room(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.place("/job")
    group(machine.root / "job", version=machine.version, limit=100 * MB, used=101 * MB)
    assert machine.rooms() == [0]
    monkeypatch.setattr(memory, "group_rooms", machine.rooms)
    assert free_memory() == 0


def test_a_container_sees_its_own_group_as_the_root(machine: Machine) -> None:
    machine.place("/docker/0123")
    group(machine.root, version=machine.version, limit=100 * MB, used=60 * MB)
    assert machine.rooms() == [40 * MB]


def test_a_group_without_a_limit_takes_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 2)
    machine.place("/job")
    group(machine.root / "job", version=2, limit="max", used=60 * MB)
    assert machine.rooms() == []


def test_a_group_is_slowed_down_from_its_high_mark(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 2)
    machine.place("/job")
    group(machine.root / "job", version=2, limit="max", used=60 * MB)
    (machine.root / "job" / "memory.high").write_text(f"{80 * MB}\n")
    assert machine.rooms() == [20 * MB]


def test_without_groups_the_machine_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "group_rooms", lambda: group_rooms(tmp_path / "none", tmp_path))
    assert 0 < free_memory() <= psutil.virtual_memory().total


def test_giving_back_needs_no_certain_c_library() -> None:
    memory.give_back()


def test_processes_share_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "group_rooms", lambda: [60 * MB])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert free_memory() == 20 * MB
