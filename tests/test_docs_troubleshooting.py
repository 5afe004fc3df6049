"""The page of error messages: each message that it quotes is one that the package can give."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
QUOTED = re.findall(r"^### `(.*)`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
GAP = "\N{HORIZONTAL ELLIPSIS}"


def messages() -> set[str]:
    """Return every text of the package, with `GAP` for what is put in when it runs."""
    found = set()
    for file in (ROOT / "mone_export").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
                found.add("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def gives(message: str, quoted: str) -> bool:
    """Say whether a message can read as it is quoted; a gap of the quotation may stand for more."""
    pattern = ".*".join(re.escape(part) for part in quoted.split(GAP))
    return re.fullmatch(pattern, message) is not None


@pytest.fixture(scope="module")
def known() -> set[str]:
    return messages()


def test_there_are_enough() -> None:
    assert len(QUOTED) >= 20 and len(set(QUOTED)) == len(QUOTED)


@pytest.mark.parametrize("quoted", QUOTED)
def test_the_message_is_in_the_package(quoted: str, known: set[str]) -> None:
    assert any(gives(message, quoted) for message in known), quoted


def test_a_message_that_nobody_gives_is_noticed(known: set[str]) -> None:
    assert not any(gives(message, f"no llama.cpp {GAP} for this GPU in {GAP}") for message in known)
