"""The runtime compiled for ARM, run by qemu-user, against this machine: `make check-arm64`."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from mone_export import runtime
from mone_export.pipeline import export
from mone_export.source import open_source
from mone_export.source.tokenizing import load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.upstream]

COMPILER = "aarch64-linux-gnu-g++"
QEMU = ("qemu-aarch64", "-cpu", "max", "-L", "/usr/aarch64-linux-gnu")
CROSS = (
    "-DCMAKE_SYSTEM_NAME=Linux",  # this is what makes CMake compile for another machine
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    "-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc",
    f"-DCMAKE_CXX_COMPILER={COMPILER}",
    "-DGGML_NATIVE=OFF",
    "-DGGML_RPC=OFF",
)
# the variants, and what llama.cpp must say of each: whether its kernels use the instructions
FEATURES = {"armv8.2-a+dotprod": "DOTPROD = 1", "armv8.2-a+dotprod+i8mm": "MATMUL_INT8 = 1"}
PROMPTS = (
    'def read_file(path):\n    """Read a file and return',
    "class Node:\n    def __init__(self, value):\n        self.value = value\n",
    "The function returns a list of",
)
N_PREDICT = 32
TIE = 0.02  # between the likeliest two logits: where they are closer, either machine's token is right


class Answer(NamedTuple):
    """What `greedy` printed: the tokens, the logits [n_token, n_vocab], and llama.cpp's log."""

    tokens: list[int]
    logits: np.ndarray
    log: str


@pytest.fixture(scope="module", params=FEATURES)
def arm_program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "CHECK_ARM64" not in os.environ:
        pytest.skip("compiles llama.cpp twice: make check-arm64")
    for tool, package in ((COMPILER, "g++-aarch64-linux-gnu"), (QEMU[0], "qemu-user")):
        if shutil.which(tool) is None:
            pytest.fail(f"no {tool} here: apt install {package}")
    cmake_args = (*CROSS, f"-DGGML_CPU_ARM_ARCH={request.param}")
    libraries = runtime.build(cmake_args=cmake_args, targets=("llama",)).bin
    return compiled(COMPILER, libraries, tmp_path_factory.mktemp("arm") / request.param)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("c++", runtime.path(), tmp_path_factory.mktemp("here") / platform.machine())


@pytest.fixture(scope="module", params=["q4_0", "q8_0"])
def novice_file(request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    outfile = tmp_path_factory.mktemp("files") / f"{request.param}.gguf"
    export("demo", ratio=0.5, outfile=outfile, outtype=request.param, files=[text], n_row=16, seq_len=256)
    return outfile


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(open_source("demo").folder)
    return [list(tokenizer.encode(prompt)) for prompt in PROMPTS]


def compiled(compiler: str, libraries: Path, program: Path) -> Path:
    """Compile `greedy.cpp` against the libraries of a build."""
    tree = runtime.tree(whole=True)
    include = [f"-I{tree / part / 'include'}" for part in (".", "ggml")]
    link = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lllama", "-lggml", "-lggml-base", "-lggml-cpu"]
    source = Path(__file__).with_name("greedy.cpp")
    command = [compiler, "-std=c++17", "-O2", *include, source, "-o", program, *link]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return program


def answer(command: Sequence[str | Path], model: Path, prompt: Sequence[int]) -> Answer:
    arguments = [*command, model, str(N_PREDICT), *map(str, prompt)]
    result = subprocess.run(arguments, capture_output=True, check=False)
    log = result.stderr.decode()
    assert result.returncode == 0, log[-2000:]
    tokens = np.frombuffer(result.stdout, np.int32, N_PREDICT)
    logits = np.frombuffer(result.stdout, np.float32, offset=tokens.nbytes)
    return Answer(tokens.tolist(), logits.reshape(len(prompt) + N_PREDICT, -1).astype(np.float64), log)


def test_greedy_text_is_that_of_this_machine(
    arm_program: Path, program: Path, novice_file: Path, prompts: Sequence[list[int]]
) -> None:
    lengths = []
    for prompt in prompts:
        found = answer([*QEMU, arm_program], novice_file, prompt)
        expected = answer([program], novice_file, prompt)
        assert FEATURES[arm_program.name] in found.log
        repacked = re.search(r"CPU_REPACK model buffer size = +([\d.]+) MiB", found.log)
        assert repacked and float(repacked[1]) > 1
        n_same = len(os.path.commonprefix([found.tokens, expected.tokens]))
        n_comparable = len(prompt) + n_same  # the last of these logits chose the first token that differs
        error, size = (
            np.square(values[:n_comparable]).sum()
            for values in (found.logits - expected.logits, expected.logits)
        )
        print(f"{arm_program.name}, {novice_file.stem}: {n_same} tokens, NMSE {error / size:.1e}", end=" ")
        assert error < 1e-3 * size
        if n_same < N_PREDICT:
            second, best = np.sort(expected.logits[n_comparable - 1])[-2:]
            assert best - second < TIE, "another token without a tie"
        lengths.append(n_same)
    assert max(lengths) == N_PREDICT, "no text stayed the same to its end"
