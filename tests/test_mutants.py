"""tools/trust/mutants.py kills what tests notice, and says what they do not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
TOOLS = Path(__file__).parents[1] / "tools" / "trust"
MODULE = '''
"""A module to make mutants of."""


def apart(a: int, b: int) -> int:
    """Return how far two numbers are apart."""
    if a > b:
        return a - b
    return b - a


def refuse() -> None:
    """Refuse."""
    raise ValueError("there is nothing to do")
'''
TESTS = {
    "asserts nothing": "apart(1, 3), apart(3, 1)",
    "asserts": "assert (apart(1, 3), apart(3, 1), apart(3, 3)) == (2, 2, 0)",
}
REFUSAL = """
import pytest

def test_refusal() -> None:
    with pytest.raises(ValueError, match="(?i)there is nothing"):
        refuse()
"""


@pytest.mark.parametrize("kind", TESTS)
@pytest.mark.skipif(sys.platform == "win32", reason="mutmut forks")
def test_mutants_are_killed_by_assertions_alone(tmp_path: Path, kind: str) -> None:
    for folder in ("toy", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "toy" / "__init__.py").touch()
    (tmp_path / "toy" / "numbers.py").write_text(MODULE)
    test = f"from toy.numbers import apart, refuse\n\ndef test_apart() -> None:\n    {TESTS[kind]}\n{REFUSAL}"
    (tmp_path / "tests" / "test_numbers.py").write_text(test)
    found = figures(tmp_path)
    assert found["mutants"] == found["tried"] == found["killed"] + found["survived"]
    survivors = [(each["function"], each["change"], each["reason"]) for each in found["survivors"]]
    said = {reason for function, _, reason in survivors if function == "refuse"}
    assert said == {"message text only"}, "some words of it were looked for"
    left = {change for function, change, reason in survivors if reason == "not killed"}
    equal = "if a > b: -> if a >= b:"  # of equal numbers: no test can tell
    if kind == "asserts":
        assert left == {equal} and found["percent"] >= 50
    else:
        assert left == {equal, "return a - b -> return a + b", "return b - a -> return b + a"}


def figures(root: Path) -> dict[str, Any]:
    """Run the tool on a project of its own; all mutants there are."""
    program = (
        "import json, sys, mutants; from pathlib import Path; module = 'toy/numbers.py'; "
        "found = mutants.tried(Path(sys.argv[1]), module, ['tests'], 99, 0); "
        "[each.update(reason=mutants.reason(module, **each)) for each in found['survivors']]; "
        "print(json.dumps(found))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(root)],
        env=os.environ | {"PYTHONPATH": str(TOOLS)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found
