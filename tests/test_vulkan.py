"""The Vulkan backend against the CPU: chosen cases of test-backend-ops, and the demo model's logits."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from programs import complete

from mone_export import runtime
from mone_export.errors import MoneError
from mone_export.pipeline import export

pytestmark = [pytest.mark.slow, pytest.mark.upstream]

# ggml hides software devices unless the variable names them.
ENV = {"GGML_VK_VISIBLE_DEVICES": "0", **os.environ}
# Each type and kind of batch is a shader of its own, which a software device takes seconds to compile.
TYPES = "f32|f16|q8_0|q4_0|q4_K|q6_K|iq4_xs|mxfp4"
CASES = {
    "batches": f"type_a=({TYPES}),n_mats=5,n_ids=8,.*n=(1|2|8|9|32|129),k=256.*skipped=",
    "patterns": "type_a=(f32|q8_0|q4_K),n_mats=(1|11),n_ids=32,n_used=8,.*n=(1|4|17|32),k=256.*skipped=",
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


@pytest.fixture(scope="module")
def bin_folder() -> Path:
    try:
        return runtime.path("vulkan")
    except MoneError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("cases", CASES.values(), ids=CASES)
def test_skipped_rows_are_zero_or_the_bias(bin_folder: Path, cases: str) -> None:
    command = [bin_folder / "test-backend-ops", "test", "-o", "MUL_MAT_ID", "-b", "Vulkan0", "-p", cases]
    result = subprocess.run(command, env=ENV, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:]
    passed = re.search(r"(\d+)/\1 tests passed", result.stdout)
    assert passed and int(passed[1]) > 0 and "not supported" not in result.stdout, result.stdout[-2000:]


@pytest.mark.parametrize("outtype", ["f32", "q8_0", "q4_0"])
def test_logits_are_those_of_the_cpu(bin_folder: Path, outtype: str, text: Path, tmp_path: Path) -> None:
    outfile = tmp_path / "novices.gguf"
    export("demo", ratio=0.5, outfile=outfile, outtype=outtype, files=[text], n_row=8, seq_len=256)
    expected, where = logits(bin_folder, outfile, len(TOKENS), n_gpu_layers=0)
    assert where == {"CPU"}
    for n_batch in (len(TOKENS), 1):
        found, where = logits(bin_folder, outfile, n_batch, n_gpu_layers=99)
        error = float(np.square(found - expected).sum() / np.square(expected).sum())
        print(f"{outtype}, {n_batch} at a time: NMSE {error:.1e}")
        assert where == {"Vulka"}
        assert error < (1e-6 if outtype == "f32" else 1e-3)


@pytest.mark.parametrize(
    ("options", "experts_on"),
    [
        (("--n-cpu-moe", 3), {"Vulka", "CPU"}),
        (("--override-tensor", "exps=CPU"), {"CPU"}),
    ],
    ids=str,
)
def test_experts_can_stay_on_the_cpu(
    bin_folder: Path, options: tuple[object, ...], experts_on: set[str], text: Path, tmp_path: Path
) -> None:
    outfile = tmp_path / "novices.gguf"
    export("demo", ratio=0.5, outfile=outfile, outtype="f32", files=[text], n_row=8, seq_len=256)
    expected = complete(bin_folder, outfile, env={"GGML_VK_VISIBLE_DEVICES": ""})
    found = complete(bin_folder, outfile, "-ngl", 99, *options, env=ENV)
    assert "Vulkan0" in found.log
    assert found.experts_on == experts_on
    assert found.text == expected.text


def logits(bin_folder: Path, model: Path, n_batch: int, *, n_gpu_layers: int) -> tuple[np.ndarray, set[str]]:
    """The logits at all positions, and the start of the name of each backend that ran experts."""
    out = model.with_suffix(".npy")
    env = ENV | {"LLAMA_CPP_LIB_PATH": str(bin_folder), "GGML_SCHED_DEBUG": "2"}
    if n_gpu_layers == 0:
        env["GGML_VK_VISIBLE_DEVICES"] = ""  # else large batches go there nevertheless
    command = [sys.executable, "-c", LOGITS, model, out, str(n_batch), str(n_gpu_layers), *TOKENS]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return np.load(out), set(re.findall(r"\( *(?:MUL_MAT_ID|ADD_ID)\):.*?\[ *(\w+)", result.stderr))
