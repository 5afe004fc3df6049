#!/usr/bin/env python3
"""What the package is made of and runs on: dependencies, advisories, equal builds, Pythons.

    python tools/trust/supply.py [--only lock audit builds claims pythons] [--dated] [-o FILE.json]

lock: what `make lock` wrote has a hash of every package and all that pyproject.toml asks for, and this
environment is what it says. audit: pip-audit asks PyPI about each locked version; one that it got no answer
for counts as not asked, never as clean. builds: the sdist and the wheel, made in two folders under two
umasks, are the same bytes (`--dated` lets them hold the time, to show that this can fail). claims: what is
said about network, archives and start, tested. pythons: fast tests of what differs between versions, on each
Python besides 3.11 that can be had, with the locked versions, and on 3.11 with the oldest that pyproject.toml
allows; PyTorch is downloaded for that. Prints its figures as JSON; returns 1 where a check failed.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from figures import keep
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCKS = Path("tools", "release", "requirements")
PIP_AUDIT = "pip-audit==2.10.1"
ACCEPTED: Mapping[str, str] = {}  # id of an advisory: why it does not concern this package
UNLOCKED = {"mone-export", "mone-llama", "llama-cpp-python", "gguf", "pip"}  # made here, or Python's own
CLAIMS = {
    "no network but for what is named": "tests/test_network.py",
    "archives: their hash first, and nothing leads out": "tests/test_runtime.py -k archive or members",
    "--help in 0.3 s, without PyTorch": "tests/test_help.py",
}
PYTHONS = (("3.11", "lowest-direct"), *((f"3.{minor}", "locked") for minor in (12, 13, 14)))
OF_PYTHONS = ("artifacts", "gguf_format", "help", "observer", "paths", "planning", "runtime", "templates")
FAST = ("-m", "not slow and not upstream and not gpu", *(f"tests/test_{name}.py" for name in OF_PYTHONS))
Figures = dict[str, Any]


def main() -> int:
    """Run the checks and print their figures; 1 where one failed."""
    checks: dict[str, Callable[[], Figures]] = {
        "lock": lambda: lock(ROOT),
        "audit": audit,
        "builds": lambda: builds(dated=options.dated),
        "claims": claims,
        "pythons": pythons,
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=checks, default=[*checks], metavar="CHECK", help="these checks"
    )
    parser.add_argument("--dated", action="store_true", help="builds that hold the time: they differ")
    parser.add_argument("-o", "--out", type=Path, help="JSON file (default: only printed)")
    options = parser.parse_args()
    found = {name: checks[name]() for name in checks if name in options.only}
    keep("supply", found, options.out)
    return int(any(each["failed"] for each in found.values()))


def lock(root: Path) -> Figures:
    """Compare requirements/ with pyproject.toml and with what is installed."""
    text = "".join(file.read_text() for file in sorted((root / LOCKS).glob("*.txt")))
    entries = re.findall(
        r"^([a-z0-9].*?)(?: \\)?$((?:\n    --hash=sha256:[0-9a-f]{64}.*)*)", text, re.MULTILINE
    )
    failed = [f"{entry} has no hash" for entry, hashes in entries if not hashes]
    locked: dict[str, list[Requirement]] = {}
    for entry in (Requirement(entry) for entry, _ in entries):
        locked.setdefault(canonicalize_name(entry.name), []).append(entry)
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    for wanted in map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["dev"]]):
        for found in locked.get(canonicalize_name(wanted.name), [None]):
            if found is None or not wanted.specifier.contains(version_of(found)):
                failed.append(f"pyproject.toml wants {wanted}, locked is {found}")
    here = {name: version_of(each) for name, several in locked.items() for each in several if applies(each)}
    installed = {canonicalize_name(each.name): each.version for each in distributions()}
    for name in installed.keys() - UNLOCKED:
        if here.get(name) != installed[name].partition("+")[0]:
            failed.append(f"{name} {installed[name]} is installed, locked is {here.get(name)}")
    return {
        "packages": len(locked),
        "hashes": text.count("--hash="),
        "installed": len(installed),
        "failed": failed,
    }


def version_of(locked: Requirement) -> str:
    """Return the one version that a line of the lock allows."""
    (specifier,) = locked.specifier
    return specifier.version


def applies(locked: Requirement) -> bool:
    """Say whether a line of the lock is for this system and Python."""
    return locked.marker is None or locked.marker.evaluate()


def audit() -> Figures:
    """Ask PyPI's advisories about every locked version that this system would install."""
    files = [word for file in sorted((ROOT / LOCKS).glob("*.txt")) for word in ("-r", file)]
    command = ["uv", "tool", "run", PIP_AUDIT, *files, "--require-hashes", "--disable-pip", "-f", "json"]
    return judged(run(*command, check=False).stdout)


