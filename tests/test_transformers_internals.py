"""Another version of transformers than the tested one is named, with the command that mends it."""

import tomllib
from pathlib import Path

import pytest

from mone_export import transformers_internals
from mone_export.errors import MoneError
from mone_export.transformers_internals import TESTED, check_version


def test_tested_version_is_the_pinned_one() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert f"transformers=={TESTED}" in project["project"]["dependencies"]
    check_version()


def test_another_version_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    # by the module's own reference: another test may have imported transformers anew
    monkeypatch.setattr(transformers_internals.transformers, "__version__", "5.99.1")
    with pytest.raises(MoneError, match=rf"^transformers 5\.99\.1 is installed, .*=={TESTED}$"):
        check_version()
