#!/usr/bin/env python3
"""How much of the package the test suite runs: its lines, and both ways of each of its branches.

    python tools/trust/branches.py [-o FILE.json] [--folder build/coverage] [PYTEST'S ARGUMENTS]

Runs the whole suite, or what the arguments select, under coverage, in processes that tests start as well;
`[tool.coverage]` in pyproject.toml has the settings, and the share that is asked for (`fail_under`), of lines
and branches together. Prints its figures as JSON; the data stay in the folder, for `coverage html`. Returns 1
below that share, and where a test failed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coverage import Coverage
from figures import keep

ROOT = Path(__file__).resolve().parents[2]
WORKERS = ("--numprocesses", "logical", "--maxprocesses", "4", "--dist", "loadfile")
N_LOWEST = 10


def main() -> int:
    """Run the tests and say what they ran; returns 1 where that is too little."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", type=Path, dest="out", help="keep the figures in this file, too")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "coverage", help="of the data")
    args, selected = parser.parse_known_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    tests = run(args.folder, selected)
    found = measured(args.folder)
    keep("coverage", {"seconds": round(time.monotonic() - start), "tests": tests, **found}, args.out)
    return int(found["percent"] < found["asked_percent"] or bool(tests["failed"]) or not tests["passed"])


def run(folder: Path, selected: list[str]) -> dict[str, int]:
    """Run tests under coverage; return how many passed, failed and were skipped."""
    for old in folder.glob("data*"):
        old.unlink()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    environment |= {"COVERAGE_FILE": str(folder.resolve() / "data"), "PYTHONHASHSEED": "0"}
    results = folder.resolve() / "results.xml"
    pytest = ["pytest", "-q", *WORKERS, f"--junitxml={results}", *selected]
    command = [sys.executable, "-m", "coverage", "run", "-m", *pytest]
    subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=False)
    return counted(results)


def counted(results: Path) -> dict[str, int]:
    """Return pytest's counts from its file of results."""
    (suite,) = ET.parse(results).getroot().iter("testsuite")
    n = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = n["failures"] + n["errors"]
    return {"passed": n["tests"] - failed - n["skipped"], "failed": failed, "skipped": n["skipped"]}


def measured(folder: Path) -> dict[str, Any]:
    """Put the data of all processes together; return what they cover, and the files with the least."""
    coverage = Coverage(data_file=str(folder / "data"), config_file=str(ROOT / "pyproject.toml"))
    coverage.combine(keep=True)
    coverage.json_report(outfile=str(folder / "report.json"))
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    files = {name: summary(file["summary"]) for name, file in report["files"].items()}
    lowest = sorted(files, key=lambda name: files[name]["percent"])[:N_LOWEST]
    asked = coverage.get_option("report:fail_under")
    return {
        **summary(report["totals"]),
        "asked_percent": asked,
        "lowest": {name: files[name] for name in lowest},
    }


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return lines and branches, [run, all], and the share of both together, from coverage's own summary."""
    return {
        "lines": [found["covered_lines"], found["num_statements"]],
        "branches": [found["covered_branches"], found["num_branches"]],
        "percent": round(found["percent_covered"], 2),
    }


if __name__ == "__main__":
    sys.exit(main())
