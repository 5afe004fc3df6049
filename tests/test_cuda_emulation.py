"""MUL_MAT_ID of the CUDA backend against the CPU's, its .cu files compiled for the CPU: no GPU, no nvcc.

`cuda_emulation/simt.h` gives what the kernels need of CUDA. The patched sources are translated by a few
substitutions and built with AddressSanitizer; the same tests must fail with the sources as they were before
the patch. What is not emulated: docs/gpu.md.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mone_export import runtime
from mone_export.errors import MoneError

pytestmark = [pytest.mark.slow, pytest.mark.upstream]

HERE = Path(__file__).parent / "cuda_emulation"
PATCH = "cuda-mul_mat_id-with-ids-that-select-no-matrix.patch"
KERNELS = ("mmid.cu", "mmq.cu", "mmvf.cu", "mmvq.cu", "quantize.cu")
CUDA_HEADERS = ("cuda.h", "cuda_bf16.h", "cuda_fp16.h", "cuda_runtime.h", "cublas_v2.h")
# -fpermissive: a few conversions that nvcc lets pass; -w: warnings are for nvcc, see `make check-cuda`
FLAGS = ("-std=c++17", "-O0", "-g1", "-w", "-fpermissive", "-fsanitize=address", "-x", "c++")
PATHS = ("ids", "mmvq", "mmvf", "fused", "mmq", "sorted")
# Where the code before the patch fails; in mm_ids_helper negative ids were counted as rows of lower experts.
FAILS = {
    "ids": "WRONG",
    "mmvq": "heap-buffer-overflow|SEGV",
    "mmvf": "heap-buffer-overflow|SEGV",
    "fused": "x_bias",
    "mmq": "SEGV",
    "sorted": "expert_to_use",
}


@pytest.fixture(scope="module")
def bin_folder() -> Path:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    try:
        return runtime.path("cpu")
    except MoneError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def patched(bin_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("patched"), bin_folder)


@pytest.fixture(scope="module")
def unpatched(bin_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("unpatched"), bin_folder, "--reverse")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.by_day(2)
def test_kernels_agree_with_the_cpu(patched: Path, path: str) -> None:
    result = run(patched, path)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    for skipped in ("none", "some", "all"):
        assert re.search(rf"^ok .*{skipped} skipped", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("path", FAILS)
@pytest.mark.nightly
def test_unpatched_kernels_fail(unpatched: Path, path: str) -> None:
    assert run(unpatched, path, "none").returncode == 0 or path == "fused"  # more biases than matrices
    result = run(unpatched, path, "some")
    assert result.returncode != 0
    assert re.search(FAILS[path], result.stdout + result.stderr), result.stderr[-2000:]


def run(program: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {"ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0"}
    return subprocess.run([program, *args], env=env, capture_output=True, text=True, check=False)


def build(folder: Path, bin_folder: Path, *patch_options: str) -> Path:
    """Translate and compile the CUDA sources; with "--reverse", as they were before the patch."""
    tree = runtime.tree(whole=True)
    sources = folder / "ggml" / "src" / "ggml-cuda"
    shutil.copytree(
        tree / "ggml" / "src" / "ggml-cuda", sources, ignore=shutil.ignore_patterns("template-instances")
    )
    if patch_options:
        patch = runtime.patches_dir() / PATCH
        subprocess.run(
            ["patch", "-p1", "-i", patch, "-d", folder, *patch_options], check=True, stdout=subprocess.DEVNULL
        )
    for file in sources.glob("*.cu*"):
        file.write_text(translate(file.name, file.read_text(encoding="utf-8")), encoding="utf-8")
    for name in CUDA_HEADERS:
        (sources / name).write_text('#include "simt.h"\n', encoding="utf-8")
    includes = [f"-I{path}" for path in (sources, HERE, tree / "ggml" / "include", tree / "ggml" / "src")]
    objects = []
    for source in (HERE / "mul_mat_id.cpp", sources / "ggml-cuda.cu", *(sources / name for name in KERNELS)):
        objects.append(folder / f"{source.stem}.o")
        compile_command = ["g++", *FLAGS, *includes, "-c", source, "-o", objects[-1]]
        subprocess.run(compile_command, check=True)
    program = folder / "mul_mat_id"
    libraries = [f"-L{bin_folder}", "-lggml-cpu", "-lggml-base", f"-Wl,-rpath,{bin_folder}"]
    subprocess.run(["g++", "-fsanitize=address", *objects, *libraries, "-o", program], check=True)
    return program


def translate(name: str, text: str) -> str:
    """A .cu or .cuh file as C++ for simt.h, without what MUL_MAT_ID or the tests never reach."""
    if name == "ggml-cuda.cu":
        text = mul_mat_id_of(text)
    elif name == "mmq.cu":  # the products themselves: see mul_mat_id.cpp
        text = re.sub(r"mul_mat_q_case<[^>]*>\(", "reference_mul_mat_q(", text)
        declaration = "void reference_mul_mat_q(ggml_backend_cuda_context &, const mmq_args &, cudaStream_t);"
        text = text.replace("#include <cstdint>", declaration, 1)
    elif name == "mmvq.cu":
        other_types = (
            r"case GGML_TYPE_(?!(?:Q8_0|Q4_0|Q4_K|Q6_K):)\w+:\s+mul_mat_vec_q_switch_ncols_dst<.*?break;"
        )
        text = re.sub(other_types, "", text, flags=re.DOTALL)
        text = re.sub(r"case [2-8]: \{\s+constexpr int c_ncols_dst.*?\} break;", "", text, flags=re.DOTALL)
    elif name == "mmvf.cu":
        text = re.sub(r"case [2-8]:\s+launch_mul_mat_vec_f_cuda<.*?break;", "", text, flags=re.DOTALL)
    text = re.sub(
        r"extern __shared__ (\w+) (\w+)\[\];", r"\1 * \2 = (\1 *) simt::block.dynamic_shared;", text
    )
    launch = r"(\w+(?:<[^<>()]*>)?)\s*<<<([^;]*?)>>>\s*\("
    return re.sub(launch, r"simt::Launch{\2}.run([=](auto... args) { \1(args...); }, ", text)


def mul_mat_id_of(text: str) -> str:
    """The operation's host code in ggml-cuda.cu, which is too large and needs cuBLAS."""
    first = text.index("static bool ggml_cuda_mul_mat_id_needs_sync(")
    code = text[first : text.index("static bool ggml_cuda_compute_forward(")]
    headers = "".join(f'#include "{name}.cuh"\n' for name in ("getrows", "mmf", "mmq", "mmvf", "mmvq"))
    tensors = ", ".join(["const ggml_tensor *"] * 2 + ["ggml_tensor *"])
    mul_mat = f"void ggml_cuda_mul_mat(ggml_backend_cuda_context &, {tensors});\n"
    return headers + mul_mat + code.replace("static void ggml_cuda_mul_mat_id(", "void ggml_cuda_mul_mat_id(")
