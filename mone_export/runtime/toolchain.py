"""What building llama.cpp needs from this machine: find it, or name the package that brings it."""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from mone_export.errors import MoneError

Backend = Literal["cpu", "cuda", "vulkan"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

_COMPILERS = {"CC": ("cc", "gcc", "clang"), "CXX": ("c++", "g++", "clang++")}
_NVCC = Path("/usr/local/cuda/bin/nvcc")
_HEADERS = {  # file below an include folder -> the Debian package that brings it
    "vulkan/vulkan.hpp": "libvulkan-dev",
    "spirv/unified1/spirv.hpp": "spirv-headers",
}


@dataclass(frozen=True, slots=True)
class Toolchain:
    """The programs a build runs, all of them found."""

    cmake: str
    ninja: str | None
    cxx: str
    nvcc: str | None

    @staticmethod
    def find(backend: Backend) -> "Toolchain":
        """Look for all that `backend` needs; one MoneError names what is missing and the packages."""
        cmake, ninja, make = which("cmake"), which("ninja"), which("make")
        cc, cxx = _compiler("CC"), _compiler("CXX")
        nvcc = which("nvcc") or (str(_NVCC) if _NVCC.is_file() else None)
        missing = {
            "cmake": cmake is None and "cmake",
            "a C compiler": cc is None and "gcc",
            "a C++ compiler": cxx is None and "g++",
            "ninja or make": ninja is None and make is None and "ninja-build",
            "nvcc": backend == "cuda" and nvcc is None and "nvidia-cuda-toolkit",
        }
        wanted = {tool: package for tool, package in missing.items() if package}
        wanted |= _missing_for_vulkan() if backend == "vulkan" else {}
        if wanted or cmake is None or cxx is None:
            raise MoneError(_install_message(backend, wanted))
        return Toolchain(cmake, ninja, cxx, nvcc if backend == "cuda" else None)

    def identity(self) -> str:
        """The compilers' version lines: part of a build's key."""
        lines = [_first_line([self.cxx, "--version"])]
        if self.nvcc:
            lines.append(_output([self.nvcc, "--version"]).strip().splitlines()[-1])
        return "; ".join(lines)


def which(tool: str) -> str | None:
    """Find a program on PATH, or beside the running Python, where pip puts it (`pip install cmake ninja`)."""
    return shutil.which(tool, path=search_path())


def search_path() -> str:
    """PATH, followed by the script folders of the running Python."""
    return os.pathsep.join(
        [os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
    )


def cpu_identity(cmake_args: Iterable[str]) -> str:
    """What compiled code is bound to: a digest of the CPU's model and features, or "any" if not native."""
    if "-DGGML_NATIVE=OFF" in cmake_args:
        return "any"
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return f"{platform.machine()} {platform.processor()}"
    kinds = ("model name", "flags", "Features", "CPU part")
    lines = {line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith(kinds)}
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:12]


def gpu_identity(cmake_args: Iterable[str]) -> str:
    """The NVIDIA GPUs a CUDA build is compiled for, as the driver names them; "" if the options name others.

    Raises MoneError when there is no GPU to ask and no option says which to compile for.
    """
    if any(option.startswith("-DCMAKE_CUDA_ARCHITECTURES=") for option in cmake_args):
        return ""
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    names = {line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")}
    smi = which("nvidia-smi")
    if not names and smi:  # as under WSL
        names = set(_output([smi, "--query-gpu=name", "--format=csv,noheader"]).splitlines())
    if not names:
        remedy = "name the GPU to build for, such as -DCMAKE_CUDA_ARCHITECTURES=89 for compute capability 8.9"
        raise MoneError(f"this machine shows no NVIDIA GPU: {remedy}")
    return ", ".join(sorted(names))


def library(name: str) -> str:
    """Return the file name that a shared library has on this platform, such as `libllama.so` for `llama`."""
    endings = {"win32": f"{name}.dll", "darwin": f"lib{name}.dylib"}
    return endings.get(sys.platform, f"lib{name}.so")


def is_library(file: Path) -> bool:
    """Say whether a file is a shared library of some platform, such as `libllama.so.0`."""
    return ".so" in file.suffixes or file.suffix in (".dylib", ".dll")


def program(folder: Path, name: str) -> Path:
    """Return where a program of a build lies: on Windows its name ends in `.exe`."""
    return folder / (f"{name}.exe" if sys.platform == "win32" else name)


def n_core() -> int:
    """The CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _compiler(variable: str) -> str | None:
    # CMake reads the same variables, and lets them hold arguments after the program.
    if chosen := os.environ.get(variable, "").split():
        return which(chosen[0])
    return next((found for name in _COMPILERS[variable] if (found := which(name))), None)


def _missing_for_vulkan() -> dict[str, str]:
    roots = [Path(root) / "include" for root in (os.environ.get("VULKAN_SDK"), "/usr", "/usr/local") if root]
    missing = {} if which("glslc") else {"glslc": "glslc"}
    for header, package in _HEADERS.items():
        if not any((root / header).is_file() for root in roots):
            missing[header] = package
    return missing


def _install_message(backend: Backend, wanted: dict[str, str]) -> str:
    packages = " ".join(wanted.values())
    return (
        f"building llama.cpp for {backend} needs {', '.join(wanted)}, not found here: apt install {packages}"
    )


def _first_line(command: list[str]) -> str:
    return _output(command).split("\n", 1)[0].strip()


def _output(command: list[str]) -> str:
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", check=False
    ).stdout
