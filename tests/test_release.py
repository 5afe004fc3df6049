"""What a release says and does, as far as it can be read here: container and workflow were never run."""

import hashlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mone_export import runtime
from mone_export.errors import MoneError

ROOT = Path(__file__).parents[1]
CONTAINER = ROOT / "tools" / "release" / "Containerfile"
WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"


def wheels() -> dict[str, Any]:
    """Return what tools/release/wheels.py defines; it imports the file beside it."""
    sys.path.insert(0, str(ROOT / "tools" / "release"))
    return runpy.run_path(str(ROOT / "tools" / "release" / "wheels.py"))


def steps() -> list[tuple[str, str]]:
    """The steps of the Containerfile as `make check-container` runs them."""
    found: list[tuple[str, str]] = runpy.run_path(str(CONTAINER.with_name("container.py")))["steps"](
        CONTAINER.read_text()
    )
    return found


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


def test_workflow_gathers_every_file_once(tmp_path: Path) -> None:
    release = yaml.safe_load(WORKFLOW.read_text())["jobs"]["release"]
    gathered = next(step["run"] for step in release["steps"] if "find " in step.get("run", ""))
    for name in ("wheel/dist/a.whl", "wheel/dist/SHA256SUMS", "wheel-vulkan/dist/vulkan/b.whl"):
        (tmp_path / "made" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "made" / name).write_text(name)
    subprocess.run(["sh", "-c", gathered], cwd=tmp_path, check=True)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"SHA256SUMS", "a.whl", "b.whl"}
    listed = (tmp_path / "out" / "SHA256SUMS").read_text().splitlines()
    assert [line.split()[1] for line in listed] == ["a.whl", "b.whl"]


def test_workflow_calls_the_targets_of_the_makefile() -> None:
    """Besides them only packages and the release itself: nothing is built in a way that is not tried here."""
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    rows = jobs["make"]["strategy"]["matrix"]["include"]
    targets = [row[key] for row in rows for key in ("first", "target") if key in row]
    assert {"test", "wheel", "check-arm64", "wheel-aarch64", "wheel-vulkan", "check-windows"} <= {*targets}
    commands = [step["run"] for step in jobs["make"]["steps"] if "run" in step]
    assert commands[0].startswith("sudo apt-get update ")
    assert commands[1:] == ["make ${{ matrix.first }}", "make ${{ matrix.target }}"]
    checks, gathered, released = [step["run"] for step in jobs["release"]["steps"] if "run" in step]
    assert subprocess.run(["sh", "-n", "-c", gathered]).returncode == 0
    assert released.startswith("gh release create ")
    for arguments in [[target] for target in targets] + [shlex.split(checks)[1:]]:
        dry = ["make", "-n", *arguments]
        assert subprocess.run(dry, cwd=ROOT, capture_output=True).returncode == 0


def test_wheels_replace_their_own_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("thesis.txt", "mone_export-0-py3-none-any.whl", "mone_export-0.tar.gz", "SHA256SUMS"):
        (tmp_path / name).write_text("old")
    main = wheels()["main"]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1580601600")
    for name in ("check_tools", "compiled", "stage", "packed", "materials"):
        monkeypatch.setitem(main.__globals__, name, lambda *_: None)
    new = "mone_export-1-py3-none-any.whl"
    monkeypatch.setitem(main.__globals__, "run", lambda *_, **__: (tmp_path / new).write_text("new"))
    assert main(["--out", str(tmp_path)]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"thesis.txt", "SHA256SUMS", new}
    assert [line.split()[1] for line in (tmp_path / "SHA256SUMS").read_text().splitlines()] == [new]


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="auditwheel reads ELF files"
)
def test_same_files_make_the_same_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed in another folder, under another umask and at another time."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1580601600")
    made = wheels()
    runtimes = vars(sys.modules["runtimes"])
    found = []
    for umask, mode in ((0o022, 0o755), (0o077, 0o700)):
        folder = tmp_path / str(umask)
        info = folder / "stage" / "mone_llama-0.1.0.dist-info"
        before = os.umask(umask)
        try:
            info.mkdir(parents=True)
            (info / "METADATA").write_text(
                runtimes["METADATA"].format(name="mone_llama", version="0.1.0", summary="x", python=">=3.11")
            )
            (info / "WHEEL").write_text(runtimes["WHEEL"].format(machine=made["KINDS"]["cpu"].machine))
            library = folder / "stage" / "mone_llama" / "libx.so"
            library.parent.mkdir()
            command = ["cc", "-shared", "-nostdlib", "-x", "c", os.devnull, "-o", str(library)]
            subprocess.run(command, check=True)
            library.chmod(mode)
            os.utime(library, (10**9 + umask, 10**9 + umask * 1000))
            made["packed"](made["KINDS"]["cpu"], folder, folder / "out")
        finally:
            os.umask(before)
        (wheel,) = (folder / "out").iterdir()
        found.append(wheel.read_bytes())
    assert found[0] == found[1]


def materials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str) -> dict[str, Any]:
    """Write the package's or the runtime's bill of materials, twice the same; returns what it says."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1580601600")
    sbom = wheels()["sbom"]
    texts = []
    for name in ("a.json", "b.json"):
        bom = sbom.of_package() if which == "package" else sbom.of_runtime(runtime.source(), "0.1.0")
        sbom.write(bom, tmp_path / name)
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1]
    found: dict[str, Any] = json.loads(texts[0])
    assert found["bomFormat"] == "CycloneDX" and found["metadata"]["timestamp"] == "2020-02-02T00:00:00+00:00"
    return found


def test_package_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = materials(tmp_path, monkeypatch, "package")
    versions = {each["name"]: each["version"] for each in found["components"]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {canonicalize_name(Requirement(each).name) for each in project["dependencies"]}
    assert needed | {"tokenizers", "urllib3"} <= versions.keys()  # and what those need
    assert not {"pytest", "ruff", "mone-export"} & versions.keys()
    locked = (ROOT / "tools" / "release" / "requirements" / "all.txt").read_text()
    assert all(
        f"\n{name}=={version} " in locked for name, version in versions.items() if name in needed - {"torch"}
    )
    (ours,) = (each["dependsOn"] for each in found["dependencies"] if each["ref"].startswith("mone-export"))
    assert set(ours) == needed


def test_materials_that_are_no_cyclonedx_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1580601600")
    sbom = wheels()["sbom"]
    wrong = sbom.HashType(alg=sbom.HashAlgorithm.SHA_256, content="no digest")
    bom = sbom.described(sbom.Component(name="x", hashes=[wrong]), [])
    with pytest.raises(MoneError, match="is no valid CycloneDX"):
        sbom.write(bom, tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


@pytest.mark.upstream
def test_runtime_says_what_it_was_built_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.tree(whole=True)
    found = materials(tmp_path, monkeypatch, "runtime")
    parts = {each["name"]: each for each in found["components"]}
    state = runtime.source()
    assert parts["llama.cpp"]["version"] == state.upstream.llama_cpp_commit
    assert parts[state.upstream.package]["hashes"][0]["content"] == state.upstream.sha256
    for patch in state.patches:
        (digest,) = parts[f"patches/{patch.name}"]["hashes"]
        assert digest["content"] == hashlib.sha256(patch.read_bytes()).hexdigest()
    assert "vendor/nlohmann/json.hpp" in parts


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
    wheels()
    made = vars(sys.modules["runtimes"])
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
