"""A GPU backend against the CPU: chosen cases of test-backend-ops, logits, experts placed apart.

Runs on each backend that is there: built with `mone-llama build --backend cuda` or `vulkan` (a software
device will do), or from the wheels, as `make check-vulkan` does.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from programs import complete

from mone_export import runtime
from mone_export.errors import MoneError
from mone_export.pipeline import export

pytestmark = [pytest.mark.slow, pytest.mark.upstream]

# On a software device each type and kind of batch is a shader of its own, which takes seconds to compile.
TYPES = "f32|f16|q8_0|q4_0|q4_K|q6_K|iq4_xs|mxfp4"
CASES = {
    "batches": f"type_a=({TYPES}),n_kept=5,n_mats=8,.*skipped=",
    "patterns": "type_a=(f16|q8_0|q4_K),n_kept=.*,n_mats=32,.*n=(1|4|17),.*skipped=",
}
TOKENS = [str(token) for token in range(300, 364)]
LOGITS = """
import sys, llama_cpp, numpy as np
model, out, n_batch, n_gpu_layers, *tokens = sys.argv[1:]
sizes = {"n_ctx": len(tokens) + 8, "n_batch": int(n_batch), "n_ubatch": int(n_batch)}
llama = llama_cpp.Llama(model, **sizes, n_gpu_layers=int(n_gpu_layers), logits_all=True)
llama.eval([int(token) for token in tokens])
np.save(out, llama.scores[: len(tokens)])
"""


class Gpu(NamedTuple):
    """A built backend, its first device, a software one or not, and the environment with and without it."""

    bin_folder: Path
    device: str
    software: bool
    env: dict[str, str]
    env_without: dict[str, str]


# ggml hides Vulkan's software devices unless the variable names them
BACKENDS = {
    "vulkan": ("Vulkan0", "GGML_VK_VISIBLE_DEVICES", {"GGML_VK_VISIBLE_DEVICES": "0"}),
    "cuda": ("CUDA0", "CUDA_VISIBLE_DEVICES", {}),
}


@pytest.fixture(scope="module", params=BACKENDS)
def gpu(request: pytest.FixtureRequest) -> Gpu:
    device, variable, shown = BACKENDS[request.param]
    env = shown | os.environ
    try:
        bin_folder = runtime.path(request.param)
    except MoneError as error:
        pytest.skip(str(error))
    command = [bin_folder / "llama-bench", "--list-devices"]
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if device not in found.stdout:
        pytest.skip(f"no {device} here: {found.stdout.strip() or found.stderr[-200:]}")
    # else large batches go to the device nevertheless
    return Gpu(bin_folder, device, "llvmpipe" in found.stdout, env, env | {variable: ""})


@pytest.mark.parametrize("cases", CASES.values(), ids=CASES)
def test_skipped_rows_are_zero_or_the_bias(gpu: Gpu, cases: str) -> None:
    command = [gpu.bin_folder / "test-backend-ops", "test", "-o", "MUL_MAT_ID", "-b", gpu.device, "-p", cases]
    for _ in range(6 if gpu.software else 1):  # lavapipe frees some of its own objects twice: docs/gpu.md
        result = subprocess.run(command, env=gpu.env, capture_output=True, text=True, check=False)
        if result.returncode != -signal.SIGABRT:
            break
    assert result.returncode == 0, result.stdout[-2000:]
    passed = re.search(r"(\d+)/\1 tests passed", result.stdout)
    assert passed and int(passed[1]) > 0 and "not supported" not in result.stdout, result.stdout[-2000:]


@pytest.mark.parametrize("outtype", ["f32", "f16", "q8_0", "q4_0", "q4_k_m", "q6_k", "mixed"])
def test_logits_are_those_of_the_cpu(gpu: Gpu, outtype: str, text: Path, tmp_path: Path) -> None:
    """Thin experts in F32 and F16, constants in types that are too wide for them; types by expert."""
    outfile = tmp_path / "novices.gguf"
    how: dict[str, Any] = {"fit": 4_000_000} if outtype == "mixed" else {"ratio": 0.5, "outtype": outtype}
    report = export("demo", outfile=outfile, files=[text], n_row=8, seq_len=256, **how)
    assert report is not None
    fates = {fate for layer in report.fates.values() for fate in layer}
    assert len(fates) > 3 if outtype in ("f32", "f16", "mixed") else fates == {"whole", "constant"}
    expected, where = logits(gpu, outfile, len(TOKENS), n_gpu_layers=0)
    assert where == {"CPU"}
    for n_batch in (len(TOKENS), 1):
        found, where = logits(gpu, outfile, n_batch, n_gpu_layers=99)
        error = float(np.square(found - expected).sum() / np.square(expected).sum())
        print(f"{outtype}, {n_batch} at a time: NMSE {error:.1e}")
        assert where == {gpu.device[:5]}
        assert error < (1e-6 if outtype == "f32" else 1e-3)


@pytest.mark.parametrize(
    ("options", "experts_on"),
    [
        (("--n-cpu-moe", 3), {"GPU", "CPU"}),
        (("--override-tensor", "exps=CPU"), {"CPU"}),
    ],
    ids=lambda given: " ".join(map(str, sorted(given, key=str))),
)
def test_experts_can_stay_on_the_cpu(
    gpu: Gpu, options: tuple[object, ...], experts_on: set[str], text: Path, tmp_path: Path
) -> None:
    if gpu.software:
        # any model's, as an unpruned gpt-oss shows: it looks at buffers that ggml has given back in between
        pytest.skip("Mesa 22.3's software device crashes in llama-server at some lengths of prompt")
    outfile = tmp_path / "novices.gguf"
    export("demo", ratio=0.5, outfile=outfile, outtype="f32", files=[text], n_row=8, seq_len=256)
    expected = complete(gpu.bin_folder, outfile, env=gpu.env_without)
    found = complete(gpu.bin_folder, outfile, "-ngl", 99, *options, env=gpu.env)
    assert gpu.device in found.log
    # a real GPU also takes the large batches of experts that stay on the CPU
    wanted = {gpu.device[:5] if name == "GPU" else name for name in experts_on}
    assert wanted <= found.experts_on <= wanted | {gpu.device[:5]}
    assert found.text == expected.text


def logits(gpu: Gpu, model: Path, n_batch: int, *, n_gpu_layers: int) -> tuple[np.ndarray, set[str]]:
    """The logits at all positions, and the start of the name of each backend that ran experts."""
    out = model.with_suffix(".npy")
    env = gpu.env if n_gpu_layers else gpu.env_without
    env = env | {"LLAMA_CPP_LIB_PATH": str(gpu.bin_folder), "GGML_SCHED_DEBUG": "2"}
    command = [sys.executable, "-c", LOGITS, model, out, str(n_batch), str(n_gpu_layers), *TOKENS]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return np.load(out), set(re.findall(r"\( *(?:MUL_MAT_ID|ADD_ID)\):.*?\[ *(\w+)", result.stderr))
