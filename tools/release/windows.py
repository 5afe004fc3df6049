"""Cross-compile the patched llama.cpp for Windows with mingw-w64, zip it, and run the demo in it under wine.

    python tools/release/windows.py [--no-run]      (make check-windows)

The zip lands in build/release. What llama-cli.exe continues prompts with, on the demo's pruned file, must be
the text of this machine's own llama-cli; a file by llama-quantize.exe must have the bytes of one made here.
The code for the CPU is that of x86-64 with AVX2, FMA, F16C and BMI2 (Intel since 2013, AMD since 2015).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from mone_export import runtime
from mone_export.errors import MoneError
from mone_export.pipeline import export

OUT = Path(__file__).resolve().parents[2] / "build" / "release"
TARGETS = ("llama-cli", "llama-server", "llama-quantize", "llama-perplexity", "llama-bench", "llama", "mtmd")
MACHINE = "x86_64-w64-mingw32"
CXX = f"{MACHINE}-g++-posix"
# of GCC and mingw-w64, beside our own: shared, since exceptions cross from library to program
COMPILERS_OWN = ("libgcc_s_seh-1.dll", "libstdc++-6.dll", "libgomp-1.dll", "libwinpthread-1.dll")
# which mingw-w64 10, Debian 12's, lacks: of threads, with the layout and the values of those of processes
THROTTLING = " ".join(
    f"-DTHREAD_POWER_THROTTLING_{name}=PROCESS_POWER_THROTTLING_{name}"
    for name in ("STATE", "CURRENT_VERSION", "EXECUTION_SPEED")
)
CMAKE_ARGS = (
    "-DCMAKE_SYSTEM_NAME=Windows",  # this is what makes CMake compile for another system
    "-DCMAKE_SYSTEM_PROCESSOR=x86_64",
    f"-DCMAKE_C_COMPILER={MACHINE}-gcc-posix",
    f"-DCMAKE_CXX_COMPILER={CXX}",
    f"-DCMAKE_RC_COMPILER={MACHINE}-windres",
    f"-DCMAKE_FIND_ROOT_PATH=/usr/{MACHINE}",
    "-DCMAKE_FIND_ROOT_PATH_MODE_LIBRARY=ONLY",  # none of this machine's libraries
    "-DCMAKE_FIND_ROOT_PATH_MODE_INCLUDE=ONLY",
    "-DCMAKE_FIND_ROOT_PATH_MODE_PACKAGE=ONLY",
    f"-DCMAKE_C_FLAGS={THROTTLING}",
    f"-DCMAKE_PROJECT_ggml_INCLUDE={Path(__file__).with_name('mingw.cmake')}",
    "-DGGML_NATIVE=OFF",
    *(f"-DGGML_{name}=ON" for name in ("SSE42", "AVX", "AVX2", "FMA", "F16C", "BMI2")),
    "-DLLAMA_OPENSSL=OFF",
)
PROMPTS = ("def read_file(path):", "class Node:", "The function returns a list of")
N_PREDICT = 48
QUIET = {
    "WINEDEBUG": "-all",
    "DISPLAY": "",
    "WINEDLLOVERRIDES": "mscoree,mshtml=",
}  # no windows, no downloads


def main() -> int:
    """Build, zip, run; returns the exit status: 0 if all texts and bytes are equal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-run", action="store_true", help="only build and zip")
    args = parser.parse_args()
    tools = {CXX: "g++-mingw-w64-x86-64-posix"} | ({} if args.no_run else {"wine": "wine wine64"})
    if missing := [package for tool, package in tools.items() if shutil.which(tool) is None]:
        raise MoneError(
            f"needs a cross compiler, and wine to run what it makes: apt install {' '.join(missing)}"
        )
    start = time.monotonic()
    built = runtime.build(cmake_args=CMAKE_ARGS, targets=TARGETS)
    print(f"built in {time.monotonic() - start:.0f} s (0 if it was there): {built.bin}", flush=True)
    archive = packed(built)
    print(f"{archive}: {archive.stat().st_size / 1e6:.1f} MB", flush=True)
    return 0 if args.no_run else run(archive)


