"""Build llama.cpp into the cache, and find what was built.

A build works in `<build>/work`. When everything is compiled, its `bin` receives `build.json`, is renamed to
`<build>/bin`, and the object files go. So a build that was interrupted has no `bin`, and continues where it
stopped.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mone_export.errors import MoneError
from mone_export.runtime.toolchain import (
    Backend,
    Toolchain,
    cpu_identity,
    gpu_identity,
    library,
    n_core,
    search_path,
)
from mone_export.runtime.upstream import (
    Progress,
    Source,
    Upstream,
    cache_dir,
    locked,
    patches_dir,
    prepare,
    quiet,
    source,
    wheel_folder,
)

TOOLS = (
    "llama-cli",
    "llama-completion",
    "llama-server",
    "llama-quantize",
    "llama-imatrix",
    "llama-perplexity",
    "llama-bench",
    "llama-gguf-split",
    "ggml-rpc-server",
)
LIBRARIES = ("llama", "mtmd")  # what llama-cpp-python loads, besides ggml
# times as fast as a build for one's own CPU, in the least of the cases of docs/measurements/wheel.json
WHEEL_SPEED = {"prompt": 1.0, "generation": 1.0}

_BACKEND_ARGS: dict[Backend, tuple[str, ...]] = {
    "cpu": (),
    "cuda": ("-DGGML_CUDA=ON",),
    "vulkan": ("-DGGML_VULKAN=ON",),
}
# Programs find the libraries beside them, so that `bin` can be moved. llama-server comes without its web
# pages, which would need npm or a download.
_COMMON_ARGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
    "-DGGML_NATIVE=ON",
    # no kernels for AMX: GCC 12 drops their tile configuration (SIGILL), the loader puts MLA's matrices where
    # nothing can multiply them, and DeepSeek's in Q8_0 and Q4_0 gave other numbers every time
    "-DCMAKE_CXX_FLAGS=-U__AMX_INT8__",
    "-DGGML_RPC=ON",  # a model split over machines; nothing listens unless ggml-rpc-server is started
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_NUMBER=0",
)
_SYSTEM = "-DCMAKE_SYSTEM_NAME="
_TAIL = 30  # lines of the log kept for the error
_STEP = re.compile(r"\[\s*(\d+)(?:/(\d+)|%)\]")  # ninja: [3/200] ..., make: [  1%] ...
_TOUCHED_TEST = re.compile(r"^\+\+\+ b/tests/(test-[\w-]+)\.cpp$", re.MULTILINE)


class BuildError(MoneError):
    """CMake or the compiler failed; `tail` holds the last lines of the log."""

    def __init__(self, message: str, tail: Sequence[str]) -> None:
        """Keep the message for one line, and the log's last lines for those who want to see more."""
        super().__init__(message)
        self.tail = tuple(tail)


@dataclass(frozen=True, slots=True)
class Build:
    """A finished build. `cpu` is a CPU that it is bound to (a digest), "any", or another system's name."""

    folder: Path
    backend: Backend
    patched: bool
    version: str
    targets: tuple[str, ...]
    cmake_args: tuple[str, ...]
    cpu: str

    @property
    def bin(self) -> Path:
        """The folder of programs and shared libraries."""
        return self.folder / "bin"

    def runs_on(self, backend: Backend) -> bool:
        """Whether it was made for a backend, or has its library, as where the wheel of a GPU was added."""
        added = backend != "cpu" and (self.bin / library(f"ggml-{backend}")).is_file()
        return added or backend == self.backend

    @staticmethod
    def load(folder: Path) -> "Build | None":
        """The finished build in `folder`, or None."""
        stamp = folder / "bin" / "build.json"
        if not stamp.is_file():
            return None
        values = json.loads(stamp.read_text(encoding="utf-8"))
        lists = {key: tuple(values[key]) for key in ("targets", "cmake_args")}
        return Build(**values | lists | {"folder": folder})

    def save(self, folder: Path) -> None:
        """Write `build.json` into `folder`."""
        values = {key: value for key, value in asdict(self).items() if key != "folder"}
        part = folder / "build.json.part"
        part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        part.replace(folder / "build.json")


