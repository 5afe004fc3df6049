"""Every command answers `--help` at once: in 0.3 s of one core, without PyTorch and the like."""

import os
import sys
import tomllib
from pathlib import Path

import pytest

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
HEAVY = {"torch", "transformers", "matplotlib", "numpy"}
CODE = """
import sys
from {module} import main
try:
    main(["--help"])
except SystemExit:
    sys.exit(len({heavy} & sys.modules.keys()))
"""


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="asks the system for the seconds of one process")
@pytest.mark.parametrize("command", PROJECT["scripts"])
def test_help_takes_no_time(command: str) -> None:
    code = CODE.format(module=PROJECT["scripts"][command].partition(":")[0], heavy=HEAVY)
    seconds = []
    for _ in range(5):  # another process may have the caches
        status, used = run(code)
        assert status == 0, f"{status} of {HEAVY} imported"
        seconds.append(used)
        if used < 0.3:
            break
    print(f"{command}: {min(seconds):.3f} s")
    assert min(seconds) < 0.3


def run(code: str) -> tuple[int, float]:
    """Run Python code that prints something; returns its status and its seconds of CPU."""
    nowhere = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    child = os.posix_spawn(sys.executable, [sys.executable, "-c", code], os.environ, file_actions=nowhere)
    _, status, used = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
