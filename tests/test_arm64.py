"""The wheel for 64-bit ARM, cross-compiled and run by qemu-user, against this machine: `make check-arm64`."""

import os
import platform
import re
import shutil
import subprocess
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from programs import PROMPT, complete

from mone_export import runtime
from mone_export.pipeline import export
from mone_export.runtime.builds import TOOLS
from mone_export.source import open_source
from mone_export.source.tokenizing import load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.upstream]

ROOT = Path(__file__).parents[1]
COMPILER = "aarch64-linux-gnu-g++"
QEMU = ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")
# a Raspberry Pi 3, a 5, and all that qemu knows; and what llama.cpp must say of the kernels it chose for each
CPUS = {
    "cortex-a53": "NEON = 1",
    "cortex-a76": "DOTPROD = 1",
    "max": "SVE = 1",
}
KINDS = {"armv8.0_1", "armv8.2_1", "armv8.2_2", "armv8.2_3", "armv8.6_1", "armv8.6_2"}
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


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs and libraries in the wheel of `make wheel-aarch64`."""
    if "CHECK_ARM64" not in os.environ:
        pytest.skip("cross-compiles llama.cpp: make check-arm64")
    for tool, package in ((COMPILER, "g++-aarch64-linux-gnu"), (QEMU[0], "qemu-user")):
        if shutil.which(tool) is None:
            pytest.fail(f"no {tool} here: apt install {package}")
    (wheel,) = (ROOT / "dist" / "aarch64").glob("mone_llama-*_aarch64.whl")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB", end=" ")
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    (found,) = folder.glob("mone_llama/*/cpu/bin")
    for file in found.iterdir():
        file.chmod(0o755)
    return found


@pytest.fixture(scope="module")
def arm_program(programs: Path) -> Path:
    return compiled(
        COMPILER, programs, programs / "greedy"
    )  # beside the libraries, which ggml looks for there


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
    link = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lllama", "-lggml", "-lggml-base"]
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


def test_wheel_holds_programs_for_every_cpu(programs: Path) -> None:
    names = {file.name for file in programs.iterdir()}
    assert {*TOOLS, "libllama.so", "libmtmd.so"} <= names
    assert {name for name in names if "ggml-cpu" in name} == {f"libggml-cpu-{kind}.so" for kind in KINDS}
    for name in TOOLS:
        head = (programs / name).read_bytes()[:20]
        assert head[:4] == b"\x7fELF" and head[18:] == b"\xb7\0"  # EM_AARCH64


def test_program_of_the_wheel_says_what_this_machine_says(programs: Path, novice_file: Path) -> None:
    command = [*QEMU, programs / "llama-completion", "-m", novice_file, "-p", PROMPT, "-n", "8", "-no-cnv"]
    done = subprocess.run([*command, "--temp", "0", "-t", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.partition(PROMPT)[2].rstrip().removesuffix("[end of text]").rstrip()
    assert said and complete(runtime.path("cpu"), novice_file).text.startswith(said)


@pytest.mark.parametrize("cpu", CPUS)
def test_greedy_text_is_that_of_this_machine(
    cpu: str, arm_program: Path, program: Path, novice_file: Path, prompts: Sequence[list[int]]
) -> None:
    lengths = []
    for prompt in prompts:
        found = answer([*QEMU, "-cpu", cpu, arm_program], novice_file, prompt)
        expected = answer([program], novice_file, prompt)
        assert CPUS[cpu] in found.log
        repacked = re.search(r"CPU_REPACK model buffer size = +([\d.]+) MiB", found.log)
        assert (repacked is not None and float(repacked[1]) > 1) == (cpu != "cortex-a53")
        n_same = len(os.path.commonprefix([found.tokens, expected.tokens]))
        n_comparable = len(prompt) + n_same  # the last of these logits chose the first token that differs
        error, size = (
            np.square(values[:n_comparable]).sum()
            for values in (found.logits - expected.logits, expected.logits)
        )
        print(f"{cpu}, {novice_file.stem}: {n_same} tokens, NMSE {error / size:.1e}", end=" ")
        assert error < 1e-3 * size
        if n_same < N_PREDICT:
            second, best = np.sort(expected.logits[n_comparable - 1])[-2:]
            assert best - second < TIE, "another token without a tie"
        lengths.append(n_same)
    assert max(lengths) == N_PREDICT, "no text stayed the same to its end"
