"""Saved statistics: of which config, precision and version; what differs is named, cosmetics are not."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command import Command

from mone_export import cli_stats
from mone_export.artifacts import Calibration

pytestmark = pytest.mark.slow  # a whole command each

Edited = Callable[..., Path]


@pytest.fixture
def edited(small: Path, tmp_path: Path) -> Edited:
    """The model with other values in config.json."""

    def edit(**values: Any) -> Path:
        folder = shutil.copytree(small, tmp_path / "edited", dirs_exist_ok=True)
        config = json.loads((small / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))
        return folder

    return edit


COMPUTING = {
    "rope_parameters": {"rope_theta": 2000000.0, "rope_type": "default"},
    "rms_norm_eps": 1e-6,
    "routed_scaling_factor": 2.5,
    "sliding_window": 64,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize("key", COMPUTING)
def test_a_config_that_computes_otherwise_is_refused_by_key(
    command: Command, edited: Edited, stats: Path, tmp_path: Path, key: str
) -> None:
    model = edited(**{key: COMPUTING[key]})
    for text in (None, ""):
        done = command("-o", tmp_path / "out.gguf", "--stats", stats, model=model, text=text)
        done.is_one_line(f"made with another config.json, different in {key}")
    assert not (tmp_path / "out.gguf").exists()


def test_a_dry_run_refuses_it_too(command: Command, edited: Edited, stats: Path) -> None:
    command("--dry-run", "--stats", stats, model=edited(rms_norm_eps=1e-6), text="").is_one_line(
        "rms_norm_eps"
    )


@pytest.mark.parametrize(
    "values",
    [
        {"use_cache": False},
        {"transformers_version": "4.0.0"},
        {"initializer_range": 1.0},
        {"_name_or_path": "x"},
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_cosmetic_edit_is_accepted(
    command: Command, edited: Edited, stats: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    done = command("-o", tmp_path / "out.gguf", "--stats", stats, model=edited(**values), quiet=False)
    done.is_fine()
    assert "computed otherwise" not in done.err


def test_another_precision_is_refused_with_both(command: Command, stats: Path, tmp_path: Path) -> None:
    done = command("-o", tmp_path / "out.gguf", "--stats", stats, "--dtype", "bfloat16")
    done.is_one_line("was made in float32, --dtype asks for bfloat16")
    command("-o", tmp_path / "out.gguf", "--stats", stats, "--dtype", "float32").is_fine()


@pytest.mark.parametrize("program", ["mone-export", "torch"])
def test_another_version_is_said(command: Command, stats: Path, tmp_path: Path, program: str) -> None:
    saved = Calibration.load(stats)
    replace(saved, made_with={**saved.made_with, program: "0.0.1"}).save(stats)
    done = command("-o", tmp_path / "out.gguf", "--stats", stats, quiet=False)
    done.is_fine()
    assert f"was made by {program} 0.0.1, which may have computed otherwise" in done.err


def test_statistics_of_two_configs_are_not_merged(
    command: Command,
    edited: Edited,
    stats: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other, text_of_other = tmp_path / "other", tmp_path / "other.txt"
    text_of_other.write_text(text.read_text()[5000:])
    done = command(
        "-o", tmp_path / "x.gguf", "--stats", other, model=edited(rms_norm_eps=1e-6), text=text_of_other
    )
    done.is_fine()
    assert cli_stats.main(["merge", str(stats), str(other), "-o", str(tmp_path / "both")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "rms_norm_eps" in line and "unexpected" not in line
    assert not (tmp_path / "both").exists()


def test_a_work_folder_is_of_one_config(command: Command, edited: Edited, tmp_path: Path) -> None:
    work = tmp_path / "work"
    command("-o", tmp_path / "x.gguf", "--workdir", work).is_fine()
    command("-o", tmp_path / "x.gguf", "--workdir", work, model=edited(use_cache=False)).is_fine()
    model = edited(rms_norm_eps=1e-6)
    command("-o", tmp_path / "x.gguf", "--workdir", work, model=model).is_one_line("(config|rms_norm_eps)")
    (work / "statistics.safetensors").unlink()
    command("-o", tmp_path / "x.gguf", "--workdir", work, model=model).is_one_line("begun with config")


def test_show_says_what_statistics_were_made_with(stats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_stats.main(["show", str(stats)]) == 0
    (made,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("made ")]
    for name in ("dtype float32", "device cpu", "mone-export ", "torch ", "transformers "):
        assert name in made, made