def judged(answer: str) -> Figures:
    """Return what pip-audit's JSON says; a package that it skipped has not been asked about."""
    packages = json.loads(answer)["dependencies"] if answer.strip() else []
    told = {
        f"{each['name']} {advisory['id']}": ACCEPTED.get(advisory["id"])
        for each in packages
        for advisory in each.get("vulns", ())
    }
    not_asked = [each["name"] for each in packages if "skip_reason" in each]
    return {
        "packages": len(packages),
        "not_asked": len(not_asked),
        "state": "could not ask" if len(not_asked) == len(packages) else "asked",
        "explained": {name: reason for name, reason in told.items() if reason},
        "failed": [f"{name} has a known vulnerability" for name, reason in told.items() if not reason],
    }


def builds(*, dated: bool = False) -> Figures:
    """Make the sdist and the wheel twice, from copies that differ in all but their content."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = built(folder / "a", 0o022, dated)
        second = built(folder / "of another name" / "b", 0o077, dated)
    failed = [
        f"{name} differs" for name in first.keys() | second.keys() if first.get(name) != second.get(name)
    ]
    return {"files": {file: first[file] for file in sorted(first)}, "failed": failed}


def built(folder: Path, umask: int, dated: bool) -> dict[str, str]:
    """Copy what is tracked into `folder` under a umask, build there; returns the SHA-256 of what is made."""
    names = run("git", "ls-files", "-z", cwd=ROOT).stdout.split("\0")
    before = os.umask(umask)
    try:
        for name in filter(None, names):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
        if dated:
            with (folder / "pyproject.toml").open("a") as file:
                file.write("\n[tool.hatch.build]\nreproducible = false\n")
            os.utime(folder / "LICENSE", (10**9 + umask, 10**9 + umask * 1000))
        run(sys.executable, "-m", "hatchling", "build", "-d", folder / "dist", cwd=folder)
    finally:
        os.umask(before)
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (folder / "dist").iterdir()}


def claims() -> Figures:
    """Run the tests of what the docs say."""
    found = {}
    for claim, words in CLAIMS.items():
        file, *rest = words.split(maxsplit=2)
        found[claim] = tested(Path(sys.executable), file, *rest)
    return {"tests": found, "failed": [claim for claim, counts in found.items() if not sound(counts)]}


def pythons() -> Figures:
    """Run the fast tests on every Python, and with the oldest and the newest versions that are allowed."""
    found: dict[str, Figures] = {}
    for python, versions in PYTHONS:
        if run("uv", "python", "find", "--no-python-downloads", python, check=False).returncode:
            found[f"{python}, {versions}"] = {"state": "not to be had here"}
            continue
        with tempfile.TemporaryDirectory() as name:
            found[f"{python}, {versions}"] = tested(environment(Path(name), python, versions), *FAST)
    failed = [name for name, counts in found.items() if "state" not in counts and not sound(counts)]
    return {"fast_tests": found, "failed": failed}


def environment(folder: Path, python: str, versions: str) -> Path:
    """Make an environment with the package and what it needs, locked or resolved; returns its Python."""
    program = folder / "bin" / "python"
    install = ("uv", "pip", "install", "--quiet", "--python", program)
    wheels = [
        word for place in os.environ.get("PIP_FIND_LINKS", "").split() for word in ("--find-links", place)
    ]
    run("uv", "venv", "--quiet", "--python", python, folder)
    if versions == "locked":
        for file in ("build.txt", "all.txt"):
            run(*install, "--require-hashes", "--no-deps", "-r", ROOT / LOCKS / file)
        run(*install, *wheels, "-e", f"{ROOT}[dev]")
    else:
        run(*install, *wheels, "--resolution", versions, "-e", f"{ROOT}[dev]")
    return program


def tested(python: Path, *words: str) -> Figures:
    """Run pytest; returns how many tests there were, and which failed."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "junit.xml"
        command = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={file}", *words)
        done = run(*command, cwd=ROOT, check=False)
        if not file.exists():
            return {"tests": 0, "skipped": 0, "failed": [done.stderr[-500:]]}
        cases = list(ElementTree.parse(file).iter("testcase"))
    wrong = [
        f"{case.get('classname')}.{case.get('name')}" for case in cases if {"failure", "error"} & tags(case)
    ]
    return {
        "tests": len(cases),
        "skipped": sum("skipped" in tags(case) for case in cases),
        "failed": wrong,
    }


def tags(case: ElementTree.Element) -> set[str]:
    """Return what stands in a test case of a JUnit file."""
    return {child.tag for child in case}


def sound(counts: Figures) -> bool:
    """Say whether tests ran, and none failed."""
    return counts["tests"] > counts["skipped"] and not counts["failed"]


def run(*command: object, cwd: Path | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a program of this environment."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True)
    if check and done.returncode:
        raise SystemExit(f"supply.py: {command[0]} failed: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done


if __name__ == "__main__":
    sys.exit(main())
