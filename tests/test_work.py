"""What an export does not do: sizes it does not know, work it does not need, memory it does not keep."""

import gc
import json
import re
import shutil
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command import Command

from mone_export import pipeline
from mone_export.artifacts import Calibration
from mone_export.calibration import loading

pytestmark = pytest.mark.slow  # a whole command each

EVEN_OR_NOT = [
    ("sensitivity", "auto"),
    ("model", "auto"),
    pytest.param("sensitivity", "q4_k_m", marks=pytest.mark.upstream),
    pytest.param("model", "q4_k_m", marks=pytest.mark.upstream),
]


@pytest.fixture
def uneven(command: Command, text: Path, tmp_path: Path) -> Path:
    """Statistics by which the first layer matters so much that it keeps all experts, which all are used."""
    stats = tmp_path / "uneven"
    given = ["-f", text, "--chunks", 32, "-c", 64]
    command("--stats", stats, *given, "-o", tmp_path / "even.gguf", text="").is_fine()
    saved = Calibration.load(stats)
    first, *others = saved.spec.moe_layers
    replace(saved, sensitivity={first: 1e6} | dict.fromkeys(others, 1e-6)).save(stats)
    return stats


def announced(out: str) -> list[int]:
    return [int(size) for size in re.findall(r"\((\d+) bytes\)", out)]


@pytest.mark.parametrize(("allocate", "outtype"), EVEN_OR_NOT)
def test_a_dry_run_with_statistics_knows_the_bytes(
    command: Command, uneven: Path, tmp_path: Path, allocate: str, outtype: str
) -> None:
    options = ["--allocate", allocate, "--outtype", outtype, "--stats", uneven]
    dry = command(*options, "--dry-run", text="", quiet=False)
    dry.is_fine()
    if allocate == "sensitivity":
        assert re.search(r"layer +0  keep 16, prune 0", dry.out), dry.out
    out = tmp_path / "out.gguf"
    command(*options, "-o", out, text="").is_fine()
    assert announced(dry.out) == [out.stat().st_size]


@pytest.mark.parametrize("allocate", ["sensitivity", "model"])
def test_a_dry_run_without_statistics_says_about(command: Command, allocate: str) -> None:
    dry = command("--allocate", allocate, "--dry-run", quiet=False)
    dry.is_fine()
    assert re.search(r"size +about \d", dry.out) and not announced(dry.out)


@pytest.mark.parametrize("share", [0.4, 0.55, 0.7, 0.9])
@pytest.mark.by_day(2)
def test_a_fit_by_sensitivity_stays_within_the_limit(
    command: Command, uneven: Path, tmp_path: Path, share: float
) -> None:
    command("--ratio", 0, "-o", tmp_path / "whole.gguf", "--allocate", "even", text="").is_fine()
    limit = int(share * (tmp_path / "whole.gguf").stat().st_size)
    options = ["--fit", limit, "--allocate", "sensitivity", "--outtype", "auto", "--stats", uneven]
    out = tmp_path / "out.gguf"
    done = command(*options, "-o", out, text="")
    if done.status:
        done.is_one_line(r"fit")
    else:
        assert out.stat().st_size <= limit
        dry = command(*options, "--dry-run", text="", quiet=False)
        assert announced(dry.out) == [out.stat().st_size]


def stages(out: str) -> set[str]:
    events = map(json.loads, out.splitlines())
    return {event["stage"] for event in events if event["event"] == "progress"}


def test_weights_are_hashed_once(command: Command, small: Path, tmp_path: Path) -> None:
    model = shutil.copytree(small, tmp_path / "model")  # nobody has hashed this one
    shown = ["--json", "--stats", tmp_path / "stats", "-o"]
    first = command(*shown, tmp_path / "a.gguf", model=model, quiet=False)
    again = command(*shown, tmp_path / "b.gguf", model=model, quiet=False)
    first.is_fine()
    again.is_fine()
    assert "reading the checkpoint" in stages(first.out) - stages(again.out)
    assert {"calibrating"} <= stages(first.out) and "calibrating" not in stages(again.out)


def test_no_probe_runs_where_nothing_reads_it(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("probed")

    monkeypatch.setattr("mone_export.calibration.sensitivity.damage_by_layer", fail)
    command("-o", tmp_path / "even.gguf", "--allocate", "even").is_fine()
    command("-o", tmp_path / "model.gguf", "--allocate", "model").is_fine()


WAYS: list[Sequence[str]] = [
    (),
    ("--sequential",),
    ("--novice", "joint"),
    ("--allocate", "search"),
    ("--stream", "on"),
    ("--allocate", "sensitivity"),
]


@pytest.mark.parametrize("options", WAYS, ids=lambda options: " ".join(options) or "plain")
@pytest.mark.by_day(3)
def test_no_model_is_in_memory_while_the_file_is_written(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Sequence[str]
) -> None:
    loaded: list[Any] = []
    alive: list[int] = []
    load, write = loading.load, pipeline.write

    def remember(*arguments: Any, **named: Any) -> Any:
        model = load(*arguments, **named)
        loaded.extend(weakref.ref(part) for part in model.module.modules())  # experts may outlive it
        return model

    def look(*arguments: Any, **named: Any) -> Any:
        gc.collect()
        alive.append(sum(each() is not None for each in loaded))
        return write(*arguments, **named)

    monkeypatch.setattr(loading, "load", remember)
    monkeypatch.setattr(pipeline, "write", look)
    command("-o", tmp_path / "out.gguf", *options).is_fine()
    assert loaded and alive == [0]
