"""The trials of tools/trust find nothing, and would find something."""

import json
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
def test_a_fault_trial_fails_where_the_output_is_made_in_place() -> None:
    one = ("--trials", "1", "--fault", "llama-quantize killed")
    assert figures("faults.py", *one)[0] == 0
    status, found = figures("faults.py", *one, "--without", "rename")
    assert status == 1 and "neither the old one nor the new one" in found["failures"][0]["wrong"][0]


@pytest.mark.parametrize("reader", ["statistics", "plan"])
def test_broken_files_are_read_or_refused(reader: str) -> None:
    status, found = figures("fuzz.py", "--seconds", "5", "--reader", reader)
    assert status == 0, found
    assert found["readers"][reader]["cases"] > 50


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