def packed(built: runtime.Build) -> Path:
    """Zip the stripped programs and libraries of a build, with those of the compiler."""
    OUT.mkdir(parents=True, exist_ok=True)
    archive = OUT / f"mone-llama-{built.folder.parent.name}-windows-x86_64.zip"
    part = archive.with_suffix(".part")
    own = [file for file in sorted(built.bin.iterdir()) if file.suffix in (".exe", ".dll")]
    others = [Path(said([CXX, f"-print-file-name={name}"]).strip()) for name in COMPILERS_OWN]
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as pack:
        for file in (*own, *others):
            stripped = Path(folder, file.name)
            said([f"{MACHINE}-strip", "--strip-unneeded", "-o", str(stripped), str(file)])
            pack.write(stripped, file.name)
        pack.write(runtime.tree(whole=True) / "LICENSE", "LICENSE-llama.cpp")
    part.replace(archive)
    return archive


def run(archive: Path) -> int:
    """Run the zip's programs under wine on a pruned demo file; returns 0 if they do what those here do."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        zipfile.ZipFile(archive).extractall(folder / "programs")
        env = os.environ | QUIET | {"WINEPREFIX": str(folder / "wine")}
        said(["wine", "wineboot", "--init"], env=env)
        half = folder / "half.gguf"
        export("demo", ratio=0.5, outfile=half, outtype="q8_0", n_row=16, seq_len=256)
        wrong = sum(not same_text(half, prompt, folder / "programs", env) for prompt in PROMPTS)
        wrong += not same_bytes(half, folder, env)
        subprocess.run(["wineserver", "--kill"], env=env, check=False)  # 1: it is gone already
    return 1 if wrong else 0


def same_text(model: Path, prompt: str, programs: Path, env: dict[str, str]) -> bool:
    """Have both llama-cli continue a prompt, always by the likeliest token; print and compare."""
    options = ["-m", str(model), "-p", prompt, "-n", str(N_PREDICT), "-st", "--temp", "0", "-t", "2"]
    options += ["--simple-io", "--no-warmup"]
    here = answer(said([str(runtime.path() / "llama-cli"), *options]))
    there = answer(said(["wine", str(programs / "llama-cli.exe"), *options], env=env))
    print(f"{'equal' if here == there else 'DIFFERENT'}, {len(here)} characters after {prompt!r}", flush=True)
    if here != there:
        print(f"  here: {here!r}\n  wine: {there!r}")
    return bool(here) and here == there


def same_bytes(model: Path, folder: Path, env: dict[str, str]) -> bool:
    """Have both llama-quantize make a q4_k_m file."""
    files = (folder / "here.gguf", folder / "there.gguf")
    programs = (
        [str(runtime.path() / "llama-quantize")],
        ["wine", str(folder / "programs" / "llama-quantize.exe")],
    )
    for program, file in zip(programs, files, strict=True):
        said([*program, "--allow-requantize", str(model), str(file), "Q4_K_M", "2"], env=env)
    equal = files[0].read_bytes() == files[1].read_bytes()
    print(f"{'equal' if equal else 'DIFFERENT'}, {files[0].stat().st_size} bytes of llama-quantize's q4_k_m")
    return equal


def answer(text: str) -> str:
    """Return what llama-cli printed between its prompt and its figures."""
    found = re.search(r"^> (.*)^\[ Prompt: ", text.replace("\r\n", "\n"), re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


def said(command: list[str], *, env: dict[str, str] | None = None) -> str:
    """Run a program, which must succeed; returns what it printed."""
    done = subprocess.run(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise MoneError(
            f"{command} ended with status {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"
        )
    return done.stdout


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MoneError as error:
        sys.exit(f"windows: {error}")