@dataclass(frozen=True, slots=True)
class RuntimeInfo:
    """What is pinned, what is in the cache, and the builds of the current source."""

    upstream: Upstream
    patches_dir: Path
    patches: tuple[str, ...]
    cache: Path
    tree: Path | None
    builds: tuple[Build, ...]


def build(
    backend: Backend = "cpu",
    cmake_args: Sequence[str] = (),
    *,
    patched: bool = True,
    targets: Sequence[str] | None = None,
    jobs: int | None = None,
    progress: Progress = quiet,
) -> Build:
    """Build llama.cpp for a backend, unless the same build is there; fetches and patches as needed.

    `cmake_args` are further `-D...` options; `targets` defaults to `default_targets`. Raises MoneError for
    a missing tool, BuildError if CMake or a compiler fails.
    """
    toolchain = Toolchain.find(backend)
    state = source(patched=patched)
    targets = tuple(targets or default_targets(state))
    wanted = _plan(state, backend, targets, tuple(cmake_args), toolchain)
    if found := Build.load(wanted.folder):
        return found
    with locked(state.folder, progress) as lock:
        if Build.load(wanted.folder) is None:
            prepare(state, progress)
            folder = wanted.folder
            shop = _Workshop(folder / "work", folder / "build.log", _environment(state), lock, progress)
            _run_build(wanted, state, toolchain, jobs or n_core(), shop)
    return wanted


def path(backend: Backend | None = None, *, patched: bool = True) -> Path:
    """The `bin` folder of the newest build with the tools for this CPU (and `backend`); builds nothing."""
    state = source(patched=patched)
    usable = (item for item in finished(state) if "llama-cli" in item.targets)
    fitting = [item for item in usable if backend is None or item.runs_on(backend)]
    if not fitting:
        options = (f" --backend {backend}" if backend else "") + ("" if patched else " --stock")
        wheel = wheel_folder() if patched and not state.packaged else None
        of_others = f", and {wheel} is of other patches" if wheel else ""
        raise MoneError(
            f"no llama.cpp {state.folder.name} for this CPU in {cache_dir()}{of_others}: "
            f"run `mone-llama build{options}`"
        )
    return fitting[0].bin


def finished(state: Source) -> tuple[Build, ...]:
    """The finished builds of a source that run on this CPU, newest first, that of a wheel last."""
    stamps = list(state.folder.glob("*/bin/build.json"))
    stamps.sort(key=lambda file: file.stat().st_mtime, reverse=True)
    if wheel := state.packaged:
        stamps += wheel.glob("*/bin/build.json")
    found = (Build.load(stamp.parents[1]) for stamp in stamps)
    return tuple(item for item in found if item and item.cpu in ("any", cpu_identity(item.cmake_args)))


def info() -> RuntimeInfo:
    """Say what is pinned and what is built; fetches and builds nothing."""
    patched, stock = source(), source(patched=False)
    return RuntimeInfo(
        upstream=patched.upstream,
        patches_dir=patches_dir(),
        patches=tuple(patch.stem for patch in patched.patches),
        cache=cache_dir(),
        tree=patched.unpacked,
        builds=finished(patched) + finished(stock),
    )


def default_targets(state: Source) -> tuple[str, ...]:
    """Tools and libraries; if patched, also test-backend-ops and the C++ tests that the patches touch."""
    return TOOLS + LIBRARIES + (touched_tests(state) if state.patched else ())


def touched_tests(state: Source) -> tuple[str, ...]:
    """The C++ tests that say whether the patches work."""
    texts = (patch.read_text(encoding="utf-8") for patch in state.patches)
    return tuple(sorted({"test-backend-ops"}.union(*(_TOUCHED_TEST.findall(text) for text in texts))))


