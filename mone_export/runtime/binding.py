"""Put the Python side of the pinned llama.cpp into the running environment: `llama_cpp` and `gguf`.

Both come from the tree that was built, never from the package index: the converter, its gguf and the library
must be of one commit, and an index's gguf of the same version number lacks things. llama-cpp-python is
installed without compiling llama.cpp; its `lib` folder then points at the patched libraries in the cache.
"""

import filecmp
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mone_export import files
from mone_export.errors import MoneError
from mone_export.runtime.builds import Build
from mone_export.runtime.toolchain import is_library, library, search_path, which
from mone_export.runtime.upstream import Progress, Source, last_line, quiet, source

_BINDING_FILES = ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE.md")


def install_python_binding(build: Build, *, progress: Progress = quiet) -> bool:
    """Install llama_cpp and gguf from `build`'s source for the running Python, with `build`'s libraries.

    Returns False when everything was in place already. Raises MoneError when pip fails.
    """
    state = source(patched=build.patched)
    installed = _is_installed(state)
    if installed and _is_linked(build):
        return False
    try:
        if not installed:
            progress(0, 0, "installing llama_cpp and gguf for Python")
            _install(state)
        _link(build)
    except OSError as error:
        raise MoneError(
            f"cannot write to {error.filename} ({error.strerror}): free some space there, or set TMPDIR"
        ) from None
    return True


def linked_build() -> Path | None:
    """Return the folder of the libraries that `import llama_cpp` loads; None without such a package."""
    folder = _package_folder("llama_cpp")
    if folder is None:
        return None
    if chosen := os.environ.get("LLAMA_CPP_LIB_PATH"):
        return (Path(chosen) / library("llama")).resolve().parent
    file, state = (folder / "lib" / library("llama")).resolve(), source()
    if state.packaged and not (file.exists() and state.folder.name in file.parts):
        return state.packaged / "cpu" / "bin"  # as the wheel's own llama_cpp chooses
    return file.parent


def _is_installed(state: Source) -> bool:
    wanted = {"llama_cpp": state.package / "llama_cpp", "gguf": state.tree / "gguf-py" / "gguf"}
    return all(_same_modules(origin, _package_folder(name)) for name, origin in wanted.items())


def _is_linked(build: Build) -> bool:
    folder = _package_folder("llama_cpp")
    return folder is not None and all(
        _is_same(folder / "lib" / file.name, file) for file in _libraries(build)
    )


def _is_same(link: Path, file: Path) -> bool:
    if not link.exists():
        return False
    return link.samefile(file) or (not link.is_symlink() and filecmp.cmp(link, file))  # or a copy


def _package_folder(name: str) -> Path | None:
    importlib.invalidate_caches()
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def _same_modules(origin: Path, installed: Path | None) -> bool:
    if installed is None:
        return False
    names = [str(file.relative_to(origin)) for file in origin.rglob("*.py")]
    return filecmp.cmpfiles(origin, installed, names, shallow=False)[0] == names


def _libraries(build: Build) -> list[Path]:
    return [file for file in sorted(build.bin.iterdir()) if is_library(file)]


def _install(state: Source) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Copies, since building a wheel writes into the source folder.
        (folder / "llama_cpp_python").mkdir()
        for file in _BINDING_FILES:
            shutil.copy2(state.package / file, folder / "llama_cpp_python")
        shutil.copytree(state.package / "llama_cpp", folder / "llama_cpp_python" / "llama_cpp")
        shutil.copytree(state.tree / "gguf-py", folder / "gguf")
        _pip_install(folder / "llama_cpp_python", folder / "gguf")


def _pip_install(*folders: Path) -> None:
    env = os.environ | {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF", "PATH": search_path()}
    result = subprocess.run(
        [*_pip_command(), *map(str, folders)],
        env=env,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if result.returncode:
        raise MoneError(
            f"pip could not install llama_cpp and gguf ({last_line(result.stderr)}): "
            "use a virtual environment (python3 -m venv), or pass --no-python"
        )


def _pip_command() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install", "--quiet"]
    if uv := which("uv"):
        return [uv, "pip", "install", "--quiet", "--python", sys.executable]
    raise MoneError(f"{sys.executable} has no pip: run `{sys.executable} -m ensurepip`, or pass --no-python")


def _link(build: Build) -> None:
    package = _package_folder("llama_cpp")
    assert package is not None, "pip has just installed it"
    part = package / "lib.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for file in _libraries(build):
        files.link(file, part / file.name)
    shutil.rmtree(package / "lib", ignore_errors=True)
    part.rename(package / "lib")
