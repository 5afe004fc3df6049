"""Multiple choice: every format of llama.cpp's, a direct computation beside one, and the guard."""

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mone_export.calibration.eval_callback import Tap
from mone_export.calibration.llama_model import LlamaModel
from mone_export.errors import MoneError
from mone_export.evaluation import tasks as asking
from mone_export.evaluation.results import Measured, TaskResult
from mone_export.evaluation.tasks import is_blind, measure_task, read_task
from mone_export.llama_options import LlamaOptions
from mone_export.source.gguf_file import GgufFile

OPENINGS = ("import", "for key in", "class Base", "return self.", "def read", "with open", "if not", "raise")
ENDINGS = (
    "os and sys",
    "the green apple",
    "values:",
    "(path)",
    "name, value",
    "of mice",
    "zzzz",
    "self.close()",
)


def questions(n: int = 24, n_answer: int = 4) -> list[tuple[str, list[str], int]]:
    """(context, answers, which is right), drawn at random: nobody knows them."""
    rng = np.random.default_rng(0)
    return [
        (
            " ".join(rng.choice(OPENINGS, 2)),
            [str(ending) for ending in rng.choice(ENDINGS, n_answer, replace=False)],
            int(rng.integers(n_answer)),
        )
        for _ in range(n)
    ]


def hellaswag(folder: Path) -> Path:
    lines = [[context, str(right), *answers] for context, answers, right in questions()]
    path = folder / "swag.txt"
    path.write_text("".join(f"{line}\n" for question in lines for line in question))
    return path


def winogrande(folder: Path) -> Path:
    rows = [
        f'{number},"{context}, then _ and {context}",{answers[0]},{answers[1]},{right % 2 + 1}\n'
        for number, (context, answers, right) in enumerate(questions(n_answer=2))
        if not any("," in answer for answer in answers)
    ]
    path = folder / "winogrande.csv"
    path.write_text("".join(rows))
    return path


def multiple_choice(folder: Path) -> Path:
    """Questions of two to five answers."""

    def text(value: str) -> bytes:
        return struct.pack("<I", len(value)) + value.encode()

    def choice(answers: list[str], right: int) -> bytes:
        labels = [int(place == right) for place in range(len(answers))]
        texts = b"".join(map(text, answers))
        return struct.pack("<I", len(answers)) + texts + struct.pack(f"<{len(answers)}i", *labels)

    tasks = [
        text(context) + choice(answers, right) + choice([], 0)
        for n_answer in (2, 3, 4, 5)
        for context, answers, right in questions(6, n_answer)
    ]
    starts = np.cumsum([4 + 4 * len(tasks), *map(len, tasks)])[:-1].tolist()
    path = folder / "choice.bin"
    path.write_bytes(struct.pack(f"<{len(tasks) + 1}I", len(tasks), *starts) + b"".join(tasks))
    return path


MAKERS: dict[str, Callable[[Path], Path]] = {
    "hellaswag": hellaswag,
    "winogrande": winogrande,
    "multiple-choice": multiple_choice,
}


def directly(file: Path, asked: list[tuple[str, list[str], int]]) -> float:
    """The share of questions answered rightly, by the chances of the tokens that not all answers share."""
    reader, n_right = GgufFile(file).tokenizer(), 0
    with LlamaModel(file, LlamaOptions()) as model:
        for context, answers, right in asked:
            rows = [[*reader.before, *reader.ids(f"{context} {answer}")] for answer in answers]
            shared = next(at for at in range(99) if len({tuple(row[: at + 1]) for row in rows}) > 1)
            scores = []
            for row in rows:
                tokens = torch.tensor(row)
                outputs = torch.arange(len(row)) >= shared - 1
                outputs[-1] = False
                likely = model.logits(tokens, Tap(logits=True), outputs).log_softmax(-1)
                scores.append(float(likely.gather(1, tokens[shared:, None]).mean()))
            n_right += int(np.argmax(scores)) == right
    return n_right / len(asked)


