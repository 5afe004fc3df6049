"""`mone-export` as a test calls it, in the test's own process."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from mone_export import cli

SMALL_TEXT = ("--chunks", "2", "-c", "32")


class Done(NamedTuple):
    """What a run of the command returned and said."""

    status: int
    out: str
    err: str

    def is_fine(self) -> None:
        """Assert that it did what was asked for."""
        assert self.status == 0, self.err

    def is_one_line(self, pattern: str) -> None:
        """Assert that it failed with one line that matches, which is not the last resort's."""
        assert self.status == 1, (self.status, self.err)
        (line,) = self.err.splitlines()
        assert re.match(rf"mone-export: .*{pattern}", line), line
        assert "unexpected" not in line and not self.out


class Command:
    """Runs it on a model and a text, at half of the experts, unless the arguments say otherwise."""

    def __init__(self, model: Path, text: Path, captured: pytest.CaptureFixture[str]) -> None:
        self.model, self.text, self._captured = model, text, captured

    def __call__(
        self, *arguments: object, model: object = None, text: object = None, quiet: bool = True
    ) -> Done:
        given = [str(argument) for argument in arguments]
        if not {"--fit", "--ratio"} & set(given):
            given += ["--ratio", "0.5"]
        if text != "":
            given += ["-f", str(text or self.text), *SMALL_TEXT]
        status = cli.main([str(model or self.model), *given, *(["-q"] if quiet else [])])
        out, err = self._captured.readouterr()
        return Done(status, out, err)


def names(folder: Path) -> Sequence[str]:
    """What lies in a folder."""
    return sorted(file.name for file in folder.iterdir())
