"""The page about Python: its examples run as they stand, and do what the command does."""

import inspect
import re
from pathlib import Path

import pytest
from gguf_file import without_command

import mone_export as mone
from mone_export import cli

pytestmark = pytest.mark.upstream

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
EXAMPLES = re.findall(r"## (\d\..*?)\n.*?```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_there_are_seven() -> None:
    assert len(EXAMPLES) == 7


@pytest.mark.slow
@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
@pytest.mark.by_day(2)
def test_examples_run(title: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, title, "exec"), {})
    assert list(tmp_path.glob("*.gguf"))


def test_the_steps_give_what_the_command_gives(small: Path, text: Path, tmp_path: Path) -> None:
    """Every default of constants is the same: the bytes are."""
    options = [
        "--ratio",
        "0.5",
        "--novice",
        "least-squares",
        "-f",
        str(text),
        "--chunks",
        "4",
        "-c",
        "64",
        "-q",
    ]
    assert (
        cli.main([str(small), *options, "--stats", str(tmp_path / "s"), "-o", str(tmp_path / "a.gguf")]) == 0
    )
    calibration = mone.Calibration.load(tmp_path / "s")
    mone.write(
        str(small), calibration, mone.plan(mone.score(calibration), ratio=0.5), str(tmp_path / "b.gguf")
    )
    assert without_command(tmp_path / "a.gguf") == without_command(tmp_path / "b.gguf")
    corpus = mone.read_corpus([text], mone.open_source(small).tokenizer(), n_row=4, seq_len=64)
    measured = mone.calibrate(mone.load(small), corpus)
    assert (
        measured.model_sha256 == calibration.model_sha256 and measured.sensitivity == calibration.sensitivity
    )


def test_names_paths_and_sources_are_alike(small: Path) -> None:
    assert mone.inspect(str(small)) == mone.inspect(small) == mone.open_source(small).spec
    assert mone.load(str(small)).spec == mone.load(small).spec


def test_what_export_takes_can_be_seen() -> None:
    shown = inspect.signature(mone.export).parameters
    assert {"ratio", "outfile", "novice", "allocation"} <= set(shown)
    assert shown["ratio"].default is None


def test_thin_experts_from_python_are_the_commands(small: Path, text: Path, tmp_path: Path) -> None:
    options = ["--ratio", "0.5", "-f", str(text), "--chunks", "4", "-c", "64", "-q"]
    assert cli.main([str(small), *options, "-o", str(tmp_path / "a.gguf")]) == 0
    corpus = mone.read_corpus([text], mone.open_source(small).tokenizer(), n_row=4, seq_len=64)
    model = mone.load(small)
    calibration = mone.calibrate(model, corpus)
    plan, thin = mone.plan_thin(model, corpus, mone.score(calibration), ratio=0.5)
    mone.write(small, calibration, plan, tmp_path / "b.gguf", novices=thin)
    assert without_command(tmp_path / "a.gguf") == without_command(tmp_path / "b.gguf")
