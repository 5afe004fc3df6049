"""Promises about patches/: complete, explained, and exactly what the maintainers' tool writes."""

import re
import runpy
import subprocess
import sys
from email import message_from_string
from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest

from mone_export.runtime import tree
from mone_export.runtime.upstream import Upstream, read_series

ROOT = Path(__file__).resolve().parents[1]
PATCHES = ROOT / "patches"
SERIES = read_series(PATCHES)


def test_pin_is_complete() -> None:
    pin = Upstream.load(PATCHES / "UPSTREAM")
    assert re.fullmatch(r"[0-9a-f]{64}", pin.sha256)
    assert pin.version in pin.sdist


def test_series_names_every_patch_once() -> None:
    assert sorted(patch.name for patch in SERIES) == sorted(file.name for file in PATCHES.glob("*.patch"))


@pytest.mark.parametrize("patch", SERIES, ids=lambda patch: patch.stem)
def test_patch_says_why_and_when_it_goes(patch: Path) -> None:
    header = patch.read_text(encoding="utf-8").split("\ndiff --git ", 1)[0]
    for trailer in ("Reason", "Forwarded", "Remove-when"):
        assert re.search(rf"^{trailer}: \S", header, re.MULTILINE), f"{patch.name} lacks {trailer}:"


@pytest.mark.parametrize("patch", SERIES, ids=lambda patch: patch.stem)
def test_patch_has_the_author_and_the_date_of_all(patch: Path) -> None:
    readme = (PATCHES / "README.md").read_text(encoding="utf-8")
    promised = re.search(r"fixed \(`(.+? <.+?>)`, (\d+ \w+ \d+)\)", readme)
    assert promised
    header = message_from_string(patch.read_text(encoding="utf-8").split("\n", 1)[1])
    date = parsedate_to_datetime(header["Date"])
    assert (header["From"], f"{date.day} {date:%B %Y}") == promised.groups()


def test_series_stays_small() -> None:
    added = [
        line
        for patch in SERIES
        for line in patch.read_text(encoding="utf-8").splitlines()
        if line.startswith("+") and not line.startswith("+++")
    ]
    assert len(added) < 1100


def test_readme_lists_every_patch() -> None:
    readme = (PATCHES / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\((\S+\.patch)\)", readme)) == sorted(patch.name for patch in SERIES)


def test_registers_are_compared_kernel_by_kernel() -> None:
    check_cuda = runpy.run_path(str(ROOT / "tools/patches/check_cuda.py"))
    pairs = check_cuda["pairs"]
    assert pairs({"f<1": 40, "g": 20}, {"f<1, false": 40, "f<1, true": 44, "g": 21, "new": 9}) == (
        {"f<1": (40, 40), "g": (20, 21)},
        {"f<1": (40, 44)},
    )
    with pytest.raises(check_cuda["MoneError"], match="no kernel f<1"):
        pairs({"f<1": 40}, {"g": 40})


@pytest.mark.slow
def test_no_call_of_the_converter_trusts_a_model_by_itself() -> None:
    """Every place that loads a tokenizer asks the one attribute; a new release may bring new places."""
    calls = [
        (file.name, call)
        for file in sorted((tree() / "conversion").glob("*.py"))
        for call in re.findall(r"Auto\w+\.from_pretrained\(([^()]*)\)", file.read_text(encoding="utf-8"))
    ]
    allowed = ("trust_remote_code=self.trust_remote_code", "trust_remote_code=False")
    assert len(calls) > 20 and not [call for call in calls if not any(way in call[1] for way in allowed)]


@pytest.mark.slow
def test_series_applies_and_exports_to_the_same_bytes() -> None:
    command = [sys.executable, "tools/patches/llamacpp.py", "check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
