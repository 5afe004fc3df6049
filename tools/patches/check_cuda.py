#!/usr/bin/env python3
"""Compile what the patches change of the CUDA backend for each architecture, without a warning; needs no GPU.

    python tools/patches/check_cuda.py [--arch ARCH ...] [FILE.cu ...]    default: all that the patches reach

Then compare the kernels' registers and shared memory with stock llama.cpp's: unflagged nodes must not get
kernels with more, so that as many of their blocks run at a time.
Needs nvcc, 12.8 or newer. The headers of cuBLAS come with the CUDA toolkit, else from PyPI's nvidia-cublas (a
large download, made once; only the headers are kept, in the cache).
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mone_export import runtime  # noqa: E402  (the checkout's own package, installed or not)
from mone_export.errors import MoneError  # noqa: E402
from mone_export.runtime.toolchain import Toolchain, n_core  # noqa: E402

ARCHITECTURES = (
    "75",
    "80",
    "86",
    "89",
    "90",
    "120a",
)  # 120a: with the FP4 instructions, as upstream builds it
REGISTERS_OF = ("86", "89", "90", "120a")
FOLDER = Path("ggml/src/ggml-cuda")
COMMON = "common.cuh"  # every file includes it; what the patches add there is used by files that they change
CUBLAS = "nvidia-cublas==13.*"
# What upstream's CMake files give nvcc and, through it, gcc.
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-DGGML_CUDA_USE_GRAPHS", "-use_fast_math", "-extended-lambda")
HOST_FLAGS = (
    "-Wmissing-declarations -Wmissing-noreturn -Wall -Wextra -Wpedantic -Wcast-qual -Wno-unused-function "
    "-Wno-array-bounds -Wextra-semi -Wno-pedantic"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile each file for all architectures at once, compare registers; 1 if there is something to mend."""
    args = _arguments(argv)
    try:
        nvcc = Toolchain.find("cuda").nvcc or ""
        headers = cublas_headers(nvcc)
        tree = runtime.tree(whole=True)
        files = [tree / FOLDER / name for name in args.files] or changed_files(tree)
        failed = compile_all(nvcc, headers, tree, files, args.arch or ARCHITECTURES)
        return compare_all(nvcc, headers, files, args.arch or REGISTERS_OF) or failed
    except MoneError as error:
        print(f"check_cuda.py: {error}", file=sys.stderr)
        return 1


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", action="append", help="compute capability such as 89, may be repeated")
    parser.add_argument("files", nargs="*", metavar="FILE.cu")
    return parser.parse_args(argv)


def compile_all(
    nvcc: str, headers: Path, tree: Path, files: Sequence[Path], architectures: Sequence[str]
) -> int:
    """Compile the files one after the other; 0 without a warning."""
    print(f"{release(nvcc)}; compute capabilities {', '.join(architectures)}")
    n_warning, begin = 0, time.monotonic()
    for number, file in enumerate(files, 1):
        print(f"[{number}/{len(files)}] {file.name}", end=" ", flush=True)
        started = time.monotonic()
        failed, messages = compile_one(nvcc, headers, tree, file, architectures)
        print(f"{time.monotonic() - started:.0f} s, {len(messages)} warnings")
        print("".join(f"    {message}\n" for message in messages), end="")
        if failed:
            print(failed, file=sys.stderr)
            return 1
        n_warning += len(messages)
    print(f"{len(files)} files in {time.monotonic() - begin:.0f} s, {n_warning} warnings")
    return 1 if n_warning else 0


def compare_all(nvcc: str, headers: Path, files: Sequence[Path], architectures: Sequence[str]) -> int:
    """Print how the kernels' registers and shared memory differ from stock's; 1 if unflagged nodes get more.

    With as many of both, and launched alike, as many blocks of a kernel fit on a multiprocessor.
    """
    trees = [runtime.tree(patched=False), runtime.tree(whole=True)]
    names = [
        file.name for file in files if "__global__" in (trees[0] / FOLDER / file.name).read_text("utf-8")
    ]
    status = 0
    for name, arch in ((name, arch) for name in names for arch in architectures):
        compiled = [used(nvcc, headers, tree / FOLDER / name, arch) for tree in trees]
        plain, flagged = pairs(*compiled)
        worse = {kernel: uses for kernel, uses in plain.items() if _above(*uses)}
        differ = sum(theirs != ours for theirs, ours in plain.values())
        more = sum(_above(*uses) for uses in flagged.values())
        found = f"{len(plain)} kernels of unflagged nodes, {differ} differ from stock, {len(worse)} above"
        print(f"registers and shared memory, {name} sm_{arch}: {found}", end="")
        print(f"; {len(flagged)} of flagged ones, {more} above" if flagged else "", flush=True)
        print("".join(f"    {kernel}: {a} -> {b}\n" for kernel, (a, b) in worse.items()), end="")
        status = status or int(bool(worse))
    return status


class Use(NamedTuple):
    """What a kernel takes of a multiprocessor: registers of a thread, bytes of shared memory of a block."""

    registers: int
    shared: int


def _above(theirs: Use, ours: Use) -> bool:
    return ours.registers > theirs.registers or ours.shared > theirs.shared


