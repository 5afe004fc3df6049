"""The package as Windows and macOS would see it: see `faked_platform.py`. Neither was ever run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mone_export import cli, runtime

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
FILES = ("paths", "runtime", "proofs", "memory", "terminal", "artifacts", "weights")
FACTS_OF_LINUX = (  # not of the package
    "test_paths.py::test_place_that_is_taken_at_the_end_is_one_line",  # the system's words
    "test_paths.py::test_old_folder_is_there_while_the_new_ones_data_is_flushed",  # folders, too
    # they fake the system themselves
    "test_runtime.py::test_files_are_named_as_the_platform_does",
    "test_runtime.py::test_programs_find_the_libraries_beside_them",
)
IMPORTS = """
import importlib, pkgutil, faked_platform, mone_export
names = [module.name for module in pkgutil.walk_packages(mone_export.__path__, "mone_export.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names))
"""
EXPORT = """
import sys, warnings, faked_platform
from pathlib import Path
from mone_export import cli
from mone_export.output import quantizing
from mone_export.source import ggml
programs, *arguments = sys.argv[1:]
quantizing.path = ggml.runtime_path = lambda: Path(programs)
ggml.library = lambda name: f"lib{name}.so"  # it is Linux's that is loaded
warnings.filterwarnings("error", category=EncodingWarning, module="mone_export")
sys.exit(cli.main(arguments))
"""


def faked(platform: str, *arguments: object, limit: int = 900) -> "subprocess.CompletedProcess[str]":
    """Run Python with arguments, the package believing to be on `platform`."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"FAKED_PLATFORM": platform, "PYTHONPATH": path, "PYTEST_ADDOPTS": ""}
    env["OMP_NUM_THREADS"] = "1"  # as conftest.py has it here: what is measured depends on it
    command = [sys.executable, "-X", "warn_default_encoding", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=limit)


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_every_module_is_imported(platform: str) -> None:
    done = faked(platform, "-c", IMPORTS)
    assert done.returncode == 0 and int(done.stdout.split()[0]) > 100, done.stderr[-3000:]


@pytest.mark.parametrize("platform", ["win32", "darwin"])
@pytest.mark.by_day(1)
def test_modules_keep_their_promises(platform: str) -> None:
    files = [TESTS / f"test_{name}.py" for name in FILES]
    left_out = [f"--deselect=tests/{name}" for name in FACTS_OF_LINUX]
    options = ["-p", "faked_platform", "-p", "no:cacheprovider", "-q", "--tb=short", "-m", "not upstream"]
    warnings = ("-o", "filterwarnings=error::EncodingWarning:mone_export")  # Windows' own is not UTF-8
    done = faked(platform, "-m", "pytest", *options, *warnings, *left_out, *files)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.upstream
@pytest.mark.parametrize("platform", ["win32", pytest.param("darwin", marks=pytest.mark.nightly)])
@pytest.mark.nightly
def test_an_export_writes_the_same_bytes(platform: str, text: Path, tmp_path: Path) -> None:
    """Twice, so that outputs are replaced; with statistics, a work folder, a page, a matrix."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for file in runtime.path().iterdir():
        ending = ".exe" if platform == "win32" and os.access(file, os.X_OK) and not file.suffix else ""
        (programs / f"{file.name}{ending}").symlink_to(file)
    written = {}
    for who in ("here", platform):
        folder = tmp_path / who
        folder.mkdir()
        arguments = [
            "demo",
            "--ratio",
            "0.5",
            "-f",
            text,
            "--chunks",
            "8",
            "-c",
            "128",
            "--outtype",
            "q4_k_m",
        ]
        arguments += ["--workdir", folder / "work", "--stats", folder / "stats"]
        arguments += ["--imatrix", folder / "imatrix"]
        arguments += ["--report", folder / "page.html", "-o", folder / "out.gguf", "--overwrite", "--quiet"]
        for _ in range(2):
            if who == "here":
                assert cli.main([str(each) for each in arguments]) == 0
            else:
                done = faked(platform, "-c", EXPORT, programs, *arguments)
                assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        written[who] = (folder / "out.gguf").read_bytes()
        assert not list(folder.glob("*.part"))
    assert written["here"] == written[platform]
