"""A dry run of a GGUF answers at once: it waits for none of the libraries that run a checkpoint."""

import subprocess
import sys
from pathlib import Path

import pytest

import mone_export

pytestmark = pytest.mark.slow  # a whole command each

HEAVY = ("torch", "transformers", "safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo as a GGUF with all its experts."""
    file = tmp_path_factory.mktemp("whole") / "demo.gguf"
    mone_export.export("demo", ratio=0, outfile=file)
    return file


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--method", "drop"),
        ("--outtype", "q4_k_m"),
        ("--allocate", "even", "--json"),
        ("--chunks", "9999999"),
        ("--method", "drop", "--score", "random"),
    ],
)
@pytest.mark.by_day(3)
def test_dry_run_of_a_gguf_imports_nothing_heavy(whole: Path, options: tuple[str, ...]) -> None:
    code = f"import sys; from mone_export.cli import main; main(); print(*{{*{HEAVY}}} & sys.modules.keys())"
    command = [sys.executable, "-c", code, str(whole), "--ratio", "0.5", "--dry-run", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *said, imported = done.stdout.splitlines()
    assert not imported
    if "--chunks" in options:
        assert "add text or pass --chunks" in done.stderr
    else:
        assert any("keep 16" in line or '"n_kept"' in line for line in said) or "--json" in options
        assert ("built-in" in done.stdout) is ("random" not in options)


def test_dry_run_says_the_same_of_a_gguf_as_of_its_checkpoint(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for model in (str(whole), "demo"):
        assert mone_export.cli.main([model, "--ratio", "0.5", "--dry-run", "--chunks", "4", "-c", "64"]) == 0
        said.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("text")])
    assert said[0] == said[1] == ["text     built-in 256 tokens"]
