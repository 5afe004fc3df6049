"""Kernels of MUL_MAT_ID of the Metal backend, compiled as C++: no Mac, no Metal compiler.

What the patch changes of the kernels runs here against plain loops, under AddressSanitizer; the same tests
must fail with the kernels as they were. The host's code, the products and Metal itself are not emulated.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mone_export import runtime

pytestmark = [pytest.mark.slow, pytest.mark.upstream]

HERE = Path(__file__).parent / "metal_emulation"
PATCH = "metal-mul_mat_id-with-ids-that-select-no-matrix.patch"
FOLDER = Path("ggml", "src", "ggml-metal")
KERNELS = {"mul_mm": "kernel_mul_mm_id_map0", "mul_mv": "kernel_mul_mv_id", "misc": "kernel_memset"}
FLAGS = ("-std=c++20", "-O1", "-g1", "-w", "-pthread", "-fsanitize=address")


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("patched"))


@pytest.fixture(scope="module")
def unpatched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("unpatched"), "--reverse")


@pytest.mark.parametrize("what", ("map", "vec", "fill"))
def test_kernels_compute_what_they_should(patched: Path, what: str) -> None:
    result = subprocess.run([patched, what], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, f"ok {what}\n"), result.stderr[-2000:]


@pytest.mark.parametrize("what", ("map", "vec"))
def test_unpatched_kernels_reach_beside_their_buffers(unpatched: Path, what: str) -> None:
    result = subprocess.run([unpatched, what], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "AddressSanitizer" in result.stderr, result.stdout + result.stderr[-2000:]


def build(folder: Path, *patch_options: str) -> Path:
    """Cut the kernels out of the .metal files and compile them; with "--reverse", as they were."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    shutil.copytree(runtime.tree(whole=True) / FOLDER, folder / FOLDER)
    if patch_options:
        patch = runtime.patches_dir() / PATCH
        subprocess.run(
            ["patch", "-p1", "-i", patch, "-d", folder, *patch_options], check=True, stdout=subprocess.DEVNULL
        )
    sources = (folder / FOLDER / "kernels" / f"{name}.metal" for name in KERNELS)
    texts = (source.read_text(encoding="utf-8") for source in sources)
    kernels = map(kernel, texts, KERNELS.values())
    (folder / "kernels.inc").write_text("\n".join(kernels), encoding="utf-8")
    program = folder / "mul_mat_id"
    includes = [f"-I{folder}", f"-I{folder / FOLDER}"]
    subprocess.run(["g++", *FLAGS, *includes, HERE / "mul_mat_id.cpp", "-o", program], check=True)
    return program


def kernel(text: str, name: str) -> str:
    """One template of a .metal file, without Metal's attributes."""
    found = re.search(rf"^template<[^\n]*\nkernel void {name}\(.*?^}}$", text, re.MULTILINE | re.DOTALL)
    assert found, name
    return re.sub(r"\[\[.*?\]\]", "", found[0])
