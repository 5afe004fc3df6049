"""The trials of tools/trust find nothing, and would find something."""

import importlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mone_export.runtime.upstream import source

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def figures(tool: str, *options: str) -> tuple[int, dict[str, Any]]:
    """Run a tool; return its status and its figures."""
    program = [sys.executable, str(ROOT / "tools" / "trust" / tool), *options]
    done = subprocess.run(program, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.stdout, done.stderr[-2000:]
    return done.returncode, json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
@pytest.mark.upstream
@pytest.mark.nightly
def test_a_fault_trial_fails_where_the_output_is_made_in_place() -> None:
    one = ("--trials", "4", "--fault", "file size limit")
    assert figures("faults.py", *one)[0] == 0
    status, found = figures("faults.py", *one, "--without", "rename")
    assert status == 1 and "neither the old one nor the new one" in found["failures"][0]["wrong"][0]


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
def test_a_fault_trial_fails_where_a_rename_comes_before_the_flush() -> None:
    one = ("--trials", "1", "--fault", "power cut")
    assert figures("faults.py", *one)[0] == 0
    status, found = figures("faults.py", *one, "--without", "flush")
    assert status == 1 and any("is not flushed" in wrong for wrong in found["failures"][0]["wrong"])


@pytest.mark.parametrize(
    "reader", [*(pytest.param(name, marks=pytest.mark.nightly) for name in ("statistics", "plan")), "index"]
)
@pytest.mark.nightly
def test_broken_files_are_read_or_refused(reader: str) -> None:
    status, found = figures("fuzz.py", "--seconds", "5", "--reader", reader)
    assert status == 0, found
    assert found["readers"][reader]["cases"] > 50


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.upstream
def test_a_server_keeps_its_answers_under_load() -> None:
    few = ("--seconds", "10", "--clients", "4", "--kind", "thin experts")
    status, found = figures("server.py", *few)
    run = found["runs"]["thin experts"]
    assert status == 0, run
    assert run["answers"] and run["cancelled"] and run["malformed"]
    status, found = figures("server.py", *few, "--answers-of", "unpruned")
    assert status == 1 and found["runs"]["thin experts"]["wrong"]


def test_memory_that_grows_is_told_from_memory_that_swings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "trust"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    growth = importlib.import_module("server").growth
    dice = random.Random(0)
    swings = [(float(second), 10**9 + dice.randrange(2**20)) for second in range(1200)]
    slope, error = growth(swings)
    assert abs(slope) < 3 * error < 30
    slope, error = growth([(second, n + second * 5000) for second, n in swings])  # bytes a second
    assert abs(slope - 5000 * 60 / 1024) < 3 * error


@pytest.mark.nightly
def test_a_few_tests_are_too_few(tmp_path: Path) -> None:
    """Coverage of what they run is counted, and is below what is asked for."""
    few = ("tests/test_allocation.py", "--numprocesses", "0")
    status, found = figures("branches.py", "--folder", str(tmp_path), *few)
    assert status == 1 and found["percent"] < found["asked_percent"]
    assert found["tests"]["passed"] > 5 and not found["tests"]["failed"]
    assert 0 < found["branches"][0] < found["branches"][1] and len(found["lowest"]) == 10


@pytest.mark.upstream
def test_broken_ggufs_show_a_loader_that_lacks_a_check() -> None:
    """Needs what `make trust-sanitizers` builds, in half an hour."""
    stamps = source().folder.glob("*/bin/build.json")
    if ["llama"] not in [json.loads(stamp.read_text())["targets"] for stamp in stamps]:
        pytest.skip("no libraries with sanitizers: make trust-sanitizers")
    status, found = figures("sanitizers.py", "--part", "mutants", "--mutants", "60")
    assert status == 0, found
    assert found["mutants"]["ended"]["aimed, refused"] > 5
    status, found = figures("sanitizers.py", "--mutants", "60", "--without", "sizes")
    assert status == 1 and found["mutants"]["ours"]