def pairs(
    stock: Mapping[str, Use], patched: Mapping[str, Use]
) -> tuple[dict[str, tuple[Use, Use]], dict[str, tuple[Use, Use]]]:
    """Each kernel's use before and after, for unflagged and for flagged nodes (last template argument)."""
    found: tuple[dict[str, tuple[Use, Use]], ...] = ({}, {})
    for kernel, count in stock.items():
        plain = kernel if kernel in patched else f"{kernel}, false"
        if plain not in patched:
            raise MoneError(f"the patched file has no kernel {kernel}")
        found[0][kernel] = count, patched[plain]
        if plain != kernel and f"{kernel}, true" in patched:
            found[1][kernel] = count, patched[f"{kernel}, true"]
    return found[0], found[1]


def used(nvcc: str, headers: Path, file: Path, arch: str) -> dict[str, Use]:
    """What each kernel of a file uses, by its name without parameters."""
    tree = file.parents[len(FOLDER.parts)]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *FLAGS, f"-arch=sm_{arch}", *_includes_of(nvcc, headers, tree), "-Xptxas", "-v"]
        command += ["-cubin", str(file), "-o", f"{folder}/kernels.cubin"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise MoneError(f"nvcc failed: {result.stdout + result.stderr}")
    return uses_in(result.stdout + result.stderr)


def uses_in(output: str) -> dict[str, Use]:
    """What each kernel uses, from what `-Xptxas -v` prints."""
    kernel = r"Compiling entry function '(\S+)'.*?Used (\d+) registers(?:[^\n]*?, (\d+) bytes smem)?"
    found = re.findall(kernel, output, re.DOTALL)
    names = "\n".join(name for name, *_ in found)
    plain = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout
    kernels = (re.split(r">\(|(?<=\w)\(", name)[0] for name in plain.splitlines())
    uses = (Use(int(count), int(shared or 0)) for _, count, shared in found)
    return dict(zip(kernels, uses, strict=True))


def changed_files(tree: Path) -> list[Path]:
    """The .cu files that the patches change, and those that include a changed header, however indirectly."""
    patches = (patch.read_text(encoding="utf-8") for patch in runtime.patches_dir().glob("*.patch"))
    names = {
        name for text in patches for name in re.findall(rf"^\+\+\+ b/{FOLDER}/(\S+)", text, re.MULTILINE)
    }
    texts = {file: file.read_text(encoding="utf-8") for file in sorted((tree / FOLDER).rglob("*.cu*"))}
    changed = {file for file in texts if str(file.relative_to(tree / FOLDER)) in names - {COMMON}}
    while more := {file for file, text in texts.items() if _includes(text, changed)} - changed:
        changed |= more
    return sorted(file for file in changed if file.suffix == ".cu")


def cublas_headers(nvcc: str) -> Path:
    """The folder of cublas_v2.h: the toolkit's own, else the one in the cache, downloaded if need be."""
    own = toolkit_headers(nvcc)
    if (own / "cublas_v2.h").is_file():
        return own
    kept = runtime.cache_dir() / "cublas-headers"
    if not kept.is_dir():
        print(f"downloading {CUBLAS} for its headers", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=runtime.cache_dir()) as name:
            _unpack_headers(_download(CUBLAS, Path(name)), Path(name) / "headers")
            (Path(name) / "headers").rename(kept)
    return kept


def toolkit_headers(nvcc: str) -> Path:
    """The toolkit's include folder, as the compiler tells it: what is on PATH may be a link or a script."""
    command = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
    text = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    found = re.search(r"^#\$ _HERE_=(.+)$", text, re.MULTILINE)
    if not found:
        raise MoneError(f"{nvcc} does not say where its toolkit is: is it NVIDIA's nvcc?")
    return Path(found[1]).resolve().parent / "include"


def compile_one(
    nvcc: str, headers: Path, tree: Path, file: Path, architectures: Sequence[str]
) -> tuple[str, list[str]]:
    """Compile a file: the output if that failed, and the warnings."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    includes = _includes_of(nvcc, headers, tree)
    with tempfile.NamedTemporaryFile(suffix=".o") as out:
        command = [nvcc, *FLAGS, "-Xcompiler", f"{HOST_FLAGS} -fPIC", *targets, *includes]
        command += ["--threads", str(n_core()), "-c", str(file), "-o", out.name]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    output = result.stdout + result.stderr
    return output if result.returncode else "", [line for line in output.splitlines() if "warning" in line]


def _includes_of(nvcc: str, headers: Path, tree: Path) -> list[str]:
    own = [f"-I{tree / 'ggml' / 'src'}", f"-I{tree / 'ggml' / 'include'}"]
    return own + [f"-isystem={folder}" for folder in (headers, toolkit_headers(nvcc))]


def release(nvcc: str) -> str:
    """What the compiler calls itself."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release ([\d.]+)", text)
    return f"nvcc {found[1] if found else '(unknown release)'}"


def _includes(text: str, files: set[Path]) -> bool:
    names = {file.name for file in files}
    return any(Path(name).name in names for name in re.findall(r'#include "([^"]+)"', text))


def _download(requirement: str, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        requirement,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.whl"))
    if result.returncode or not found:
        raise MoneError(
            f"pip could not download {requirement}: install the CUDA toolkit's cuBLAS headers instead"
        )
    return found[0]


def _unpack_headers(wheel: Path, folder: Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".h"):
                (folder / Path(name).name).write_bytes(archive.read(name))


if __name__ == "__main__":
    sys.exit(main())
