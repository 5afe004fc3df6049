"""Tasks of lm-evaluation-harness, answered in this process through llama-cpp-python.

The harness asks how likely each answer is after its question. Texts become tokens by the file's own
tokenizer. A question that is too long for the model loses its beginning; the probabilities are summed in
float64. Tasks for which a model has to write are refused.

Source: `TemplateLM` in lm_eval's `api/model.py`, whose pairs of question and answer become tokens there, and
`HFLM` in its `models/huggingface.py` (0.4.13).
"""

import functools
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from yaml import YAMLError

from mone_export.calibration.eval_callback import Tap
from mone_export.calibration.llama_model import LlamaModel
from mone_export.errors import MoneError, first_line
from mone_export.evaluation.results import Measured, TaskResult
from mone_export.runtime import Progress
from mone_export.source.gguf_file import GgufFile
from mone_export.source.tokenizing import TextReader

KIND = "lm-eval"
# the nine zero-shot tasks of MoNE (arXiv 2507.00390); its code, zxgx/mode-pd, has them in eval_config.sh
PAPER = (*("arc_challenge", "arc_easy", "boolq", "copa", "mmlu", "openbookqa", "piqa", "rte", "winogrande"),)
_SEED = 1234  # the harness's own, of the examples of tasks that show some
_N_BOOTSTRAP = 100  # for other metrics than accuracy, which are not read

Pair = tuple[Sequence[int], Sequence[int]]
"""The tokens of a question, and those of an answer."""


@dataclass(frozen=True, slots=True, eq=False)
class HarnessTask:
    """A task of the harness, or a group of which it gives one accuracy, with its data.

    `loaded` is what the harness's `evaluate` takes, `parts` are the tasks in it.
    """

    name: str
    loaded: Any
    parts: tuple[Any, ...]


def read_harness_tasks(given: Sequence[str], *, progress: Progress | None = None) -> list[HarnessTask]:
    """Load tasks by their names, or those of a YAML file or a folder; `paper` are the nine of MoNE.

    Data that is not on this machine the harness downloads, unless HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is
    set. Raises `MoneError` where the package is missing, for tasks that it does not know or whose data cannot
    be had, and for those that are not answered by choosing.
    """
    if not given:
        return []
    _package()
    names = [own for each in given for own in (PAPER if each == "paper" else (each,))]
    if not all(names):
        raise MoneError(f"--lm-eval {','.join(given)}: a name between two commas is empty, name a task")
    found = list[HarnessTask]()
    for name in names:
        if progress:
            progress(0, 0, f"loading the task {name}")
        found += _read(name)
    return found


def harness_version() -> str:
    """Return the version of the harness, which must be there."""
    import lm_eval

    return str(lm_eval.__version__)


def measure_harness_task(
    model: LlamaModel, source: GgufFile, task: HarnessTask, *, progress: Progress | None = None
) -> TaskResult:
    """Let a loaded model, whose file `source` is, answer all questions of a task.

    The accuracy and its error are the harness's `acc`. Raises `MoneError` where there is none.
    """
    from lm_eval.evaluator import evaluate

    heard = (lambda done, total, _: progress(done, total, f"{task.name} (answers)")) if progress else None
    for part in task.parts:
        if part.config.num_fewshot is None:
            part.set_config("num_fewshot", 0)
        part.set_fewshot_seed(_SEED)
    answering = language_model(model, source, progress=heard)
    with _harness(f"lm-eval cannot run {task.name}"):
        found = evaluate(answering, task.loaded, log_samples=False, bootstrap_iters=_N_BOOTSTRAP)
    numbers = {**found["results"], **found.get("groups", {})}.get(task.name, {})
    name = next((key for key in numbers if key.startswith("acc,")), None)
    if name is None:
        raise MoneError(f"lm-eval gives no accuracy (acc) for {task.name}: pass tasks of multiple choice")
    error = numbers.get(name.replace("acc,", "acc_stderr,"))
    questions, chance, sha256 = _questions(task)
    accuracy = Measured(float(numbers[name]), float(error) if isinstance(error, float) else None)
    return TaskResult(task.name, KIND, sha256, questions, accuracy, chance)


