"""The same model, text, options and versions give the same bytes, wherever and however the process runs."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command import Command
from gguf_file import read

from mone_export.artifacts import Calibration, ExpertStats
from mone_export.errors import MoneError
from mone_export.output.provenance import measured
from mone_export.pipeline import export
from mone_export.pruning.planning import plan
from mone_export.pruning.scoring import score
from mone_export.runtime import Progress
from mone_export.source import GgufFile

pytestmark = pytest.mark.slow

MEASURED = "mone.calibration.measured"
OUTPUTS = ("-o", "model.gguf", "--stats", "stats", "--plan-out", "plan.json", "--report", "page.html")
HERE = {"TZ": "UTC", "LC_ALL": "C", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
ELSEWHERE = {"TZ": "Asia/Kathmandu", "LC_ALL": "tr_TR.UTF-8", "PYTHONHASHSEED": "4711", "COLUMNS": "40"}
RECIPES = {
    "thin": ("--ratio", "0.5"),
    "mean": ("--ratio", "0.5", "--novice", "mean", "--allocate", "sensitivity"),
    "streamed": ("--ratio", "0.5", "--novice", "mean", "--stream", "on"),
}
LATER = ("mean", "streamed")  # by night

Run = Callable[..., Path]


@pytest.fixture
def run(text: Path, tmp_path: Path) -> Run:
    """Export a model in a new folder and process, and return the folder with all that it wrote."""

    def export(name: str, model: Path | str, *options: str, **environment: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "text.txt").write_bytes(text.read_bytes()[:60_000])
        arguments = [str(model), "-f", "text.txt", "--chunks", "8", "-c", "64", *OUTPUTS, *options, "-q"]
        known = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        subprocess.run(
            [sys.executable, "-m", "mone_export", *arguments],
            cwd=folder,
            env=known | environment,
            check=True,
            timeout=600,
        )
        return folder

    return export


def written(folder: Path) -> Mapping[str, str]:
    """The SHA-256 of each file that a run wrote."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    "recipe", ["thin", *(pytest.param(name, marks=pytest.mark.nightly) for name in LATER)]
)
def test_neither_folder_nor_time_zone_language_or_hash_seed_changes_a_byte(
    recipe: str, small: Path, run: Run
) -> None:
    one = written(run("one", small, *RECIPES[recipe], **HERE))
    two = written(run("a longer name, elsewhere", small, *RECIPES[recipe], **HERE | ELSEWHERE))
    assert {"model.gguf", "stats", "plan.json", "page.html", "page.json"} <= one.keys()
    assert one == two


@pytest.mark.nightly
def test_threads_change_no_more_than_rounding_and_a_fingerprint_says_so(run: Run) -> None:
    """Products of other heights are summed in another order: float32 rounding, then sums in float64."""
    one = run("one", "demo", *RECIPES["mean"], **HERE)
    two = run("two", "demo", *RECIPES["mean"], **HERE | {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"})
    files = [read(folder / "model.gguf") for folder in (one, two)]
    same = files[0].keys[MEASURED] == files[1].keys[MEASURED]
    assert same == ((one / "model.gguf").read_bytes() == (two / "model.gguf").read_bytes())
    found, wanted = (Calibration.load(folder / "stats") for folder in (one, two))
    for layer, stats in wanted.layers.items():
        for field in fields(ExpertStats)[1:]:
            a, b = getattr(found.layers[layer], field.name), getattr(stats, field.name)
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
    others = [name for name in files[0].tensors if "_exps" not in name and "ffn_gate_inp" not in name]
    assert others and all(
        (files[0].tensors[name].data == files[1].tensors[name].data).all() for name in others
    )


@pytest.mark.upstream
@pytest.mark.parametrize("recipe", ["thin", pytest.param("mean", marks=pytest.mark.nightly)])
@pytest.mark.nightly
def test_a_gguf_is_the_same_with_any_number_of_threads(recipe: str, demo_gguf: Path, run: Run) -> None:
    """llama.cpp computes each row by itself; the page, which has the command, names the number."""
    one, two = (
        written(run(n, demo_gguf, *RECIPES[recipe], "-t", n, **HERE | {"OMP_NUM_THREADS": n}))
        for n in ("1", "2")
    )
    assert {name for name in one if one[name] != two[name]} <= {"page.html", "page.json"}


@pytest.mark.parametrize("what", ["statistics", "sensitivity", "second pass"])
def test_the_fingerprint_is_of_all_that_decides(what: str, stats: Path) -> None:
    """Each layer's sensitivity changes how many experts it keeps, and so the plan."""
    calibration = Calibration.load(stats)
    first, last = (calibration.spec.moe_layers[i] for i in (0, -1))
    one, two = (
        replace(calibration, sensitivity=dict.fromkeys(calibration.layers, 1.0) | {layer: 1e6})
        for layer in (first, last)
    )
    a, b = (
        plan(score(each, "mone"), ratio=0.5, novice="mean", allocation="sensitivity") for each in (one, two)
    )
    errors = {first: np.zeros(3)}
    usual = measured(one, a, {}, errors)
    assert usual == measured(replace(one, sensitivity={}), a, {}, errors)
    layers = {**one.layers, first: one.layers[last]}
    others = {
        "statistics": measured(replace(one, layers=layers), a, {}, errors),
        "sensitivity": measured(two, b, {}, errors),
        "second pass": measured(one, a, {}, {first: np.ones(3)}),
    }
    assert others[what] != usual


def test_the_hash_is_printed_last_and_is_the_files(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    done = command("-o", out, quiet=False)
    done.is_fine()
    wanted = hashlib.sha256(out.read_bytes()).hexdigest()
    assert f"sha256   {wanted}" in done.out.splitlines()[-2:]
    done = command("-o", out, "--json", quiet=False)
    assert json.loads(done.out.splitlines()[-1])["sha256"] == wanted


@pytest.mark.parametrize("error", [None, OSError("gone"), MoneError("cannot read it")], ids=str)
def test_a_file_that_cannot_be_read_again_is_finished_all_the_same(
    error: Exception | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[str] = []

    def fingerprint(file: GgufFile, *, progress: Progress | None = None) -> str:
        assert progress
        progress(1, 1, "reading")
        if error:
            raise error
        return "a hash"

    monkeypatch.setattr(GgufFile, "fingerprint", fingerprint)
    done = export("demo", ratio=0, outfile=tmp_path / "x.gguf", progress=lambda *now: heard.append(now[2]))
    assert done and done.sha256 == ("" if error else "a hash") and "reading" in heard
    assert error is None or f"its SHA-256 is not known: {error}" in caplog.messages


def test_a_checkpoint_alone_has_no_hash(command: Command, tmp_path: Path) -> None:
    done = command("--hf-out", tmp_path / "folder", quiet=False)
    done.is_fine()
    assert "sha256" not in done.out
