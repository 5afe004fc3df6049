"""Processes that die: the same command goes on to the same bytes; several share the rows and end together."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from mone_export import files
from mone_export.artifacts import Calibration, ExpertStats
from mone_export.calibration.work_folder import WorkFolder
from mone_export.errors import MoneError
from mone_export.pipeline import export

pytestmark = pytest.mark.slow

N_KILL = [3, pytest.param(20, marks=pytest.mark.nightly)]
# a step after every batch, and slow batches, so that kills hit all there is to hit
SLOW = """
import sys, time
from mone_export.calibration import passes, rows
rows.SECONDS_PER_STEP, passes.TOKENS_PER_BATCH, forward = 0, 64, passes.forward
passes.forward = lambda *args: (time.sleep(0.02), forward(*args))[1]
from mone_export.cli import main
sys.exit(main(sys.argv[1:]))
"""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


def command(small: Path, text: Path, outfile: Path, *more: object) -> list[str]:
    options = ["--ratio", 0.5, "--chunks", 24, "-c", 64, "--dtype", "float32", "-q", *more]
    return [str(part) for part in (small, "-f", text, "-o", outfile, *options)]


@pytest.mark.parametrize("n_kill", N_KILL)
@pytest.mark.parametrize("stream", ["on", "off"])
@pytest.mark.nightly
def test_many_kills_one_result(stream: str, n_kill: int, small: Path, text: Path, tmp_path: Path) -> None:
    def run(name: str, delay: Callable[[], float | None]) -> tuple[bytes, bytes]:
        """Run to the end, through as many deaths as `delay` says; return the statistics and the GGUF."""
        work, outfile = tmp_path / name / "work", tmp_path / name / "novices.gguf"
        work.parent.mkdir()
        options = command(small, text, outfile, "--stream", stream, "--workdir", work)
        while True:
            with subprocess.Popen([sys.executable, "-c", SLOW, *options], env=ENVIRONMENT) as process:
                try:
                    assert process.wait(delay()) == 0
                    break
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    kills.append(name)
        left = {file.name for file in work.rglob("*") if file.is_file() and file.parent.name != "channels"}
        assert left == {"job.json", "lock", "statistics.safetensors"}
        return (work / "statistics.safetensors").read_bytes(), outfile.read_bytes()

    kills: list[str] = []
    start = time.monotonic()
    wanted = run("whole", lambda: None)
    seconds = time.monotonic() - start
    dice = random.Random()

    def delay() -> float | None:
        # mostly while it calibrates, also while it loads and writes
        return dice.uniform(0.3, 0.9) * seconds if len(kills) < n_kill else None

    numbers = itertools.count()
    while len(kills) < n_kill:  # a run that comes through is followed by another from the start
        assert run(f"killed-{next(numbers)}", delay) == wanted
    print(f"\n{len(kills)} kills in {len(set(kills))} runs of {seconds:.1f} s, --stream {stream}")


def test_what_a_killed_process_was_saving_is_removed(tmp_path: Path) -> None:
    job = {"model": "same"}
    WorkFolder(tmp_path, job).save(1, {})
    step = tmp_path / "2.safetensors.ab12cd34.part"  # saving one makes it in a folder of its own
    step.mkdir()
    for unfinished in (step / "2.safetensors", tmp_path / "job.json.part"):
        unfinished.write_bytes(b"half")
    folder = WorkFolder(tmp_path, job)
    assert {path.name for path in tmp_path.iterdir()} == {"1.safetensors", "job.json"}
    assert folder.steps() == [1]


@pytest.mark.parametrize("stream", ["on", "off"])
@pytest.mark.nightly
def test_two_processes_give_the_statistics_of_one(
    stream: str, small: Path, text: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    alone = [sys.executable, "-m", "mone_export"]
    together = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mone_export"]
    for program, stats in ((alone, one), (together, two)):
        options = command(small, text, tmp_path / "x.gguf", "--stats", stats, "--stream", stream)
        subprocess.run([*program, *options], env=ENVIRONMENT, check=True, timeout=300)
    found, wanted = Calibration.load(two), Calibration.load(one)
    for layer, stats_of_layer in wanted.layers.items():
        assert found.layers[layer].n_token == stats_of_layer.n_token
        for field in fields(ExpertStats)[1:]:
            a, b = getattr(found.layers[layer], field.name), getattr(stats_of_layer, field.name)
            # batches are cut elsewhere: float32 matrix products of another height, then float64 sums
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


def test_two_processes_measure_what_saved_statistics_lack(small: Path, text: Path, tmp_path: Path) -> None:
    """A run that was ended has saved statistics without sensitivities: the first process adds them, alone."""
    stats = tmp_path / "stats"
    options = command(small, text, tmp_path / "x.gguf", "--stats", stats, "--novice", "mean")
    subprocess.run([sys.executable, "-m", "mone_export", *options], env=ENVIRONMENT, check=True, timeout=300)
    wanted = Calibration.load(stats)
    assert wanted.sensitivity
    replace(wanted, sensitivity={}).save(stats)
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mone_export"]
    subprocess.run([*two, *options], env=ENVIRONMENT, check=True, timeout=300)
    assert Calibration.load(stats).sensitivity == wanted.sensitivity


def test_a_finished_step_is_on_the_disk_with_what_it_begins_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(files, "flush", lambda path: flushed.append(path.name))
    folder = WorkFolder(tmp_path, {"model": "same"})
    assert flushed == ["job.json.part", tmp_path.name]
    folder.states.mkdir()
    for name in ("0-0.pt", "0-1.pt", "1-0.pt"):
        (folder.states / name).write_bytes(b"state")
    folder.save(1, {})
    assert sorted(flushed[2:4]) == ["0-0.pt", "0-1.pt"] and flushed[4] == "1.safetensors"


def test_a_process_that_dies_ends_all(small: Path, text: Path, tmp_path: Path) -> None:
    """The first rank waits for sums that never come: torchrun ends it."""
    die = "def die():\n    if os.environ['RANK'] == '1':\n        os.kill(os.getpid(), signal.SIGKILL)\n"
    program = tmp_path / "dying.py"
    program.write_text("import os, signal\n" + die + SLOW.replace("time.sleep(0.02)", "die()"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", program]
    options = command(small, text, tmp_path / "x.gguf", "--stats", tmp_path / "stats")
    start = time.monotonic()
    done = subprocess.run(
        [*launch, *options], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, timeout=120, check=False
    )
    print(f"\nended after {time.monotonic() - start:.1f} s")
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    assert not (tmp_path / "x.gguf").exists()
    assert not (tmp_path / "stats").exists()


def test_another_option_in_the_same_workdir_is_refused(small: Path, text: Path, tmp_path: Path) -> None:
    def run(**options: object) -> None:
        export(
            str(small),
            ratio=0.5,
            outfile=tmp_path / "x.gguf",
            files=[text],
            seq_len=64,
            workdir=tmp_path / "work",
            **{"n_row": 4, "dtype": "float32"} | options,  # type: ignore[arg-type]
        )

    run()
    run(outtype="f16")
    with pytest.raises(MoneError, match="begun with --dtype float32, now it is bfloat16"):
        run(dtype="bfloat16")
    with pytest.raises(MoneError, match="begun with text [0-9a-f]{64}, now it is [0-9a-f]{64}"):
        run(n_row=5)
