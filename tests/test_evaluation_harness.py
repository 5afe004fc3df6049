"""Tasks of lm-evaluation-harness: a task of one's own beside a direct computation, and what is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from mone_export.calibration.eval_callback import Tap
from mone_export.calibration.llama_model import LlamaModel
from mone_export.cli_eval import main
from mone_export.errors import MoneError
from mone_export.evaluation.harness import (
    KIND,
    PAPER,
    language_model,
    measure_harness_task,
    read_harness_tasks,
)
from mone_export.evaluation.results import Evaluation, Measured, TaskResult
from mone_export.evaluation.tasks import is_blind
from mone_export.llama_options import LlamaOptions
from mone_export.source.gguf_file import GgufFile

pytestmark = pytest.mark.upstream

QUESTIONS = (
    ("import os\nimport", ("sys", "the", "of mice and men", "7"), 0),
    ("def read(self) ->", ("apple", "None:", "zzzz"), 1),
    ("for name in", ("names:", "(((", "green", "raise"), 2),
    ("class Base(", ("object):", "with", "and so on", "0"), 3),
    ("return self.", ("x x x", "_value", "of"), 1),
    ("with open(path)", ("as file:", "is the end", "]"), 0),
    ("if not", ("values:", "found:", "the moon", "..."), 1),
    ("raise ValueError(", ("of it", '"no such', "if", "green"), 2),
    ("", ("import", "zzzz"), 0),
)


class Loaded(NamedTuple):
    model: LlamaModel
    source: GgufFile


class Asked(NamedTuple):
    """All that a model is asked: the harness's `Instance` has more."""

    args: tuple[str, ...]


@pytest.fixture(scope="module")
def demo(demo_gguf: Path) -> Iterator[Loaded]:
    pytest.importorskip("lm_eval", reason="pip install 'mone-export[lm-eval]'")
    with LlamaModel(demo_gguf, LlamaOptions()) as model:
        yield Loaded(model, GgufFile(demo_gguf))


def write_task(folder: Path, name: str, **changed: str) -> Path:
    """Write a task in the harness's form, and its questions; returns the YAML file."""
    folder.mkdir(exist_ok=True)
    data = folder / "questions.jsonl"
    rows = [
        {"context": context, "choices": list(choices), "right": right}
        for context, choices, right in QUESTIONS
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": f"{{data_files: {{test: {data}}}}}",
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "'{{context}}'",
        "doc_to_choice": "choices",
        "doc_to_target": "right",
        "metric_list": "[{metric: acc}]",
    }
    path = folder / f"{name}.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in (settings | changed).items()))
    return path


def likely(demo: Loaded, context: str, choice: str) -> tuple[float, bool]:
    """The logarithm of the chance of ` choice` after a context, all logits of the row being computed."""
    reader = demo.source.tokenizer()
    row = [*reader.before, *reader.ids(f"{context} {choice}" if context else f" {choice}")]
    start = len(reader.before) + len(reader.ids(context) if context else [])
    tokens = torch.tensor(row)
    logits = demo.model.logits(tokens, Tap(logits=True), torch.ones(len(row), dtype=torch.bool))
    chances = logits.double().log_softmax(-1)[start - 1 : -1]
    own = chances.gather(1, tokens[start:, None]).sum()
    return float(own), bool((chances.argmax(-1) == tokens[start:]).all())


def test_a_task_of_ones_own_is_answered_as_a_direct_computation_does(demo: Loaded, tmp_path: Path) -> None:
    path = write_task(tmp_path / "mine", "completions")
    (task,) = read_harness_tasks([str(path)])
    steps: list[tuple[int, int]] = []
    found = measure_harness_task(*demo, task, progress=lambda done, total, _: steps.append((done, total)))
    right = [
        int(np.argmax([likely(demo, context, choice)[0] for choice in choices])) == wanted
        for context, choices, wanted in QUESTIONS
    ]
    assert 0 < sum(right) < len(right), "a task that tells right from wrong"
    assert (found.name, found.kind, found.n_question) == ("completions", KIND, len(QUESTIONS))
    assert found.accuracy.value == pytest.approx(np.mean(right))
    assert found.accuracy.error == pytest.approx(np.std(right, ddof=1) / np.sqrt(len(right)))
    assert found.chance == pytest.approx(np.mean([1 / len(choices) for _, choices, _ in QUESTIONS]))
    n_answer = sum(len(choices) for _, choices, _ in QUESTIONS)
    assert steps[-1] == (n_answer, n_answer)
    again = measure_harness_task(*demo, read_harness_tasks([str(tmp_path / "mine")])[0])
    assert again == found, "the folder of the file, and questions that are the same"


def test_a_group_is_one_line(demo: Loaded, tmp_path: Path) -> None:
    for name, right in (("completions", "right"), ("first", "0")):
        write_task(tmp_path, name, doc_to_target=right)
    group = "group: both\ntask: [completions, first]\n"
    tmp_path.joinpath("both.yaml").write_text(group + "aggregate_metric_list: [{metric: acc}]\n")
    (task,) = read_harness_tasks([str(tmp_path)])
    found = measure_harness_task(*demo, task)
    parts = [
        measure_harness_task(*demo, own)
        for name in ("completions", "first")
        for own in read_harness_tasks([str(tmp_path / f"{name}.yaml")])
    ]
    assert (found.name, found.n_question) == ("both", 2 * len(QUESTIONS))
    assert parts[0].accuracy.value != parts[1].accuracy.value
    assert found.accuracy.value == pytest.approx(np.mean([part.accuracy.value for part in parts]))
    assert found.chance == pytest.approx(parts[0].chance) and found.accuracy.error


