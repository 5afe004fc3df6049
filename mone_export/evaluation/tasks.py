"""Multiple choice, by the build's llama-perplexity and in the formats of llama.cpp's own.

- hellaswag: six lines each: the context, the number of the right ending from 0, four endings
- winogrande: a line each: its number, a sentence with `_` in it, two words for that, which is right (1 or 2)
- multiple-choice: binary; questions with their answers, of which one is right

Accuracy comes with its standard error. Where the original itself does no better than guessing, a task says
nothing about what pruning has done to it.

Source: `hellaswag_score`, `load_winogrande_from_csv`, `multiple_choice_task` in llama.cpp's
`tools/perplexity/perplexity.cpp`.
"""

import csv
import hashlib
import logging
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mone_export.errors import MoneError
from mone_export.evaluation.results import Measured, TaskResult
from mone_export.evaluation.speed import run_program
from mone_export.llama_options import LlamaOptions
from mone_export.runtime import Progress

log = logging.getLogger(__name__)

KINDS = ("hellaswag", "winogrande", "multiple-choice")
_BLIND = 2  # standard errors
_N_TRY = 6
_SCORES = {  # the last line with the share that is right so far, in percent
    "hellaswag": re.compile(r"^(\d+)\s+([\d.]+)%\s+\[", re.MULTILINE),
    "winogrande": re.compile(r"^(\d+)\s+([\d.]+)\s+-?[\w.]+\s+-?[\w.]+\s+[12]\s+[12]\s*$", re.MULTILINE),
    "multiple-choice": re.compile(r"^(\d+)\s+([\d.]+)\s*$", re.MULTILINE),
}


@dataclass(frozen=True, slots=True)
class Task:
    """A file of questions: of which kind, and how many answers each has."""

    name: str
    path: Path
    kind: str
    n_answer: tuple[int, ...]
    sha256: str

    @property
    def chance(self) -> float:
        """The share that guessing gets right."""
        return sum(1 / n for n in self.n_answer) / len(self.n_answer)


def read_task(given: str) -> Task:
    """Read what `PATH` or `KIND=PATH` names; without its kind, that is told by what the file holds.

    Raises `MoneError` for a file that cannot be read or has none of the formats.
    """
    named, equals, rest = given.partition("=")
    named, path = (named, Path(rest)) if equals and not Path(given).exists() else ("", Path(given))
    if named and named not in KINDS:
        raise MoneError(f"--tasks {given}: a kind is one of {', '.join(KINDS)}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MoneError(f"cannot read the task {path} ({error.strerror}): name a file") from None
    reasons = {}
    for kind in (named,) if named else KINDS:
        try:
            n_answer = _READERS[kind](content)
        except (ValueError, IndexError, struct.error) as error:
            reasons[kind] = str(error)
            continue
        return Task(path.name, path, kind, tuple(n_answer), hashlib.sha256(content).hexdigest())
    reason = f"no {named} task ({reasons[named]})" if named else f"no task of {', '.join(KINDS)}"
    raise MoneError(f"{path} is {reason}: see docs/evaluation.md for the formats")


def measure_task(
    file: Path, task: Task, options: LlamaOptions, *, progress: Progress | None = None
) -> TaskResult:
    """Let a file answer all questions of a task; raises `MoneError` with llama-perplexity's reason."""
    n = len(task.n_answer)
    if progress:
        progress(0, 0, f"answering {task.name}")
    given = (f"--{task.kind}", f"--{task.kind}-tasks", n, "-bf", task.path, "-np", max(task.n_answer))
    for number in range(1, _N_TRY + 1):
        output, _ = run_program("llama-perplexity", file, options, *given)
        found = _SCORES[task.kind].findall(output)
        answered = int(found[-1][0]) if found else 0
        if answered == n:
            break
        if number < _N_TRY:
            log.info(
                "llama-perplexity's last lines can get lost: of %s it printed %d of %d answers, so it runs "
                "once more",
                *(task.name, answered, n),
            )
    else:
        raise MoneError(
            f"llama-perplexity answered {answered} of {n} questions of {task.path}: leave out those that are "
            "too long for it"
        )
    right = float(found[-1][1]) / 100
    error = (right * (1 - right) / (n - 1)) ** 0.5 if n > 1 else None
    return TaskResult(task.name, task.kind, task.sha256, n, Measured(right, error), task.chance)


def is_blind(original: TaskResult) -> bool:
    """Say whether the original may be guessing: within two standard errors of chance.

    Of a task whose chance is not known this cannot be said.
    """
    chance, n = original.chance, original.n_question
    if chance is None:
        return False
    error = max(original.accuracy.error or 0, (chance * (1 - chance) / n) ** 0.5)
    return bool(abs(original.accuracy.value - chance) <= _BLIND * error)


def _hellaswag(content: bytes) -> list[int]:
    lines = content.decode().removesuffix("\n").split("\n")
    if len(lines) % 6 or not all(lines):
        raise ValueError(f"{len(lines)} lines are no multiple of 6, or one is empty")
    for number, label in enumerate(lines[1::6], start=1):
        if label.strip() not in ("0", "1", "2", "3"):
            raise ValueError(f"question {number} has the label {label[:20]!r}, not 0 to 3")
    return [4] * (len(lines) // 6)


def _winogrande(content: bytes) -> list[int]:
    if not content.endswith(b"\n"):
        raise ValueError("its last line has no end, llama-perplexity would not read it: add one")
    rows = list(csv.reader(content.decode().splitlines()))
    for number, row in enumerate(rows, start=1):
        if len(row) != 5 or "_" not in row[1] or row[4].strip() not in ("1", "2"):
            raise ValueError(f"line {number} is not NUMBER,SENTENCE WITH _,WORD,WORD,1 OR 2")
    if not rows:
        raise ValueError("it is empty")
    return [2] * len(rows)


def _multiple_choice(content: bytes) -> list[int]:
    (n_task,) = struct.unpack_from("<I", content)
    if not 0 < n_task <= len(content) // 8:
        raise ValueError(f"it announces {n_task} questions")
    at, found = 4 + 4 * n_task, list[int]()
    for _ in range(n_task):
        at = _past_text(content, at)
        counts = []
        for _ in range(2):  # answers of which one is right, and of which several are
            (n,) = struct.unpack_from("<I", content, at)
            at += 4
            for _ in range(n):
                at = _past_text(content, at)
            labels: Sequence[int] = struct.unpack_from(f"<{n}i", content, at)
            at += 4 * n
            counts.append((n, sum(label == 1 for label in labels)))
        if counts[0][0] < 2 or counts[0][1] != 1:
            raise ValueError(
                f"question {len(found) + 1} has {counts[0][0]} answers, {counts[0][1]} of them right"
            )
        found.append(counts[0][0])
    if at != len(content):
        raise ValueError(f"its questions end at {at} of {len(content)} bytes")
    return found


def _past_text(content: bytes, at: int) -> int:
    end = at + 4 + int(struct.unpack_from("<I", content, at)[0])
    if end > len(content):
        raise ValueError(f"a text ends at {end} of {len(content)} bytes")
    return end


_READERS = {"hellaswag": _hellaswag, "winogrande": _winogrande, "multiple-choice": _multiple_choice}
