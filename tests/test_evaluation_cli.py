"""The `mone-eval` command: its table and JSON, and what it refuses in one line."""

import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf_models import dense_gguf
from gguf_parts import key, put_together, taken_apart

from mone_export import cli_eval
from mone_export.cli_eval import main
from mone_export.errors import MoneError
from mone_export.evaluation import evaluate as evaluating
from mone_export.evaluation.results import Evaluation
from mone_export.terminal import as_size

pytestmark = pytest.mark.upstream

QUICK = ("--chunks", "1", "-n", "0", "--no-speed", "-q")
ROOT = Path(__file__).parents[1]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: object) -> tuple[int, str, str]:
        status = main([str(word) for word in words])
        return status, *capsys.readouterr()

    return call


def test_files_on_texts_are_one_table_and_json(
    run: Run, demo_gguf: Path, half_gguf: Path, text: Path, tmp_path: Path
) -> None:
    other = tmp_path / "readme.md"
    other.write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    kept = tmp_path / "found.json"
    texts = ("-f", f"sources={text}", "-f", other)
    status, out, err = run(half_gguf, demo_gguf, "--against", demo_gguf, *texts, *QUICK, "-o", kept, "-n", 4)
    assert status == 0, err
    found = Evaluation.load(kept)
    assert found.against and [text.name for text in found.against.texts] == ["sources", "readme.md"]
    half, whole = found.files
    assert half.file == str(half_gguf) and half.size == half_gguf.stat().st_size
    for ours, theirs in zip(whole.texts, found.against.texts, strict=True):
        assert ours.perplexity == theirs.perplexity and ours.kl_mean and ours.kl_mean.value == 0
    pairs = {pair.text: pair for pair in found.pairs}
    for own in half.texts:
        pair = pairs[own.name]
        assert own.kl_mean and own.kl_mean.value > 0 and pair.kl_mean
        assert pair.kl_mean.value == pytest.approx(own.kl_mean.value)
        assert f"{own.perplexity.value:.0f}"[:2] in out
    assert half.probe and not whole.probe.differing and half.probe.n_new == 4  # type: ignore[union-attr]
    assert "0.0% in" not in out and "few for the 99.9% quantile" in out
    assert found.command.startswith("mone-eval ") and shlex.split(found.command)[-1] == "4"
    assert half.prefill is None and half.resident is None


def test_speed_and_memory(run: Run, half_gguf: Path, text: Path, tmp_path: Path) -> None:
    kept = tmp_path / "found.json"
    status, out, err = run(half_gguf, "-f", text, "--chunks", 1, "-n", 0, "-q", "-o", kept, "-t", 1)
    assert status == 0, err
    (found,) = Evaluation.load(kept).files
    assert found.prefill and found.decode and found.resident
    assert found.prefill.value > found.decode.value > 0
    assert found.resident > found.size, "a process that holds the file"
    assert found.resident < 2**30, "of this small one, not of ours with PyTorch in it"
    assert as_size(found.resident) in out


def test_a_task_the_original_guesses_at_says_nothing(
    run: Run, demo_gguf: Path, half_gguf: Path, text: Path, tmp_path: Path
) -> None:
    """Each of the same four endings is right as often."""
    kept, swag = tmp_path / "found.json", tmp_path / "swag.txt"
    endings = "\n".join(("the end", "of it all", "and so on", "or not"))
    swag.write_text("".join(f"It is number {n}\n{n % 4}\n{endings}\n" for n in range(20)))
    status, out, err = run(half_gguf, "--against", demo_gguf, "-f", text, *QUICK, "--tasks", swag, "-o", kept)
    assert status == 0, err
    found = Evaluation.load(kept)
    assert found.against
    original, own = (each.tasks[0] for each in (found.against, found.files[0]))
    assert abs(original.accuracy.value - 0.25) < 2 * np.sqrt(0.25 * 0.75 / 20)
    assert original.blind and own.blind and own.n_question == 20
    assert len(re.findall(r"^swag.txt .*25.0% +the original is at chance", out, re.MULTILINE)) == 2
    assert "note     swag.txt: the original is within two standard errors of chance" in out