def _plan(
    state: Source, backend: Backend, targets: tuple[str, ...], args: tuple[str, ...], tools: Toolchain
) -> Build:
    systems = [arg for arg in args if arg.startswith(_SYSTEM)]  # another one than this: nothing runs here
    cpu = f"of {systems[-1].removeprefix(_SYSTEM)}" if systems else cpu_identity(args)
    gpu = gpu_identity(args) if backend == "cuda" else ""
    compilers = [tools.identity(), "ninja" if tools.ninja else "make"]
    options = [backend, _COMMON_ARGS, _BACKEND_ARGS[backend], args, targets, compilers, cpu, gpu]
    key = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:8]
    folder = state.folder / f"{backend}-{key}"
    return Build(folder, backend, state.patched, state.upstream.version, targets, args, cpu)


@dataclass(frozen=True, slots=True)
class _Workshop:
    """Where the commands of a build run, and who hears of it."""

    work: Path
    log: Path
    env: dict[str, str]
    lock: int  # inherited by the commands, so that the folder stays locked while one of them lives
    progress: Progress

    def run(self, command: list[str]) -> None:
        """Run a command, its output going to the log, its steps to `progress`; a BuildError if it fails."""
        tail: deque[str] = deque(maxlen=_TAIL)
        with (
            self.log.open("a", encoding="utf-8") as log,
            subprocess.Popen(
                command,
                cwd=self.work,
                env=self.env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                pass_fds=() if sys.platform == "win32" else (self.lock,),
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                tail.append(line.rstrip())
                if step := _STEP.match(line):
                    self.progress(int(step[1]), int(step[2] or 100), "compiling llama.cpp")
        if process.returncode:
            stage = "compiling" if "--build" in command else "configuring"
            raise BuildError(f"{stage} llama.cpp failed: the whole output is in {self.log}", tail)


def _run_build(wanted: Build, state: Source, tools: Toolchain, jobs: int, shop: _Workshop) -> None:
    shop.work.mkdir(parents=True, exist_ok=True)
    shop.log.unlink(missing_ok=True)
    shop.progress(0, 0, "configuring llama.cpp")
    shop.run(_configure_command(wanted, state, tools))
    shop.run([tools.cmake, "--build", ".", "--parallel", str(jobs), "--target", *wanted.targets])
    wanted.save(shop.work / "bin")
    shutil.rmtree(wanted.bin, ignore_errors=True)
    (shop.work / "bin").rename(wanted.bin)
    shutil.rmtree(shop.work)


def _configure_command(wanted: Build, state: Source, tools: Toolchain) -> list[str]:
    command = [tools.cmake, "-S", str(state.tree), "-B", "."]
    if tools.ninja:
        command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools.ninja}"]
    if tools.nvcc:
        command.append(f"-DCMAKE_CUDA_COMPILER={tools.nvcc}")
    if sys.platform == "darwin":  # CMake has no sign there for "beside the program"
        command.append("-DCMAKE_BUILD_RPATH=@loader_path")
    tests = any(target.startswith("test-") for target in wanted.targets)
    commit = state.upstream.llama_cpp_commit + ("-mone" if state.patched else "")
    command += [
        *_COMMON_ARGS,
        f"-DLLAMA_BUILD_TESTS={'ON' if tests else 'OFF'}",
        f"-DLLAMA_BUILD_COMMIT={commit}",
    ]
    return command + [*_BACKEND_ARGS[wanted.backend], *wanted.cmake_args]


def _environment(state: Source) -> dict[str, str]:
    # Paths relative to the source state let ccache answer for the next state too.
    ccache = {"CCACHE_BASEDIR": str(state.folder), "CCACHE_NOHASHDIR": "1"}
    return os.environ | ccache | {"PATH": search_path(), "NINJA_STATUS": "[%f/%t] "}
