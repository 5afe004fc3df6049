"""Several processes at one calibration: each has its own device, the first decides what concerns all."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mone_export.calibration.ranks import from_first, own_device
from mone_export.errors import MoneError

# what is free differs between the processes: room for float32 in one, not even for bfloat16 in the other
CHOOSE = """
import sys
from pathlib import Path
from mone_export.calibration import loading, ranks
from mone_export.source import open_source
loading.free_memory = lambda device: 10**12 if ranks.rank() == int(sys.argv[2]) else 10**5
source = open_source(sys.argv[1])
with ranks.joined():
    chosen = loading.choose(source, device="cpu", dtype="auto", stream="auto")
alone = loading.choose(source, device="cpu", dtype="auto", stream="auto")
Path(sys.argv[3], str(ranks.rank())).write_text(" ".join(map(str, chosen)))
"""


@pytest.fixture
def three_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Process 1 of 3, of which this machine has two, and as many GPUs."""
    for name, value in (("WORLD_SIZE", "3"), ("RANK", "1"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_each_process_has_a_gpu_of_its_own(three_of_two: None) -> None:
    assert own_device("auto") == own_device("cuda") == "cuda:1"
    assert own_device("cuda:0") == "cuda:0"
    assert own_device("cpu") == "cpu"


def test_one_process_and_one_without_gpus_choose_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_device("auto") == "auto"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device("auto") == "auto"


def test_more_processes_than_gpus_are_refused(three_of_two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(MoneError, match="3 processes for 2 GPUs: torchrun --nproc-per-node 2"):
        own_device("auto")


def test_a_process_that_has_not_joined_others_decides_for_itself(three_of_two: None) -> None:
    assert from_first("own") == "own"


@pytest.mark.slow
def test_a_process_that_waits_for_another_answers_signals(small: Path, tmp_path: Path) -> None:
    """The second of two never comes, since it was killed; torchrun ends the first then by SIGTERM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    command = [sys.executable, "-m", "mone_export", small, "--ratio", "0.5", "-o", tmp_path / "x.gguf"]
    waiting = subprocess.Popen(command, env=os.environ | ranks, stderr=subprocess.PIPE, text=True)
    while waiting.poll() is None:  # until it listens for the other
        with socket.socket() as other:
            if not other.connect_ex(("127.0.0.1", int(port))):
                break
        time.sleep(0.1)
    time.sleep(1)
    waiting.send_signal(signal.SIGTERM)
    _, said = waiting.communicate(timeout=20)
    assert waiting.returncode == 143 and said.endswith("mone-export: terminated; nothing was written\n"), said


@pytest.mark.slow
@pytest.mark.parametrize(("roomy", "wanted"), [(0, "torch.float32 False"), (1, "torch.float32 True")])
@pytest.mark.by_day(1)
def test_all_processes_load_as_the_first_does(roomy: int, wanted: str, small: Path, tmp_path: Path) -> None:
    program = tmp_path / "choose.py"
    program.write_text(CHOOSE)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [*launch, program, small, str(roomy), tmp_path]
    subprocess.run(command, env=environment, timeout=240, check=True)
    assert [(tmp_path / rank).read_text() for rank in ("0", "1")] == [wanted, wanted]
