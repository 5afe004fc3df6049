"""What a release says and does, as far as it can be read here: container and workflow were never run."""

import json
import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from mone_export import runtime

ROOT = Path(__file__).parents[1]
CONTAINER = ROOT / "tools" / "release" / "Containerfile"
WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"


def wheels() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools" / "release" / "wheels.py"))


def steps() -> list[tuple[str, str]]:
    """The steps of the Containerfile: (instruction, rest), continued lines joined."""
    lines = [line for line in CONTAINER.read_text().splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in joined)]


def test_command_says_what_was_measured() -> None:
    file = ROOT / "docs" / "measurements" / "wheel.json"
    cases = json.loads(file.read_text())["cases"]
    for test, said in runtime.WHEEL_SPEED.items():
        ratios = [case["summary"][test]["speed_ratio"]["median"] for case in cases]
        assert said == round(min(ratios), 2) >= 0.97


def test_container_is_slim_and_runs_as_a_user() -> None:
    found = steps()
    assert found[0][0] == "FROM" and re.search(r"/debian:\w+-slim$", found[0][1])
    last_run = max(number for number, (name, _) in enumerate(found) if name == "RUN")
    (user,) = (number for number, (name, _) in enumerate(found) if name == "USER")
    assert user > last_run and found[user][1] != "root"
    assert any(f"useradd --create-home {found[user][1]}" in rest for _, rest in found)


def test_container_installs_the_wheels_and_no_compiler() -> None:
    runs = [re.sub(r"^(--mount=\S+ )*", "", rest) for name, rest in steps() if name == "RUN"]
    for run in runs:
        assert subprocess.run(["sh", "-n", "-c", run]).returncode == 0
    packages = [word for run in runs for word in re.findall(r"apt-get install ((?:[\w-]+ ?)+)", run)]
    assert [word for line in packages for word in line.split() if word[0] != "-"] == [
        "python3",
        "python3-venv",
    ]
    (mount,) = re.findall(r"type=bind,source=(\w+),target=(\S+)", CONTAINER.read_text())
    assert mount[0] == "dist" and f"pip install --no-cache-dir {mount[1]}/*.whl" in runs[-1]


def test_workflow_calls_the_targets_of_the_makefile() -> None:
    """Besides them only the release itself: nothing is built in a way that is not tried here."""
    (job,) = yaml.safe_load(WORKFLOW.read_text())["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands[:-1] == ["make test", "make wheel"] and commands[-1].startswith("gh release create ")
    for command in commands[:-1]:
        assert (
            subprocess.run(["make", "-n", *command.split()[1:]], cwd=ROOT, capture_output=True).returncode
            == 0
        )


def test_wheels_replace_their_own_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("thesis.txt", "mone_export-0-py3-none-any.whl", "mone_export-0.tar.gz", "SHA256SUMS"):
        (tmp_path / name).write_text("old")
    main = wheels()["main"]
    for name in ("compiled", "stage", "packed"):
        monkeypatch.setitem(main.__globals__, name, lambda *_: None)
    new = "mone_export-1-py3-none-any.whl"
    monkeypatch.setitem(main.__globals__, "run", lambda *_, **__: (tmp_path / new).write_text("new"))
    assert main(["--out", str(tmp_path)]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"thesis.txt", "SHA256SUMS", new}
    assert [line.split()[1] for line in (tmp_path / "SHA256SUMS").read_text().splitlines()] == [new]
