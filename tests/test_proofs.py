"""`mone-llama check`: what the tests say of each device, what is written down, what it switches on."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mone_export import cli_llama, runtime
from mone_export.errors import MoneError
from mone_export.evaluation import speed
from mone_export.llama_options import LlamaOptions
from mone_export.runtime.proofs import VARIABLES
from mone_export.runtime.toolchain import library, program

VARIABLE = re.compile(r'"(GGML_MUL_MAT_ID_SKIP_\w*)"')
METAL = "GGML_MUL_MAT_ID_SKIP_METAL"

# DEVICES: one that computes on the CPU, one without these operations, one that is off unless proved, and
# Vulkan; DEVICE does OUTCOME after its first case
BACKEND_OPS = """\
#!/bin/sh
number=0
for device in DEVICES; do
    number=$((number + 1))
    echo "Backend $number/4: $device"
    [ "$3" = "$device" ] || { echo "  Skipping"; continue; }
    echo "  Device description: made up: $device"
    case "$device $GGML_MUL_MAT_ID_SKIP_METAL" in
        "BLAS "*|"MTL0 ") printf '  MUL_MAT_ID(skipped=1): not supported [%s] \\n' "$device" ;;
        *) printf '  MUL_MAT_ID(skipped=1): \\033[1;32mOK\\033[0m\\n'
           [ "$device" = DEVICE ] && OUTCOME
           printf '  MUL_MAT_VEC_FUSION(n_ids=8): \\033[1;32mOK\\033[0m\\n' ;;
    esac
    printf '  Backend %s: \\033[1;32mOK\\033[0m\\n' "$device"
done
"""
FINE = "true"
FAILS = (
    r"{ printf '  MUL_MAT_ID(skipped=3): [MUL_MAT_ID] NMSE = 1.0 > 0.0 \033[1;31mFAIL\033[0m\n'; exit 1; }"
)
DIES = "{ echo 'ggml-vulkan: device lost' >&2; exit 134; }"


def made_up(
    folder: Path, outcome: str = FINE, device: str = "Vulkan0", devices: str = "CPU BLAS MTL0 Vulkan0"
) -> Path:
    """Return a folder of stand-ins for a build's programs and libraries; `device` has the outcome."""
    script = BACKEND_OPS.replace("DEVICES", devices).replace("DEVICE", device).replace("OUTCOME", outcome)
    scripts = {"test-backend-ops": script}
    scripts["test-mul-mat-id-skip"] = "#!/bin/sh\necho 'CPU f32: 12/12 ok'\necho '0 failed'\n"
    for name, text in scripts.items():
        program(folder, name).write_text(text)
        program(folder, name).chmod(0o755)
    if not (folder / library("ggml-base")).exists():
        (folder / library("ggml-base")).write_bytes(b"library")
    return folder


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the environment as it was: the code under test sets the variable itself."""
    monkeypatch.setenv(METAL, "")
    monkeypatch.delenv(METAL)


def test_each_device_is_tested_and_what_passed_is_remembered(tmp_path: Path, unset: None) -> None:
    folder = made_up(tmp_path)
    found = {item.device: item for item in runtime.check(folder)}
    assert {name: item.verdict for name, item in found.items()} == {
        "CPU": "passed",
        "BLAS": "not declared",
        "MTL0": "passed",  # only because the variable was set for the tests
        "Vulkan0": "passed",
    }
    assert found["CPU"].passed == 2 + 12 and found["BLAS"].not_supported == 1
    assert found["MTL0"].description == "made up: MTL0"
    assert METAL not in os.environ
    assert runtime.proved(folder) == {METAL: "1"}
    assert runtime.environment(folder)[METAL] == "1" and METAL not in os.environ
    runtime.switch_on(folder)
    assert os.environ[METAL] == "1"


def test_the_users_variable_has_the_last_word(
    tmp_path: Path, unset: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made_up(tmp_path)
    runtime.check(folder)
    monkeypatch.setenv(METAL, "0")
    runtime.switch_on(folder)
    assert os.environ[METAL] == runtime.environment(folder)[METAL] == "0"


def test_a_proof_is_of_one_build(tmp_path: Path, unset: None) -> None:
    folder = made_up(tmp_path)
    assert runtime.proved(folder) == {}
    runtime.check(folder)
    (folder / library("ggml-base")).write_bytes(b"another")
    os.utime(folder / library("ggml-base"), ns=(1, 1))
    assert runtime.proved(folder) == {}
    (folder / "mul_mat_id_skip.json").write_text("[]")
    assert runtime.proved(folder) == {}


def test_a_device_that_fails_later_is_off_again(tmp_path: Path, unset: None) -> None:
    folder = made_up(tmp_path)
    runtime.check(folder)
    assert runtime.proved(folder)
    made_up(folder, FAILS, "MTL0")
    assert [item.verdict for item in runtime.check(folder)][2] == "failed"
    assert runtime.proved(folder) == {}


def test_one_device_that_fails_keeps_its_backend_off(tmp_path: Path, unset: None) -> None:
    """The variable is the whole backend's."""
    folder = made_up(tmp_path, FAILS, "MTL1", devices="MTL0 MTL1 ROCm0")
    assert [item.verdict for item in runtime.check(folder)] == ["passed", "failed", "passed"]
    assert runtime.proved(folder) == {"GGML_MUL_MAT_ID_SKIP_ROCm": "1"}


