"""DERN never needs three times the layer that it works on."""

import subprocess
import sys

import pytest

N_EXPERT, N_SEGMENT, WIDTH = 32, 256, 1024
PROGRAM = f"""
import pathlib, re, torch
from mone_export.pruning.dern import recombine
torch.set_num_threads(1)
status = pathlib.Path("/proc/self/status")
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", status.read_text())[1]) * 1024

def read(e):
    if e % 2:  # half of a pruned expert's segments resemble those of the kept one before it
        segments = torch.randn({N_SEGMENT}, 3, {WIDTH}, generator=torch.Generator().manual_seed(e))
        segments[::2] = read(e - 1)[::2]
    else:
        segments = torch.randn({N_SEGMENT}, 3, {WIDTH}, generator=torch.Generator().manual_seed(e))
    return segments.bfloat16().float()

list(recombine(read, [0], [1], torch.ones(2)))  # what torch itself takes
before = peak()
made = list(recombine(read, range(0, {N_EXPERT}, 2), range(1, {N_EXPERT}, 2), torch.ones({N_EXPERT})))
print((peak() - before) / ({N_EXPERT} * {N_SEGMENT} * 3 * {WIDTH} * 2))
"""


@pytest.mark.slow
def test_peak_stays_below_three_layers_of_the_checkpoint() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    print(f"peak: {float(result.stdout):.2f} layers")
    assert 0 < float(result.stdout) < 3