def language_model(model: LlamaModel, source: GgufFile, *, progress: Progress | None = None) -> Any:
    """Return a loaded model as an `lm_eval.api.model.LM`; `generate_until` raises `MoneError`."""
    from lm_eval.api.model import TemplateLM

    scorer = _Scorer(model, source, progress)

    class Answering(TemplateLM):  # type: ignore[misc]
        """What the harness asks."""

        @property
        def eot_token_id(self) -> int:
            """The token that stands before a text."""
            return scorer.prefix

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            """Return the tokens of a text, behind a BOS where the model has one."""
            return scorer.ids(string, begins=add_special_tokens is not False)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            """Return the logarithm of each answer's probability, and whether it is the likeliest text."""
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
            return found

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            return scorer.scores([(question, answer) for _, question, answer in requests])

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
            """Return the logarithm of each text's probability."""
            return [scorer.rolling(request.args[0]) for request in requests]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            """Refuse."""
            raise MoneError(_refused("this task", "generate_until"))

    return Answering()


class _Scorer:
    """Tokens and probabilities of texts by a loaded model."""

    def __init__(self, model: LlamaModel, source: GgufFile, progress: Progress | None) -> None:
        self._model, self._progress = model, progress
        self._reader: TextReader = source.tokenizer()
        before = self._reader.before
        self.prefix = before[0] if before else next(iter(model.end_tokens()), 0)
        arch = source.header.value("general.architecture")
        self._window = source.header.integer(f"{arch}.context_length") or sys.maxsize

    def ids(self, text: str, *, begins: bool) -> list[int]:
        return [*self._reader.before, *self._reader.ids(text)] if begins else self._reader.ids(text)

    def scores(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Return (sum of the answer's log-probabilities, whether each token is the likeliest), by pair.

        Answers that differ in their last token alone are one row. Long rows come first: there is room for the
        others then.
        """
        rows = [self._row(*pair) for pair in pairs]
        order = sorted(range(len(rows)), key=lambda place: (-len(rows[place][0]), rows[place][0]))
        found = [(0.0, False)] * len(rows)
        known, likely = ([0], 0), torch.empty(0)
        for done, place in enumerate(order):
            tokens, answer = rows[place]
            if known != (tokens, len(answer)):
                known, likely = (tokens, len(answer)), self._likely(tokens, len(answer))
            targets = torch.tensor(answer)
            own = likely.gather(1, targets[:, None]).sum()
            found[place] = float(own), bool((likely.argmax(-1) == targets).all())
            if self._progress:
                self._progress(done + 1, len(order), "")
        return found

    def rolling(self, text: str) -> float:
        """Return the logarithm of a text's probability, every window of it as full as it can be."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        ids, longest = self.ids(text, begins=False), self._window
        windows = map(make_disjoint_window, get_rolling_token_windows(ids, self.prefix, longest, 1))
        return sum(score for score, _ in self.scores(list(windows)))

    def _row(self, question: Sequence[int], answer: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the tokens of one row and those that are scored, the last ones and the one after them."""
        n = len(answer)
        if not n:
            raise MoneError("an answer of this task has no token of its own: mend the task's choices")
        if n > self._window:
            raise MoneError(
                f"an answer of {n} tokens does not fit into the model's {self._window}: choose another task"
            )
        tokens = [*(question or [self.prefix]), *answer]
        return tokens[:-1][-self._window :], list(answer)

    def _likely(self, tokens: list[int], n: int) -> Tensor:
        """Return the log-probabilities float64 [n, n_vocab] after the last n tokens."""
        outputs = torch.arange(len(tokens)) >= len(tokens) - n
        logits = self._model.logits(torch.tensor(tokens), Tap(logits=True), outputs)
        if not bool(torch.isfinite(logits).all()):
            raise MoneError("what the model computes of a question is no number: the file is broken")
        return logits.double().log_softmax(-1)


def _read(name: str) -> Iterator[HarnessTask]:
    path = Path(name)
    with _harness(f"lm-eval cannot load {name}"):
        manager = _manager(path if path.is_dir() else None, path.exists())
    names, seen = [name], set[str]()
    if path.is_dir():
        names = [*manager.all_groups, *manager.all_subtasks]
    elif not path.exists() and name not in manager.all_tasks:
        raise MoneError(f"lm-eval knows no task {name}, and there is no such file: check the spelling")
    if not names:
        raise MoneError(f"there is no task in {path}: the harness's own form is a YAML file with `task:`")
    for each in names:
        if each not in seen:
            with _harness(f"lm-eval cannot load {each}"):
                loaded = manager.load([each])
            seen.update(loaded["tasks"], loaded["groups"])
            yield from _asked(each, loaded)


def _asked(name: str, loaded: Any) -> Iterator[HarnessTask]:
    """Yield what has an accuracy of its own: a group, or each task of a tag or a file."""
    parts = loaded["tasks"]
    for part in parts.values():
        if part.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
            raise MoneError(_refused(part.task_name, part.OUTPUT_TYPE))
    if name in loaded["groups"]:
        yield HarnessTask(name, loaded, tuple(parts.values()))
        return
    for own, part in parts.items():
        yield HarnessTask(own, {"tasks": {own: part}, "groups": {}}, (part,))


@functools.cache
def _manager(folder: Path | None, own: bool) -> Any:
    """Return what knows the tasks of a folder, of the harness, or none where a file says it all."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=not own)


def _refused(task: str, what: str) -> str:
    return f"{task} is no multiple choice ({what}), which is all that mone-eval asks: leave it out"


def _package() -> None:
    """Import the package, so that its absence is said before anything is measured."""
    try:
        import datasets
        import lm_eval.tasks
    except ImportError as error:
        raise MoneError(
            f"--lm-eval needs lm-evaluation-harness ({first_line(error)}): pip install 'mone-export[lm-eval]'"
        ) from None
    datasets.disable_progress_bars()
    assert lm_eval.tasks


@contextmanager
def _harness(what: str) -> Iterator[None]:
    """Keep the harness from drawing bars, and make one line of what it raises."""
    from datasets.exceptions import DatasetsError
    from lm_eval.api import task as asking

    problems = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, AssertionError)
    before: Callable[..., Any] = asking.tqdm
    asking.tqdm = lambda documents, **_: documents
    try:
        yield
    except (*problems, ImportError, ZeroDivisionError, DatasetsError, TemplateError, YAMLError) as error:
        raise MoneError(f"{what}: {first_line(error)}; its data must be here, or within reach") from None
    finally:
        asking.tqdm = before


def _questions(task: HarnessTask) -> tuple[int, float | None, str]:
    """Return how many questions were asked, what guessing gets right if that is known, and their SHA-256.

    Guessing is right as often as there are right answers among the choices.
    """
    shares, digest = list[float](), hashlib.sha256()
    chosen = all(part.OUTPUT_TYPE == "multiple_choice" for part in task.parts)
    for part in task.parts:
        n_answer = Counter(instance.doc_id for instance in part.instances)
        documents = {instance.doc_id: instance.doc for instance in part.instances}
        for instance in part.instances:
            digest.update(json.dumps(instance.args, default=str).encode())
        for number, document in documents.items():
            right = part.doc_to_target(document)
            digest.update(json.dumps(right, default=str).encode())
            shares.append((len(right) if isinstance(right, list) else 1) / n_answer[number])
    return len(shares), sum(shares) / len(shares) if chosen else None, digest.hexdigest()