def test_without_texts_the_table_says_which_they_are(run: Run, half_gguf: Path) -> None:
    status, out, _ = run(half_gguf, *QUICK)
    assert status == 0 and "Python's own sources" in out
    assert re.search(r"^built-in python +demo-half.gguf", out, re.MULTILINE)
    assert re.search(r"^built-in prose +demo-half.gguf", out, re.MULTILINE)


def test_a_model_without_experts_is_measured_too(run: Run, text: Path, tmp_path: Path) -> None:
    dense, kept = dense_gguf(tmp_path), tmp_path / "found.json"
    dense.write_bytes(put_together(taken_apart(dense).having(context_length=128)))
    given = ("--against", dense, "-f", text, *QUICK, "-n", 4, "-c", 256)
    status, out, err = run(dense, *given, "-o", kept)
    assert status == 0, err
    (found,) = Evaluation.load(kept).files
    assert found.texts[0].perplexity.value > 1 and not found.texts[0].slots and found.probe
    assert found.texts[0].kl_mean and found.texts[0].kl_mean.value == 0
    assert re.search(
        r"^note +no shares of slots: .*llama-dense.gguf \(llama\) has no experts", out, re.MULTILINE
    )
    assert re.search(
        r"^note +.*llama-dense.gguf was made for 128 tokens, --ctx-size is 256", out, re.MULTILINE
    )


