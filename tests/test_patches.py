"""Promises about patches/: complete, explained, and exactly what the maintainers' tool writes."""

import re
import runpy
import subprocess
import sys
from email import message_from_string
from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest

from mone_export import runtime
from mone_export.runtime import tree
from mone_export.runtime.upstream import Upstream, read_series, unpack

ROOT = Path(__file__).resolve().parents[1]
PATCHES = ROOT / "patches"
SERIES = read_series(PATCHES)


def test_pin_is_complete() -> None:
    pin = Upstream.load(PATCHES / "UPSTREAM")
    assert re.fullmatch(r"[0-9a-f]{64}", pin.sha256)
    assert pin.version in pin.sdist


def test_series_names_every_patch_once() -> None:
    assert sorted(patch.name for patch in SERIES) == sorted(file.name for file in PATCHES.glob("*.patch"))


@pytest.mark.parametrize("patch", SERIES, ids=lambda patch: patch.stem)
def test_patch_says_why_and_when_it_goes(patch: Path) -> None:
    header = patch.read_text(encoding="utf-8").split("\ndiff --git ", 1)[0]
    for trailer in ("Reason", "Forwarded", "Remove-when"):
        assert re.search(rf"^{trailer}: \S", header, re.MULTILINE), f"{patch.name} lacks {trailer}:"


@pytest.mark.parametrize("patch", SERIES, ids=lambda patch: patch.stem)
def test_patch_has_the_author_and_the_date_of_all(patch: Path) -> None:
    readme = (PATCHES / "README.md").read_text(encoding="utf-8")
    promised = re.search(r"fixed \(`(.+? <.+?>)`, (\d+ \w+ \d+)\)", readme)
    assert promised
    header = message_from_string(patch.read_text(encoding="utf-8").split("\n", 1)[1])
    date = parsedate_to_datetime(header["Date"])
    assert (header["From"], f"{date.day} {date:%B %Y}") == promised.groups()


def test_series_stays_small() -> None:
    added = [
        line
        for patch in SERIES
        for line in patch.read_text(encoding="utf-8").splitlines()
        if line.startswith("+") and not line.startswith("+++")
    ]
    assert len(added) < 1100


def test_readme_lists_every_patch() -> None:
    readme = (PATCHES / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\((\S+\.patch)\)", readme)) == sorted(patch.name for patch in SERIES)


def test_a_new_or_changed_function_with_ids_is_found(tmp_path: Path) -> None:
    functions_with_ids = runpy.run_path(str(ROOT / "tools/patches/llamacpp.py"))["functions_with_ids"]
    file = tmp_path / "ggml" / "src" / "ggml-cuda" / "mmvq.cu"
    file.parent.mkdir(parents=True)
    declared = "void launch(const int * ids);\n"
    kernel = (
        "template <int n> __launch_bounds__(f(n))\nvoid kernel_of(\n    int * ids) {\n    use(ids[0]);\n}\n"
    )
    file.write_text(declared + kernel + "static int other(int n) {\n    return n;\n}\n", encoding="utf-8")
    before = functions_with_ids(tmp_path)
    assert list(before) == ["ggml/src/ggml-cuda/mmvq.cu: kernel_of"]
    file.write_text(kernel.replace("ids[0]", "ids[1]") + "int second(int * ids) { return ids[0]; }\n")
    after = functions_with_ids(tmp_path)
    assert list(after) == [*before, "ggml/src/ggml-cuda/mmvq.cu: second"]
    assert after["ggml/src/ggml-cuda/mmvq.cu: kernel_of"] != before["ggml/src/ggml-cuda/mmvq.cu: kernel_of"]


def test_bump_stops_until_changed_functions_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(ROOT / "tools/patches/llamacpp.py"))["main"]
    numbers = iter("01")

    def release(folder: Path, _upstream: Upstream) -> None:
        file = folder / "ggml" / "src" / "ggml-cpu" / "ops.cpp"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"void f(int * ids) {{\n    ids[{next(numbers)}] = 0;\n}}\n", encoding="utf-8")

    for name, stand_in in (("_commit_release", release), ("_pin_of", lambda _release, old: old)):
        monkeypatch.setitem(main.__globals__, name, stand_in)
    monkeypatch.setitem(main.__globals__, "_write_pin", lambda _pin: pytest.fail("the pin was moved"))
    assert main(["bump", "9.9.9", str(tmp_path / "tree")]) == 1
    message = capsys.readouterr().err
    assert "ops.cpp: f\n" in message and "bump 9.9.9 --read" in message