def test_programs_get_what_is_proved_and_this_process_does_not(
    tmp_path: Path, unset: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own libraries may be of another build."""
    folder = made_up(tmp_path)
    program(folder, "said").write_text(f'#!/bin/sh\necho "${METAL}"\n')
    program(folder, "said").chmod(0o755)
    runtime.check(folder)
    monkeypatch.setattr(speed, "path", lambda: folder)
    assert speed.run_program("said", tmp_path, LlamaOptions())[0] == "1\n"
    assert METAL not in os.environ


def test_variables_are_announced_once(
    tmp_path: Path, unset: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made_up(tmp_path, devices="MTL0 ROCm0")
    monkeypatch.setattr(cli_llama.runtime, "path", lambda _backend: folder)
    assert cli_llama.main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("switched on") and len(lines) == 1 + 2 + 3
    assert all(line.endswith("=1") for line in lines[-2:])


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (FAILS, "MUL_MAT_ID(skipped=3)"),
        (DIES, "ended with status 134 (ggml-vulkan: device lost)"),
    ],
    ids=["fails", "dies"],
)
def test_a_device_that_fails_is_named(
    outcome: str,
    said: str,
    tmp_path: Path,
    unset: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = made_up(tmp_path, outcome)
    monkeypatch.setattr(cli_llama.runtime, "path", lambda _backend: folder)
    assert cli_llama.main(["check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    verdicts = {line.split()[0]: line.split()[4] for line in lines[1:5]}
    assert verdicts["Vulkan0"] == "failed" and verdicts["CPU"] == "passed"
    assert any(line.startswith("Vulkan0: ") and said in line for line in lines)
    assert "BLAS: layers with novices run on the CPU" in lines
    assert lines[-1].endswith(f" {METAL}=1")
    assert cli_llama.main(["check", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [item["verdict"] for item in found["devices"]] == ["passed", "not declared", "passed", "failed"]
    assert found["variables"] == {METAL: "1"}


def test_the_variables_are_those_that_the_patches_read() -> None:
    """CUDA's sources, which HIP and MUSA compile as well, add their own name to the start of it."""
    patches = runtime.source().patches
    read = {name for patch in patches for name in VARIABLE.findall(patch.read_text(encoding="utf-8"))}
    if not read:
        pytest.skip("all backends that have the code declare it")
    known = {*VARIABLES.values()}
    assert all(name in known or any(each.startswith(name) for each in known) for name in read)
    assert all(any(each.startswith(name) for name in read) for each in known)


def test_a_build_without_the_test_programs_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(MoneError, match="has no test-backend-ops: it comes with the wheel"):
        runtime.check(tmp_path)


@pytest.mark.upstream
@pytest.mark.nightly
def test_the_cpu_of_this_machine_passes() -> None:
    code = "import sys; from mone_export.cli_llama import main; sys.exit(main(['check', '--json']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    (cpu,) = (item for item in found["devices"] if item["device"] == "CPU")
    print(f"{cpu['device']}, {cpu['description']}: {cpu['passed']} passed, {len(cpu['failed'])} failed")
    assert cpu["verdict"] == "passed" and cpu["passed"] > 1000 and not cpu["failed"]
