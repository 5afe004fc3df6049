"""The wheels of `make wheel`, where PATH leads to Python alone: no compiler, cmake or git."""

import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from programs import PROMPT, complete
from programs import run as everything_of

from mone_export import runtime
from mone_export.runtime.builds import TOOLS

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.upstream]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make wheel` makes; it compiles only what nobody has compiled before."""
    folder = tmp_path_factory.mktemp("wheels") / "dist"
    run(sys.executable, ROOT / "tools" / "release" / "wheels.py", "--out", folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (file,) = dist.glob("mone_llama-*.whl")
    return file


class Environment:
    """A virtual environment with the two wheels, in which nothing else can be run.

    PyTorch and the rest are those of the Python that runs the tests, so that nothing is downloaded.
    """

    def __init__(self, folder: Path, dist: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        venv.create(folder, symlinks=True)
        site = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
        (Path(site) / "tests.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path))
        self.site = Path(site)
        pip = ("-m", "pip", "--python", self.bin / "python", "install", "--quiet", "--no-deps", "--no-index")
        run(sys.executable, *pip, *sorted(dist.glob("*.whl")))

    def run(self, program: str | Path, *options: object) -> str:
        """Run a program, which must succeed; returns what it printed."""
        env = {"PATH": str(self.bin), "HOME": str(self.folder), "OMP_NUM_THREADS": "1"}
        return run(self.bin / program, *options, env=env, cwd=self.folder)


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("wheels") / "venv", dist)


@pytest.fixture(scope="module")
def novice_file(installed: Environment) -> Path:
    """The demo at half, made in that environment."""
    installed.run("mone-export", "demo", "--ratio", "0.5", "-o", "x.gguf")
    return installed.folder / "x.gguf"


def run(*command: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    done = subprocess.run([str(part) for part in command], env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_wheel_is_small_and_says_what_it_needs(dist: Path, wheel: Path) -> None:
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
    assert wheel.stat().st_size < 60e6
    assert re.fullmatch(r"mone_llama-[\d.]+-py3-none-manylinux_2_\d+_x86_64\.whl", wheel.name)
    names = sorted(file.name.partition("-")[0] for file in dist.iterdir())
    assert names == ["SHA256SUMS", *["mone_export"] * 3, *["mone_llama"] * 2]  # with what each is made of
    for line in (dist / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((dist / name).read_bytes()).hexdigest() == digest


def test_wheel_holds_programs_for_every_cpu_and_no_amx(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    programs = {Path(name).name: data for name, data in files.items() if "/cpu/bin/" in name}
    assert {*TOOLS, "libllama.so", "libmtmd.so", "libggml-rpc.so"} <= programs.keys()
    kinds = {"x64", "sse42", "haswell", "skylakex", "icelake", "zen4", "alderlake"}
    assert {f"libggml-cpu-{kind}.so" for kind in kinds} <= programs.keys()
    assert not [name for name, data in programs.items() if b"AMX is not ready" in data]
    ours = str(runtime.cache_dir()).encode()
    assert not [name for name, data in files.items() if ours in data], "a path of this machine"
    assert not [name for name in files if re.search(r"\.libs/|\.pyc$", name)]
    assert [name for name in files if "/licenses/LICENSE" in name]


def test_nothing_else_is_in_reach(installed: Environment) -> None:
    assert {"mone-export", "mone-llama", "python"} <= {file.name for file in installed.bin.iterdir()}
    code = (
        "import shutil; print([shutil.which(name) for name in ('cc', 'g++', 'cmake', 'git', 'ninja', 'sh')])"
    )
    assert installed.run("python", "-c", code).strip() == str([None] * 6)
    where = "import mone_export, mone_llama, llama_cpp; print(mone_export.__file__, llama_cpp.__file__)"
    for file in installed.run("python", "-c", where).split():
        assert Path(file).is_relative_to(installed.site)


def test_loading_it_prints_nothing(installed: Environment) -> None:
    code = "import os; os.dup2(1, 2); import llama_cpp; print(llama_cpp.llama_max_devices() > 0)"
    assert installed.run("python", "-c", code) == "True\n"


def test_file_is_made_and_run_without_a_compiler(installed: Environment, novice_file: Path) -> None:
    programs = Path(installed.run("mone-llama", "path").strip())
    assert programs.is_relative_to(installed.site)
    said = complete(programs, novice_file).text
    code = (
        "import sys; from llama_cpp import Llama\n"
        "model = Llama(sys.argv[1], n_threads=1, verbose=False)\n"
        "print(model(sys.argv[2], max_tokens=24, temperature=0)['choices'][0]['text'], end='')"
    )
    begun = installed.run("python", "-c", code, novice_file, PROMPT)
    assert begun.strip() and said.startswith(begun)
    assert said == complete(runtime.path("cpu"), novice_file).text


@pytest.mark.nightly  # minutes; tests/test_proofs.py checks those of the native build
def test_devices_can_be_checked(installed: Environment) -> None:
    said = json.loads(installed.run("mone-llama", "check", "--json"))
    (cpu,) = [device for device in said["devices"] if device["device"] == "CPU"]
    assert cpu["verdict"] == "passed" and cpu["passed"] > 200


def perplexity(programs: Path, model: Path, text: Path) -> float:
    """What llama-perplexity prints, which may end without the last lines: they are not waited for."""
    for _ in range(20):
        options = ("-m", model, "-f", text, "-c", 64, "--chunks", 2, "-t", 1)
        if found := re.search(r"\[2\]([\d.]+)", everything_of(programs / "llama-perplexity", *options)):
            return float(found[1])
    raise AssertionError("llama-perplexity gave no result")


@pytest.mark.parametrize("kind", ["x64", "sse42", "haswell", "skylakex", "zen4"])
def test_kernels_of_every_cpu_compute_the_same(
    installed: Environment, novice_file: Path, text: Path, tmp_path: Path, kind: str
) -> None:
    """With this library of CPU kernels alone, as far as the CPU here knows what it needs."""
    needs = {"x64": set(), "sse42": {"sse4_2"}, "haswell": {"avx2", "bmi2", "fma", "f16c"}}
    needs |= {"skylakex": {"avx512f", "avx512bw"}, "zen4": {"avx512_bf16", "avx512_vnni", "avx512vbmi"}}
    flags = re.search(r"^flags\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
    if not flags or not needs[kind] <= set(flags[1].split()):
        pytest.skip(f"this CPU lacks what {kind} needs")
    programs = Path(installed.run("mone-llama", "path").strip())
    for file in programs.iterdir():
        if not file.name.startswith("libggml-cpu-") or file.stem.endswith(f"-{kind}"):
            os.link(file, tmp_path / file.name)
    expected = perplexity(runtime.path("cpu"), novice_file, text)
    assert perplexity(tmp_path, novice_file, text) == pytest.approx(expected, rel=1e-3)


def test_every_program_starts(installed: Environment) -> None:
    programs = Path(installed.run("mone-llama", "path").strip())
    for name in TOOLS:
        assert os.access(programs / name, os.X_OK)
        option = "--version" if name in ("llama-cli", "llama-server", "llama-completion") else "--help"
        if name != "llama-quantize":  # its --help is a usage error
            installed.run(programs / name, option)


def test_gguf_is_observed_and_pruned_without_a_compiler(installed: Environment, demo_gguf: Path) -> None:
    """Through llama_cpp, llama-quantize and llama-imatrix; the converter's templates are there, too."""
    options = ("--ratio", "0.5", "--chunks", 2, "-c", 64, "--outtype", "q4_k_m", "-o", "y.gguf")
    installed.run("mone-export", demo_gguf, *options)
    assert (installed.folder / "y.gguf").stat().st_size < demo_gguf.stat().st_size / 4
    tree = "from mone_export import runtime; print(runtime.tree())"
    folder = Path(installed.run("python", "-c", tree).strip())
    assert folder.is_relative_to(installed.site) and list((folder / "models" / "templates").glob("*.jinja"))