@pytest.mark.slow
def test_functions_that_the_patches_change_are_among_those_with_ids() -> None:
    functions_with_ids = runpy.run_path(str(ROOT / "tools/patches/llamacpp.py"))["functions_with_ids"]
    names = {key.rsplit(" ", 1)[1] for key in functions_with_ids(tree(patched=False))}
    assert names > {"ggml_compute_forward_mul_mat_id", "mm_ids_helper", "mul_mat_vec_q", "mul_mat_vec_q_moe"}
    assert names > {"mul_mat_vec_f", "mul_mat_f_ids", "quantize_mmq_q8_1", "ggml_vk_mul_mat_vec_id_q_f16"}
    assert names > {"kernel_mul_mv_id", "kernel_mul_mm_id", "kernel_mul_mm_id_map0"}


def test_registers_are_compared_kernel_by_kernel() -> None:
    check_cuda = runpy.run_path(str(ROOT / "tools/patches/check_cuda.py"))
    pairs = check_cuda["pairs"]
    assert pairs({"f<1": 40, "g": 20}, {"f<1, false": 40, "f<1, true": 44, "g": 21, "new": 9}) == (
        {"f<1": (40, 40), "g": (20, 21)},
        {"f<1": (40, 44)},
    )
    with pytest.raises(check_cuda["MoneError"], match="no kernel f<1"):
        pairs({"f<1": 40}, {"g": 40})
    said = "".join(
        f"ptxas info    : Compiling entry function '_Z{name}v' for 'sm_90'\n    0 bytes stack frame\n{line}\n"
        for name, line in (
            ("1f", "ptxas info    : Used 40 registers, used 0 barriers, 400 bytes cmem[0]"),
            ("1g", "ptxas info    : Used 20 registers, used 1 barriers, 512 bytes smem, 400 bytes cmem[0]"),
        )
    )
    assert check_cuda["uses_in"](said) == {"f": (40, 0), "g": (20, 512)}


@pytest.mark.slow
def test_no_call_of_the_converter_trusts_a_model_by_itself() -> None:
    """Every place that loads a tokenizer asks the one attribute; a new release may bring new places."""
    calls = [
        (file.name, call)
        for file in sorted((tree() / "conversion").glob("*.py"))
        for call in re.findall(r"Auto\w+\.from_pretrained\(([^()]*)\)", file.read_text(encoding="utf-8"))
    ]
    allowed = ("trust_remote_code=self.trust_remote_code", "trust_remote_code=False")
    assert len(calls) > 20 and not [call for call in calls if not any(way in call[1] for way in allowed)]


@pytest.mark.slow
def test_what_upstream_could_take_applies_alone(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "upstream.md").read_text(encoding="utf-8")
    named = {PATCHES / name for name in re.findall(r"^`(\S+\.patch)`$", text, re.MULTILINE)}
    assert named == set(SERIES[: len(named)]) and named
    pin = Upstream.load(PATCHES / "UPSTREAM")
    unpack(runtime.fetch(pin), tmp_path)
    for patch in named:
        subprocess.run(["git", "apply", "--check", str(patch)], cwd=tmp_path / pin.tree, check=True)


@pytest.mark.slow
def test_series_applies_and_exports_to_the_same_bytes() -> None:
    command = [sys.executable, "tools/patches/llamacpp.py", "check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