@pytest.mark.upstream
@pytest.mark.parametrize("kind", MAKERS)
def test_a_task_is_recognised_and_answered(kind: str, demo_gguf: Path, tmp_path: Path) -> None:
    path = MAKERS[kind](tmp_path)
    task = read_task(str(path))
    assert task == read_task(f"{kind}={path}") and task.kind == kind
    found = measure_task(demo_gguf, task, LlamaOptions())
    chance = {"hellaswag": 1 / 4, "winogrande": 1 / 2}.get(kind, (1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 4)
    assert found.n_question == len(task.n_answer) > 15 and found.chance == pytest.approx(chance)
    right, n = found.accuracy.value, found.n_question
    assert right * n == pytest.approx(round(right * n), abs=1e-4)
    assert found.accuracy.error == pytest.approx(np.sqrt(right * (1 - right) / (n - 1)))
    if kind != "winogrande":  # which scores the words after the answer in a way of its own
        several = [each for n_answer in (2, 3, 4, 5) for each in questions(6, n_answer)]
        assert right == pytest.approx(directly(demo_gguf, questions() if kind == "hellaswag" else several))


def test_a_task_that_runs_again_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The program's last line is lost the first time; where it always is, the sixth time is the last."""
    task = read_task(str(hellaswag(tmp_path)))
    n = len(task.n_answer)
    lines = [f"{number}\t50.00000000%\t[30.0%, 70.0%]\n" for number in range(1, n + 1)]
    printed = iter(["".join(lines[:-1]), "".join(lines)])
    monkeypatch.setattr(asking, "run_program", lambda *_: (next(printed), 0))
    with caplog.at_level("INFO", "mone_export"):
        assert measure_task(tmp_path, task, LlamaOptions()).accuracy.value == 0.5
    (said,) = caplog.messages
    assert f"of swag.txt it printed {n - 1} of {n} answers, so it runs once more" in said
    caplog.clear()
    monkeypatch.setattr(asking, "run_program", lambda *_: ("", 0))
    with (
        caplog.at_level("INFO", "mone_export"),
        pytest.raises(MoneError, match=f"answered 0 of {n} questions"),
    ):
        measure_task(tmp_path, task, LlamaOptions())
    assert len(caplog.messages) == 5, "none runs after the last"


def test_an_original_at_chance_says_nothing() -> None:
    def found(value: float, chance: float = 0.25, n: int = 101) -> TaskResult:
        error = (value * (1 - value) / (n - 1)) ** 0.5
        return TaskResult("t", "hellaswag", "", n, Measured(value, error), chance)

    assert is_blind(found(0.25)) and is_blind(found(0.33)) and is_blind(found(0.17))
    assert not is_blind(found(0.40)) and not is_blind(found(0.10))
    assert is_blind(replace(found(0.5, 0.5), n_question=1, accuracy=Measured(1.0)))


@pytest.mark.parametrize(
    ("given", "content", "reason"),
    [
        ("{}", b"no task at all\n", "is no task of hellaswag, winogrande, multiple-choice"),
        ("hellaswag={}", b"a\n0\nb\nc\nd\n", r"no hellaswag task \(5 lines are no multiple of 6"),
        ("hellaswag={}", b"a\n4\nb\nc\nd\ne\n", "question 1 has the label '4', not 0 to 3"),
        ("winogrande={}", b"0,a b,c,d,1\n", "line 1 is not NUMBER,SENTENCE WITH _"),
        ("winogrande={}", b"0,a _ b,c,d,1", "its last line has no end"),
        ("multiple-choice={}", struct.pack("<I", 2**31), "it announces 2147483648 questions"),
        ("swag={}", b"", "a kind is one of hellaswag, winogrande, multiple-choice"),
        ("{}x", b"", r"cannot read the task .* \(No such file or directory\): name a file"),
    ],
)
def test_what_is_no_task_is_refused_in_one_line(
    given: str, content: bytes, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "task"
    path.write_bytes(content)
    with pytest.raises(MoneError, match=reason) as raised:
        read_task(given.format(path))
    assert "\n" not in str(raised.value)


def test_a_cut_file_is_no_task(tmp_path: Path) -> None:
    path = multiple_choice(tmp_path)
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(MoneError, match="is no"):
            read_task(f"multiple-choice={path}")
