"""Prove that the devices of a build skip ids that select no matrix, and switch on what is proved.

A backend that was run by whoever wrote the patches declares `ggml_backend_mul_mat_id_skip`. Others have the
code, but declare nothing unless a variable is 1 (`VARIABLES`): a device that computes something else would
spoil every text without a word. `check` runs the tests on the user's own devices, with the variables set, and
writes what passed into a file beside the libraries; `environment` has the variables of what is proved for a
program of the build, `switch_on` sets them for this process.
"""

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from mone_export.errors import MoneError
from mone_export.runtime.toolchain import is_library, program
from mone_export.runtime.upstream import Progress, last_line, quiet

VARIABLES: Mapping[str, str] = {  # how a device's name begins, and what its backend's declaration reads
    "MTL": "GGML_MUL_MAT_ID_SKIP_METAL",
    "ROCm": "GGML_MUL_MAT_ID_SKIP_ROCm",
    "MUSA": "GGML_MUL_MAT_ID_SKIP_MUSA",
}
PROGRAMS = ("test-backend-ops", "test-mul-mat-id-skip")  # what `check` runs
_CASES = ("-o", "MUL_MAT_ID,MUL_MAT_VEC_FUSION", "-p", "skipped=|n_ids=8")  # those with the flag

_FILE = "mul_mat_id_skip.json"
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_DEVICE = re.compile(r"^Backend \d+/\d+: (.+)$", re.MULTILINE)
_DESCRIPTION = re.compile(r"^  Device description: (.+)$", re.MULTILINE)
_CASE = re.compile(r"^  (\w+\(.+\)): .*?(OK|FAIL|not supported \[.*\])\s*$", re.MULTILINE)
_COUNTS = re.compile(r"^(.+): (\d+)/(\d+) ok$", re.MULTILINE)  # of test-mul-mat-id-skip


@dataclass(frozen=True, slots=True)
class DeviceCheck:
    """What the cases with skipped ids said of a device; `error` says how a program ended too early."""

    device: str
    description: str
    passed: int
    failed: tuple[str, ...]
    not_supported: int
    error: str = ""

    @property
    def verdict(self) -> Literal["passed", "failed", "not declared"]:
        """Whether all that the device takes is right; one that takes nothing runs no layer with novices."""
        if self.failed or self.error:
            return "failed"
        return "passed" if self.passed else "not declared"


def check(bin_folder: Path, *, progress: Progress = quiet) -> tuple[DeviceCheck, ...]:
    """Test every device that the programs in `bin_folder` find, and write down which passed.

    Raises MoneError where the test programs are missing or cannot be run.
    """
    listed = _run(bin_folder, "test-backend-ops", "test", "-b", "none")
    names = _DEVICE.findall(listed.stdout)
    if not names:
        raise MoneError(
            f"test-backend-ops lists no device ({last_line(listed.stderr)}): run `mone-llama build`"
        )
    found = []
    for done, name in enumerate(names):
        progress(done, len(names), "testing (devices)")
        found.append(_check_device(bin_folder, name))
    _write(bin_folder, found)
    progress(len(names), len(names), "testing (devices)")
    return tuple(found)


def proved(bin_folder: Path) -> dict[str, str]:
    """Return the variables of backends of which a device passed and none failed, with these libraries."""
    try:
        kept = json.loads((bin_folder / _FILE).read_text(encoding="utf-8"))
        verdicts = [(item["device"], item["verdict"]) for item in kept["devices"]]
        same = kept["build"] == build_key(bin_folder)
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    found = {
        variable: {verdict for name, verdict in verdicts if name.startswith(start)}
        for start, variable in VARIABLES.items()
    }
    return {name: "1" for name, said in found.items() if same and "passed" in said and "failed" not in said}


def environment(bin_folder: Path) -> dict[str, str]:
    """Return the environment for a program of this build; what the user has set stays as it is."""
    return os.environ | _unset(bin_folder)


def switch_on(bin_folder: Path) -> None:
    """Set the variables of proved devices for this process, except those that the user has set."""
    os.environ.update(_unset(bin_folder))


def build_key(bin_folder: Path) -> str:
    """Return what tells these libraries from those of any other build, without reading them."""
    files = sorted(file for file in bin_folder.iterdir() if is_library(file))
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:16]


def _unset(bin_folder: Path) -> dict[str, str]:
    return {name: value for name, value in proved(bin_folder).items() if name not in os.environ}


def _check_device(bin_folder: Path, name: str) -> DeviceCheck:
    done = _run(bin_folder, "test-backend-ops", "test", "-b", name, *_CASES)
    text = _COLOUR.sub("", done.stdout)
    results = _CASE.findall(text)
    failed = [case for case, result in results if result == "FAIL"]
    passed = sum(result == "OK" for _, result in results)
    described = _DESCRIPTION.search(text)
    errors = [_ended(done)] if done.returncode and not failed else []
    if name == "CPU":  # this program knows no other device
        done = _run(bin_folder, "test-mul-mat-id-skip")
        counts = [(what, int(n_ok), int(n_test)) for what, n_ok, n_test in _COUNTS.findall(done.stdout)]
        passed += sum(n_ok for _, n_ok, _ in counts)
        wrong = [f"test-mul-mat-id-skip, {what}: {n_ok}/{n}" for what, n_ok, n in counts if n_ok != n]
        errors += [_ended(done)] if done.returncode and not wrong else []
        failed += wrong
    n_not = len(results) - sum(result in ("OK", "FAIL") for _, result in results)
    return DeviceCheck(
        name, described[1] if described else "", passed, tuple(failed), n_not, "; ".join(errors)
    )


def _ended(done: "subprocess.CompletedProcess[str]") -> str:
    said = last_line(_COLOUR.sub("", done.stderr or done.stdout))
    return f"{Path(done.args[0]).name} ended with status {done.returncode} ({said})"


def _run(bin_folder: Path, name: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [str(program(bin_folder, name)), *arguments]
    env = os.environ | dict.fromkeys(VARIABLES.values(), "1")
    try:
        return subprocess.run(
            command, env=env, capture_output=True, encoding="utf-8", errors="replace", check=False
        )
    except FileNotFoundError:
        raise MoneError(
            f"{bin_folder} has no {name}: it comes with the wheel mone_llama and with `mone-llama build`, "
            "not with builds of chosen targets"
        ) from None
    except OSError as error:
        raise MoneError(f"cannot run {command[0]} ({error.strerror}): run `mone-llama build`") from None


def _write(bin_folder: Path, found: Sequence[DeviceCheck]) -> None:
    file = bin_folder / _FILE
    devices = [asdict(item) | {"verdict": item.verdict} for item in found]
    part = file.with_name(f"{_FILE}.part")
    try:
        part.write_text(
            json.dumps({"build": build_key(bin_folder), "devices": devices}, indent=1) + "\n",
            encoding="utf-8",
        )
        part.replace(file)
    except OSError as error:
        raise MoneError(
            f"the tests ran, but {file} cannot be written ({error.strerror}): make its folder writable"
        ) from None
