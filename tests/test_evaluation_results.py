"""What `mone-eval` found survives JSON as it was, and other files are refused in one line."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mone_export.errors import MoneError
from mone_export.evaluation.results import (
    Continuations,
    Evaluation,
    FileResult,
    Measured,
    Pair,
    ProbeResult,
    TaskResult,
    TextResult,
)

FULL = TextResult(
    "prose", "ab" * 32, 512, 4, 1020, Measured(7.25, 0.125), slots={0: {"whole": 1.0}, 3: {"whole": 1.0}}
)
HALF = replace(
    FULL,
    kl_mean=Measured(0.01, 0.0005),
    kl_median=Measured(0.001),
    kl_99=Measured(0.5, 0.25),
    kl_999=Measured(1.5, 0.5),
    same_top=Measured(0.75, 0.0625),
    slots={0: {"whole": 0.5, "96 channels": 0.25, "constant": 0.25}, 3: {"whole": 1.0}},
)
SAID = Continuations(Measured(0.1, 0.01), Measured(0.9, 0.01), Measured(0.5, 0.1), Measured(40, 2), None)
EVALUATION = Evaluation(
    files=(
        FileResult(
            "half.gguf",
            1000,
            "cd" * 32,
            (HALF,),
            ProbeResult(
                32, 64, 96, SAID, SAID, {"greedy": {"repeated": Measured(0.3, 0.02)}}, differing=("repeated",)
            ),
            Measured(100.0, 1.0),
            Measured(20.0, 0.5),
            2**30,
            (TaskResult("tiny", "hellaswag", "ef" * 32, 40, Measured(0.5, 0.08), 0.25, blind=True),),
        ),
    ),
    against=FileResult("full.gguf", 2000, "01" * 32, (FULL,)),
    pairs=(Pair("prose", "half.gguf", "full.gguf", Measured(0.01, 0.001), Measured(0.01, 0.001)),),
    command="mone-eval half.gguf --against full.gguf",
    made_with={"llama-cpp-python": "0.3.36"},
    warnings=("short text",),
)


def test_an_evaluation_survives_its_file(tmp_path: Path) -> None:
    EVALUATION.save(tmp_path / "found.json")
    assert Evaluation.load(tmp_path / "found.json") == EVALUATION
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"mone_evaluation": 2}',
        '{"mone_evaluation": 1}',
        '{"mone_evaluation": 1, "files": 3}',
    ],
)
def test_what_is_no_evaluation_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(MoneError, match="other.json: this is no evaluation") as raised:
        Evaluation.load(tmp_path / "other.json")
    assert "\n" not in str(raised.value)


def test_every_value_is_needed() -> None:
    """A file with anything taken out is another one, not one with gaps filled."""
    value = json.loads(EVALUATION.as_json())
    for name in value.keys() - {"mone_evaluation"}:
        with pytest.raises(MoneError):
            Evaluation.from_json(json.dumps({key: each for key, each in value.items() if key != name}))


def test_results_are_read_without_torch() -> None:
    code = "import sys, mone_export.evaluation.results; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