def test_the_chance_of_an_answer_is_that_of_its_tokens(demo: Loaded) -> None:
    asked = [(context, f" {choice}") for context, choices, _ in QUESTIONS for choice in choices]
    asked += [(context, " self") for context in ("def read(self):\n    return", "not in", "x =")]
    asked += [("if value is", f" {word}") for word in ("None", "not", "in")]  # one row
    found = language_model(*demo).loglikelihood([_instance(*pair) for pair in asked])
    wanted = [likely(demo, context, choice[1:]) for context, choice in asked]
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], rel=1e-4)
    assert {greedy for _, greedy in found} == {True, False}


def test_the_parts_of_a_text_add_up_to_the_whole(demo: Loaded) -> None:
    model, text = language_model(*demo), "def read(self):\n    return self.value\n\nclass Base:\n    pass\n"
    reader = demo.source.tokenizer()
    cuts = [
        at
        for at in range(10, len(text) - 1)
        if not text[at - 1].isspace()
        and reader.ids(text)[: len(reader.ids(text[:at]))] == reader.ids(text[:at])
    ]
    first, second = text[: cuts[0]], text[cuts[0] :]
    parts = model.loglikelihood([_instance("", first), _instance(first, second)])
    (whole,) = model.loglikelihood_rolling([_instance(text)])
    assert whole == pytest.approx(sum(score for score, _ in parts), rel=1e-4) and whole < -1


def test_what_is_longer_than_the_window_loses_its_beginning(demo: Loaded) -> None:
    window = demo.source.header.integer(f"{demo.source.spec.arch}.context_length")
    reader, word = demo.source.tokenizer(), "value = self.value\n"
    long = word * (window // len(reader.ids(word)) + 20)
    model = language_model(*demo)
    pair = (long.rstrip(), "\nfor name in names:")
    ((score, _),) = model.loglikelihood([_instance(*pair)])
    tokens = torch.tensor(reader.ids("".join(pair))[-window - 1 :])
    n = len(_ids(demo, *pair))
    assert len(reader.ids(long)) > window > n > 0
    outputs = torch.arange(window) >= window - n
    chances = demo.model.logits(tokens[:-1], Tap(logits=True), outputs).double().log_softmax(-1)
    assert score == pytest.approx(float(chances.gather(1, tokens[-n:, None]).sum()), rel=1e-4)


def test_a_task_that_needs_writing_is_one_line(demo: Loaded, tmp_path: Path) -> None:
    path = write_task(
        tmp_path, "writing", output_type="generate_until", metric_list="[{metric: exact_match}]"
    )
    with pytest.raises(MoneError, match=r"^writing is no multiple choice \(generate_until\)"):
        read_harness_tasks([str(path)])
    with pytest.raises(MoneError, match="generate_until"):
        language_model(*demo).generate_until([_instance("a")])


@pytest.mark.nightly
def test_the_papers_tasks_are_the_harnesss(demo: Loaded) -> None:
    from lm_eval.tasks import TaskManager

    assert len(PAPER) == 9 and set(PAPER) <= set(TaskManager().all_tasks)


def test_an_empty_name_is_one_line(demo: Loaded) -> None:
    with pytest.raises(MoneError, match="a name between two commas is empty"):
        read_harness_tasks(["arc_easy", ""])


@pytest.mark.parametrize("name", ["nosuchtask", "mine/none.yaml"])
def test_a_task_that_is_not_there_is_one_line(demo: Loaded, name: str) -> None:
    with pytest.raises(
        MoneError, match=f"^lm-eval knows no task {name}, and there is no such file: "
    ) as caught:
        read_harness_tasks([name])
    assert "\n" not in str(caught.value)


@pytest.mark.nightly
def test_data_that_is_not_here_is_one_line_offline(demo: Loaded, demo_gguf: Path, tmp_path: Path) -> None:
    """The settings are read when the libraries are imported, so in a process of its own."""
    words = ("-m", "mone_export.cli_eval", demo_gguf, "--no-speed", "-n", "0", "--lm-eval", "piqa", "-q")
    own = _environment(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path))
    done = subprocess.run([sys.executable, *map(str, words)], env=own, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("mone-eval: lm-eval cannot load piqa: ")


def test_without_the_package_there_is_one_line(
    demo_gguf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main([str(demo_gguf), "--no-speed", "-n", "0", "--lm-eval", "paper", "-q"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pip install 'mone-export[lm-eval]'" in said


def test_the_command_shows_it_beside_the_original(
    demo: Loaded,
    demo_gguf: Path,
    half_gguf: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, kept = write_task(tmp_path, "completions"), tmp_path / "found.json"
    quick = ("-f", text, "--chunks", 1, "-n", 0, "--no-speed", "-q", "-o", kept)
    words = (half_gguf, "--against", demo_gguf, *quick, "--lm-eval", path)
    assert main([str(word) for word in words]) == 0
    printed = capsys.readouterr()
    found = Evaluation.load(kept)
    assert found.against and "lm-eval" in found.made_with and not printed.err
    (original,), (own,) = found.against.tasks, found.files[0].tasks
    assert own.sha256 == original.sha256 and own.kind == KIND
    assert own.blind == original.blind == is_blind(original)
    assert f"{own.accuracy.value:.1%}" in printed.out and f"{own.chance:.1%}" in printed.out


def test_of_a_task_without_known_chance_no_guessing_is_said() -> None:
    task = TaskResult("words", KIND, "", 100, Measured(0.01, 0.01), 0.0)
    assert is_blind(task) and not is_blind(replace(task, chance=None))


def _instance(*args: str) -> Any:
    return Asked(args)


def _ids(demo: Loaded, context: str, continuation: str) -> list[int]:
    reader = demo.source.tokenizer()
    return reader.ids(context + continuation)[len(reader.ids(context)) :]


def _environment(**changed: str) -> dict[str, str]:
    return {**os.environ, **changed}
