"""The checks of tools/trust/supply.py hold, and fail where what they look at is changed."""

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # a whole command each

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def supply() -> dict[str, Any]:
    """What the tool defines; it imports the file beside it."""
    sys.path.insert(0, str(ROOT / "tools" / "trust"))
    return runpy.run_path(str(ROOT / "tools" / "trust" / "supply.py"))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what says which packages are wanted and which are locked."""
    shutil.copy2(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(
        ROOT / "tools" / "release" / "requirements", tmp_path / "tools" / "release" / "requirements"
    )
    return tmp_path


def of_files(found: dict[str, Any]) -> list[str]:
    """What is wrong with the files, whatever is installed here."""
    return [line for line in found["failed"] if " is installed, " not in line]


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_lock_has_all_that_is_wanted(supply: dict[str, Any]) -> None:
    found = supply["lock"](ROOT)
    assert not of_files(found) and found["hashes"] > found["packages"] > 100


def test_lock_without_a_hash_fails(supply: dict[str, Any], project: Path) -> None:
    file = project / "tools" / "release" / "requirements" / "all.txt"
    lines = file.read_text().splitlines(keepends=True)
    number = next(number for number, line in enumerate(lines) if line.startswith("jinja2=="))
    end = next(at for at in range(number + 1, len(lines)) if "--hash" not in lines[at])
    version = lines[number].partition(" ")[0]
    file.write_text("".join([*lines[:number], version + "\n", *lines[end:]]))
    assert of_files(supply["lock"](project)) == [f"{version} has no hash"]


def test_lock_that_lags_behind_fails(supply: dict[str, Any], project: Path) -> None:
    change(project / "pyproject.toml", '"psutil>=6"', '"psutil>=999", "a-package-of-nobody"')
    lagging, missing = of_files(supply["lock"](project))
    assert lagging.startswith("pyproject.toml wants psutil>=999, locked is psutil==")
    assert missing == "pyproject.toml wants a-package-of-nobody, locked is None"


def test_other_installed_versions_fail(supply: dict[str, Any], project: Path) -> None:
    file = project / "tools" / "release" / "requirements" / "all.txt"
    change(file, "\njinja2==", "\njinja2==0.")
    assert any(
        line.startswith("jinja2 ") and "locked is 0." in line for line in supply["lock"](project)["failed"]
    )


def test_torch_from_pypi_has_hashes_of_its_own() -> None:
    """Else a machine with PyTorch's CPU wheels would fetch the CUDA libraries, or refuse its own wheel."""
    torch = (ROOT / "tools" / "release" / "requirements" / "torch.txt").read_text()
    rest = (ROOT / "tools" / "release" / "requirements" / "all.txt").read_text()
    assert "\ntorch==" in torch and "\nnvidia-" in torch
    assert "\ntorch==" not in rest and "nvidia-" not in rest and "\nsympy==" in rest


def test_audit_that_got_no_answer_is_not_clean(supply: dict[str, Any]) -> None:
    """pip-audit itself ends with 0 there."""
    skipped = {"name": "jinja2", "skip_reason": "not found on PyPI"}
    asked = {"name": "jinja2", "version": "3.1.6", "vulns": []}
    bad = {"name": "jinja2", "version": "1", "vulns": [{"id": "X-1"}]}
    found = [supply["judged"](json.dumps({"dependencies": each})) for each in ([skipped], [asked], [bad], [])]
    assert [each["state"] for each in found] == ["could not ask", "asked", "asked", "could not ask"]
    assert [each["not_asked"] for each in found] == [1, 0, 0, 0]
    assert [bool(each["failed"]) for each in found] == [False, False, True, False]


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs a checkout")
def test_two_builds_are_the_same_bytes(supply: dict[str, Any]) -> None:
    found = supply["builds"]()
    assert not found["failed"] and len(found["files"]) == 2
    dated = supply["builds"](dated=True)["failed"]
    assert any(line.endswith(".tar.gz differs") for line in dated)


def test_tests_that_did_not_run_are_not_sound(supply: dict[str, Any]) -> None:
    counts = [(0, 0, []), (3, 3, []), (3, 1, ["x"]), (3, 1, [])]
    keys = ("tests", "skipped", "failed")
    assert [supply["sound"](dict(zip(keys, each, strict=True))) for each in counts] == [
        False,
        False,
        False,
        True,
    ]
