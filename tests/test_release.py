"""What a release says and does, as far as it can be read here: container and workflow were never run."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from mone_export import runtime

ROOT = Path(__file__).parents[1]
CONTAINER = ROOT / "tools" / "release" / "Containerfile"
WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"


def wheels() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools" / "release" / "wheels.py"))


def steps() -> list[tuple[str, str]]:
    """The steps of the Containerfile: (instruction, rest), continued lines joined."""
    lines = [line for line in CONTAINER.read_text().splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in joined)]


def test_command_says_what_was_measured() -> None:
    file = ROOT / "docs" / "measurements" / "wheel.json"
    cases = json.loads(file.read_text())["cases"]
    for test, said in runtime.WHEEL_SPEED.items():
        ratios = [case["summary"][test]["speed_ratio"]["median"] for case in cases]
        assert said == round(min(ratios), 2) >= 0.97


def test_container_is_slim_and_runs_as_a_user() -> None:
    found = steps()
    assert found[0][0] == "FROM" and re.search(r"/debian:\w+-slim$", found[0][1])
    last_run = max(number for number, (name, _) in enumerate(found) if name == "RUN")
    (user,) = (number for number, (name, _) in enumerate(found) if name == "USER")
    assert user > last_run and found[user][1] != "root"
    assert any(f"useradd --create-home {found[user][1]}" in rest for _, rest in found)


def test_container_installs_the_wheels_and_no_compiler() -> None:
    runs = [re.sub(r"^(--mount=\S+ )*", "", rest) for name, rest in steps() if name == "RUN"]
    for run in runs:
        assert subprocess.run(["sh", "-n", "-c", run]).returncode == 0
    packages = [word for run in runs for word in re.findall(r"apt-get install ((?:[\w-]+ ?)+)", run)]
    assert [word for line in packages for word in line.split() if word[0] != "-"] == [
        "python3",
        "python3-venv",
    ]
    (mount,) = re.findall(r"type=bind,source=(\w+),target=(\S+)", CONTAINER.read_text())
    assert mount[0] == "dist" and f"pip install --no-cache-dir {mount[1]}/*.whl" in runs[-1]


def test_workflow_calls_the_targets_of_the_makefile() -> None:
    """Besides them only the release itself: nothing is built in a way that is not tried here."""
    (job,) = yaml.safe_load(WORKFLOW.read_text())["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands[:-1] == ["make test", "make wheel"] and commands[-1].startswith("gh release create ")
    for command in commands[:-1]:
        assert (
            subprocess.run(["make", "-n", *command.split()[1:]], cwd=ROOT, capture_output=True).returncode
            == 0
        )


def test_wheels_replace_their_own_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("thesis.txt", "mone_export-0-py3-none-any.whl", "mone_export-0.tar.gz", "SHA256SUMS"):
        (tmp_path / name).write_text("old")
    main = wheels()["main"]
    for name in ("compiled", "stage", "packed"):
        monkeypatch.setitem(main.__globals__, name, lambda *_: None)
    new = "mone_export-1-py3-none-any.whl"
    monkeypatch.setitem(main.__globals__, "run", lambda *_, **__: (tmp_path / new).write_text("new"))
    assert main(["--out", str(tmp_path)]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"thesis.txt", "SHA256SUMS", new}
    assert [line.split()[1] for line in (tmp_path / "SHA256SUMS").read_text().splitlines()] == [new]


@pytest.mark.parametrize(
    ("built", "loaded"),
    [
        (None, "mone_llama/1-mone-new/cpu/bin"),
        ("1-mone-old", "mone_llama/1-mone-new/cpu/bin"),
        ("1-mone-new",) * 2,
    ],
    ids=["no build", "of other patches", "of the same source"],
)
def test_wheel_leaves_a_linked_build_in_use(built: str | None, loaded: str, tmp_path: Path) -> None:
    made = wheels()
    folder = tmp_path / "package" / "llama_cpp"
    folder.mkdir(parents=True)
    text = f"import os\nimport pathlib\nprint(str({made['FOLDER']}))\n"
    for name in ("llama_cpp.py", "_ggml.py", "mtmd_cpp.py"):
        (folder / name).write_text(text)
    (folder / "__init__.py").write_text("from . import llama_cpp, _ggml, mtmd_cpp\n")
    state = SimpleNamespace(package=tmp_path / "package", folder=Path("1-mone-new"))
    site = tmp_path / "site"
    (site / "mone_llama").mkdir(parents=True)
    made["stage_python"](state, site)
    if built:
        (tmp_path / built).mkdir()
        (tmp_path / built / "libllama.so").touch()
        (site / "llama_cpp" / "lib").mkdir()
        (site / "llama_cpp" / "lib" / "libllama.so").symlink_to(tmp_path / built / "libllama.so")
    code = "import ctypes; from unittest.mock import MagicMock; ctypes.CDLL = MagicMock(); import llama_cpp; "
    code += "print(ctypes.CDLL.call_args.args[0])"
    env = {name: value for name, value in os.environ.items() if name != "LLAMA_CPP_LIB_PATH"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=env | {"PYTHONPATH": str(site)}, cwd=site, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    expected = (tmp_path if built == loaded else site) / loaded
    assert done.stdout.split() == [*[str(expected)] * 3, str(expected / "libggml.so")]