def test_what_was_measured_outlives_a_page_that_cannot_be_written(
    run: Run, half_gguf: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MoneError("cannot write page.html (No space left on device)")

    kept, page = tmp_path / "found.json", tmp_path / "page.html"
    monkeypatch.setattr("mone_export.publishing.publishing.publish_evaluation", full)
    status, out, err = run(half_gguf, "-f", text, *QUICK, "-o", kept, "--report", page)
    assert status == 1 and err == "mone-eval: cannot write page.html (No space left on device)\n"
    found = Evaluation.load(kept)
    row = re.search(rf"^{text.name} +demo-half.gguf +([\d.]+)", out, re.MULTILINE)
    assert row and float(row[1]) == pytest.approx(found.files[0].texts[0].perplexity.value, rel=0.01)
    monkeypatch.setattr(evaluating, "evaluate", lambda *_, **__: found)
    monkeypatch.setattr(Evaluation, "save", full)
    again = run(half_gguf, "-f", text, *QUICK, "-o", tmp_path / "other.json")
    assert again == (1, out, err), "the table is there even if the JSON is not"


def failure(run: Run, *words: object) -> str:
    """The one line that a run ends with."""
    status, out, err = run(*words)
    assert status == 1 and not out, (status, out, err)
    (line,) = err.splitlines()
    assert line.startswith("mone-eval: ")
    return line


def test_what_cannot_be_measured_is_one_line(run: Run, half_gguf: Path, text: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A few words.\n")
    assert "is no GGUF: pass one" in failure(run, text, *QUICK)
    assert re.search(
        r"short.txt has \d+ tokens, one chunk takes 512: add text or lower",
        failure(run, half_gguf, "-f", short, *QUICK),
    )
    assert "two texts are called t" in failure(run, half_gguf, "-f", f"t={text}", "-f", f"t={text}", *QUICK)
    assert "does not exist" in failure(run, half_gguf, *QUICK, "-o", tmp_path / "no" / "found.json")
    assert "would replace what is read" in failure(run, half_gguf, *QUICK, "-o", half_gguf)
    assert "-ub 4 for 7 rows" in failure(run, half_gguf, "-f", text, *QUICK, "-n", 4, "-ub", 4)
    assert "is a folder: make its GGUF with" in failure(run, tmp_path, *QUICK)
    assert "there is no file" in failure(run, tmp_path / "none.gguf", *QUICK)
    assert "is no task of" in failure(run, half_gguf, *QUICK, "--tasks", short)
    assert "--chunks 0" in failure(run, half_gguf, *QUICK, "--chunks", 0)


def test_a_probe_that_cannot_run_is_refused_before_anything_does(
    run: Run, half_gguf: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluating, "LlamaModel", lambda *_: pytest.fail("loaded"))
    given = (half_gguf, "-f", text, "--chunks", 8, "--no-speed", "-q")
    assert "--n-predict -1: continuations have an end here, pass a" in failure(run, *given, "-n", -1)
    assert "-ub 16 for 32 rows at a time: pass 32 or more, or -n 0" in failure(run, *given, "-ub", 16)
    assert "-b 31 for 32 rows at a time: pass 32 or more, or -n 0" in failure(run, *given, "-b", 31)
    assert "-ub 0 for 1 rows at a time: pass 1 or more" in failure(run, *given, "-n", 0, "-ub", 0)


def test_files_of_other_vocabularies_are_refused(run: Run, half_gguf: Path, tmp_path: Path) -> None:
    parts = taken_apart(half_gguf)
    other = tmp_path / "other.gguf"
    tokens = key("tokenizer.ggml.tokens", [f"t{number}" for number in range(4096)])
    other.write_bytes(
        put_together(type(parts)({**parts.keys, "tokenizer.ggml.tokens": tokens}, parts.tensors))
    )
    assert "other.gguf and demo-half.gguf have different vocabularies" in failure(
        run, other, "--against", half_gguf, *QUICK
    )


def test_a_missing_build_is_said_before_anything_is_measured(
    run: Run, half_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Path:
        raise MoneError("no llama.cpp for this CPU: run `mone-llama build`")

    monkeypatch.setattr(evaluating, "find_programs", missing)
    assert "run `mone-llama build`" in failure(run, half_gguf, "-q")


def test_a_model_whose_numbers_are_none_is_refused(
    run: Run, half_gguf: Path, text: Path, tmp_path: Path
) -> None:
    parts = taken_apart(half_gguf)
    name = "output_norm.weight"
    stored = parts.tensors[name]
    nothing = bytes.fromhex("0000c07f") * (len(stored.data) // 4)
    broken = tmp_path / "broken.gguf"
    tensors = {**parts.tensors, name: type(stored)(stored.kind, stored.shape, nothing)}
    broken.write_bytes(put_together(type(parts)(parts.keys, tensors)))
    assert "is no number: the file is broken" in failure(run, broken, "-f", text, *QUICK)


def test_interrupted_is_one_line(run: Run, half_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> Evaluation:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluating, "evaluate", interrupted)
    assert run(half_gguf, *QUICK)[0] == 130


def test_help_is_fast_and_names_every_option_of_the_page() -> None:
    code = "import sys, mone_export.cli_eval as cli; cli.make_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    words = cli_eval.make_parser().format_help()
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for option in set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", " ".join(re.findall(r"`(-[^`]+)`", page)))):
        assert option in words or option in ("-like",), option


@pytest.mark.slow
@pytest.mark.nightly
def test_the_pages_commands_work_on_the_demo(tmp_path: Path, text: Path) -> None:
    (tmp_path / "my-text.txt").write_bytes(text.read_bytes())
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (task,), (question,) = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("yaml", "json"))
    (tmp_path / "chemistry.yaml").write_text(task)
    (tmp_path / "chemistry.jsonl").write_text(question * 20)
    lines = [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert len(lines) == 6
    modules = {"mone-export": "mone_export", "mone-eval": "mone_export.cli_eval"}
    for line in lines:
        program, *words = shlex.split(line)
        start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", modules[program], *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"{line}: {time.monotonic() - start:.0f} s, {busy:.0f} s of CPU\n{done.stdout}")
        assert "--lm-eval" not in line or len(re.findall("^chemistry .*(100|0).0%", done.stdout, re.M)) == 2
        assert busy < 2 * 180, "three minutes on two cores; others may be busy beside"
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "mine Measured" in done.stdout, done.stderr
