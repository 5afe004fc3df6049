#!/usr/bin/env python3
"""Small faults made in the package on purpose, one at a time: how many of them the tests notice.

    python tools/trust/mutants.py [--module FILE]... [--sample 150] [--seed 1] [-o FILE.json] [--reasons]

mutmut makes the mutants in a copy of the sources, and tries each in a process forked from one that has
collected the tests: those that reach the mutant's function, the fastest first, until one fails. `MODULES`
says which tests belong to a module: such as need neither training nor an export from transformers, since
every mutant would pay for it. Of a module with more mutants than `--sample` a random choice is tried. A
mutant survives where all its tests pass, or none reaches it; one that runs into the time limit is killed.
Why none can notice a survivor, `mutants.json` beside this program says; that only a message reads otherwise,
the program sees. mutmut changes neither functions with decorators nor what stands outside of functions.

Prints its figures as JSON, those of other modules as FILE.json has them; returns 1 where fewer than 85% of a
module's mutants were killed.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

from figures import keep

ROOT = Path(__file__).resolve().parents[2]
REASONS = Path(__file__).with_suffix(".json")
ENOUGH = 85  # percent
MODULES: Mapping[str, tuple[str, ...]] = {
    "mone_export/pruning/scoring.py": ("tests/test_scoring.py", "tests/test_guard.py"),
    "mone_export/pruning/planning.py": ("tests/test_planning.py",),
    "mone_export/pruning/allocation.py": ("tests/test_planning.py", "tests/test_allocation.py"),
    "mone_export/statistics.py": ("tests/test_statistics.py",),
    "mone_export/calibration/sums.py": ("tests/test_sums.py",),
    "mone_export/output/writing.py": ("tests/test_edits.py",),
}
PYTEST = ("-p", "mutants", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow")
KILLED = {1, 3}  # statuses of pytest: a test failed, or pytest itself did
TEXT = re.compile(r'"[^"]*"')  # one with a space in it is for people: keys and names have none
TIMEOUT = {-24, 24, 36, 152, 255}

Json = dict[str, Any]


def main() -> int:
    """Try the modules one after the other; returns 1 where too many mutants survived."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--module", choices=MODULES, action="append", help="only this one, repeatable")
    parser.add_argument("--sample", type=int, default=150, help="mutants of a module at most (default 150)")
    parser.add_argument("--seed", type=int, default=1, help="of the choice (default 1)")
    parser.add_argument("--reasons", action="store_true", help="try none, only write reasons anew")
    parser.add_argument("-o", type=Path, dest="out", help="keep the figures in this file, too")
    args = parser.parse_args()
    found = json.loads(args.out.read_text())["modules"] if args.out and args.out.exists() else {}
    for module in () if args.reasons else args.module or MODULES:
        found[module] = tried(ROOT, module, MODULES[module], args.sample, args.seed)
    for module, figures in found.items():
        for each in figures["survivors"]:
            each["reason"] = reason(module, each["function"], each["change"])
    keep("mutants", {"modules": {name: found[name] for name in MODULES if name in found}}, args.out)
    return int(any(each["percent"] < ENOUGH for each in found.values()))


def tried(root: Path, module: str, tests: Sequence[str], n: int, seed: int) -> Json:
    """Return a module's figures: its mutants, the chosen ones among them, and what became of those."""
    work = prepared(root, module, tests)
    with chdir(work):
        from mutmut.configuration import reset_config
        from mutmut.mutation.diff_apply import get_diff_for_mutant
        from mutmut.mutation.file_mutation import mutate_file_contents

        reset_config()  # it is read from the folder
        mutants = sorted(mutate_file_contents(module, Path(module).read_text(encoding="utf-8")).mutant_names)
        names = sorted(random.Random(seed).sample(mutants, min(n, len(mutants))))
        prefix = module.removesuffix(".py").replace("/", ".")
        statuses = run(work, module, [f"{prefix}.{name}" for name in names])
        alive = [name for name, status in statuses.items() if status not in KILLED | TIMEOUT]
        survivors = [described(name, get_diff_for_mutant(name, path=module)) for name in alive]
    return {
        "mutants": len(mutants),
        "tried": len(names),
        "killed": len(names) - len(alive),
        "timeouts": sum(status in TIMEOUT for status in statuses.values()),
        "survived": len(alive),
        "percent": round(100 * (1 - len(alive) / len(names)), 1),
        "seed": seed,
        "tests": list(tests),
        "survivors": survivors,
    }


def prepared(root: Path, module: str, tests: Sequence[str]) -> Path:
    """Make the folder that mutmut works in: links to the sources and the tests, and its settings."""
    work = root / "build" / "mutants" / Path(module).stem
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    package = Path(module).parts[0]
    names = [name for name in (package, "tests", "patches") if (root / name).exists()]
    for name in names:
        (work / name).symlink_to(root / name)
    settings = {
        "source_paths": [package],
        "only_mutate": [module],
        "also_copy": names[1:],
        "pytest_add_cli_args": PYTEST,
        "pytest_add_cli_args_test_selection": tests,
        "timeout_constant": 3.0,  # seconds, beside those that the tests take; all of it times 8
        "timeout_multiplier": 8.0,
        "track_dependencies": False,
        "use_git_change_detection": False,
        "use_setproctitle": False,
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    given = root / "pyproject.toml"
    own = given.read_text(encoding="utf-8") if given.exists() else ""
    (work / "pyproject.toml").write_text("\n".join([own, "[tool.mutmut]", *lines, ""]), encoding="utf-8")
    return work


def run(work: Path, module: str, names: Sequence[str]) -> dict[str, int]:
    """Let mutmut try the mutants, and return pytest's status for each."""
    program = [sys.executable, "-c", "from mutmut.__main__ import cli; cli()", "run", "--max-children", "2"]
    own = {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    with (work / "log").open("w") as log:
        subprocess.run(
            [*program, *names], cwd=work, env=os.environ | own, stdout=log, stderr=log, check=False
        )
    meta = work / "mutants" / f"{module}.meta"
    found = json.loads(meta.read_text())["exit_code_by_key"] if meta.exists() else {}
    if any(found.get(name) is None for name in names):
        raise SystemExit(f"mutmut did not come to its end with {module}: see {work / 'log'}")
    return {name: found[name] for name in names}


def described(name: str, diff: str) -> dict[str, str]:
    """Return a survivor's function, and what was changed in it."""
    function = re.sub(r"__mutmut_\d+$", "", name.rpartition(".")[2])
    changed = [line for line in diff.splitlines()[2:] if line[:1] in "-+"]
    old, new = (" ".join(line[1:].strip() for line in changed if line[0] == sign) for sign in "-+")
    return {"function": function[2:].replace("\u01c1", "."), "change": f"{old} -> {new}"}


def reason(module: str, function: str, change: str) -> str:
    """Return why no test noticed a survivor, as far as that is known."""
    known = json.loads(REASONS.read_text(encoding="utf-8")).get(f"{Path(module).stem}.{function}", {})
    old, _, new = change.partition(" -> ")
    texts = [text for text in TEXT.findall(old) if text not in new]
    if old.lower() == new.lower().replace("xx", "") and any(" " in text for text in texts):
        return "message text only"
    return str(known.get(change, "not killed"))


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Let pytest, where this file is its plugin, run the fastest tests first, by the times mutmut took."""
    times = Path("mutmut-stats.json")
    if times.exists():
        known = json.loads(times.read_text())["duration_by_test"]
        items.sort(key=lambda item: known.get(item.nodeid, 0))


if __name__ == "__main__":
    sys.exit(main())
