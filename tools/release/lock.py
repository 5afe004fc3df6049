#!/usr/bin/env python3
"""Lock every dependency with its hashes, for Python 3.11 and newer on any system (`make lock`).

    python tools/release/lock.py [--upgrade]

uv resolves pyproject.toml against PyPI, whatever other index this machine has, and `requirements/` here gets
three files, in the order in which they are installed: `build.txt`, what builds the few packages that have no
wheel; `all.txt`; and `torch.txt`, PyTorch and the CUDA libraries of its build on PyPI, which a machine leaves
out that takes PyTorch from elsewhere. Versions stay as they are, unless pyproject.toml wants others.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).with_name("requirements")
FILES = {
    "build": r"setuptools==",
    "torch": r"torch==|triton==|cuda-|nvidia-",
    "all": r"",
}  # the first that fits
HEAD = "# Written by `make lock`; versions and hashes are PyPI's.\n"
COMPILE = (
    *("uv", "pip", "compile", "pyproject.toml", "--extra", "dev", "--universal", "--python-version", "3.11"),
    *("--generate-hashes", "--no-header", "--quiet", "--no-config"),
    *("--default-index", "https://pypi.org/simple"),
)


def main() -> int:
    """Write the files; 0 done, else what uv ended with."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that are allowed")
    upgrade = ["--upgrade"] if parser.parse_args().upgrade else []
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "locked.txt"
        out.write_text("".join(file.read_text() for file in FOLDER.glob("*.txt")))
        done = subprocess.run([*COMPILE, *upgrade, "-o", str(out)], cwd=ROOT, check=False)
        if done.returncode:
            return done.returncode
        packages = re.split(r"^(?=[a-z0-9])", out.read_text(), flags=re.MULTILINE)[1:]
    for file, text in split(packages).items():
        (FOLDER / f"{file}.txt").write_text(HEAD + text)
    return 0


def split(packages: Sequence[str]) -> dict[str, str]:
    """Return what each file has of the packages, each a version with its hashes."""
    text = dict.fromkeys(FILES, "")
    for package in packages:
        text[next(name for name, pattern in FILES.items() if re.match(pattern, package))] += package
    return text


if __name__ == "__main__":
    sys.exit(main())
