"""The measurements of `mone-eval` in their order: the original, each file, the original once more.

One model is in memory at a time. The original comes first and leaves what the files are compared with; what
they have written is shown to it in the end.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mone_export import __version__
from mone_export.calibration.llama_model import LlamaModel
from mone_export.errors import MoneError
from mone_export.evaluation.harness import (
    HarnessTask,
    harness_version,
    measure_harness_task,
    read_harness_tasks,
)
from mone_export.evaluation.predictions import Fates, Originals, Predictions, paired, predict
from mone_export.evaluation.probe import Prompts, Said, cost, make_prompts, probe, result
from mone_export.evaluation.results import Evaluation, FileResult, Pair, TaskResult
from mone_export.evaluation.slots import fates_by_slot
from mone_export.evaluation.speed import measure_speed
from mone_export.evaluation.tasks import Task, is_blind, measure_task, read_task
from mone_export.evaluation.texts import Text, read_texts
from mone_export.llama_options import LlamaOptions
from mone_export.runtime import Progress
from mone_export.runtime import path as find_programs
from mone_export.source.gguf_file import GgufFile

_FEW = 10  # predictions beyond the last quantile, below which it says little


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is measured: texts in chunks, the probe, the speed, tasks.

    A text is `NAME=PATH` or a path; without any, the built-in ones are read. `field` is where records hold
    their text. `n_predict` are the tokens of a continuation of the probe; 0 leaves it out. `tasks` are files
    in llama.cpp's formats, `lm_eval` tasks of lm-evaluation-harness.
    """

    texts: Sequence[str] = ()
    field: str = "text"
    n_ctx: int = 512
    n_chunk: int = 40
    n_predict: int = 128
    speed: bool = True
    tasks: Sequence[str] = ()
    lm_eval: Sequence[str] = ()
    llama: LlamaOptions = LlamaOptions()


def evaluate(
    files: Sequence[Path],
    wanted: Wanted,
    *,
    against: Path | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Evaluation:
    """Measure files, and compare them with the original `against`, and with each other.

    Raises `MoneError` for what cannot be measured: no GGUF, files of different vocabularies, a text that is
    too short, a missing build, a probe without end or of more rows than fit into a batch.
    """
    if wanted.n_predict < 0:
        raise MoneError(
            f"--n-predict {wanted.n_predict}: continuations have an end here, pass a number of tokens; 0 "
            "leaves them out"
        )
    sources = _named([*([against] if against else []), *files])
    tasks = [read_task(given) for given in wanted.tasks]
    harness = read_harness_tasks(wanted.lm_eval, progress=progress)
    if wanted.speed or tasks:
        find_programs()
    reader = next(iter(sources.values())).tokenizer()
    texts = read_texts(wanted.texts, reader, n_ctx=wanted.n_ctx, n_chunk=wanted.n_chunk, field=wanted.field)
    prompts = make_prompts(texts, reader) if wanted.n_predict else None
    _check_batch(wanted.llama, len(prompts.rows) if prompts else 1)
    run = _Run(texts, prompts, (tasks, harness), wanted, progress)
    measured = run.all(sources, against=against is not None)
    return Evaluation(
        files=tuple(each.found for each in measured[bool(against) :]),
        against=measured[0].found if against else None,
        pairs=tuple(_pairs(measured[bool(against) :])),
        command=command,
        made_with=run.made_with,
        warnings=tuple(dict.fromkeys(run.warnings)),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Done:
    """A file with what was measured of it; `strange` is what its continuations cost the original."""

    source: GgufFile
    found: FileResult
    predictions: list[Predictions]
    said: Said | None
    strange: np.ndarray | None = None


class _Run:
    """Measures one file after the other, on the same texts, prompts and tasks."""

    def __init__(
        self,
        texts: list[Text],
        prompts: Prompts | None,
        tasks: tuple[list[Task], list[HarnessTask]],
        wanted: Wanted,
        progress: Progress | None,
    ) -> None:
        self._texts, self._prompts = texts, prompts
        self._tasks, self._harness = tasks
        self._wanted, self._progress = wanted, progress
        self.made_with = {"mone-export": __version__}
        if self._harness:
            self.made_with["lm-eval"] = harness_version()
        self.warnings: list[str] = []

    def all(self, sources: Mapping[str, GgufFile], *, against: bool) -> list[_Done]:
        """Measure all files; with `against`, the first is the original of the others."""
        for text in self._texts:
            if against and text.targets.size < 1000 * _FEW:
                self.warnings.append(
                    f"{text.name}: {text.targets.size} predictions are few for the 99.9% quantile, "
                    f"{1000 * _FEW} would do: pass more text or --chunks"
                )
        done: list[_Done] = []
        with ExitStack() as stack:
            kept = None
            for name, source in sources.items():
                with LlamaModel(source.files[0], self._wanted.llama) as model:
                    self.made_with["llama-cpp-python"] = model.version
                    first = against and kept is None
                    if first:
                        kept = Originals(self._texts, model.n_vocab)
                        stack.callback(kept.close)
                    done.append(self._inside(name, source, model, kept, first=first))
        if against and self._prompts and len(done) > 1:
            done = self._shown(done)
        outside = [self._outside(each) for each in done]
        return [self._concluded(each, outside[0] if against else None) for each in outside]

    def _inside(
        self, name: str, source: GgufFile, model: LlamaModel, kept: Originals | None, *, first: bool
    ) -> _Done:
        """Measure what a loaded model predicts and writes; `first`: it is the original, `kept` its own."""
        heard = self._heard(name)
        fates = self._fates(name, source)
        predictions = [
            predict(
                model,
                text,
                fates,
                keep=kept if first else None,
                against=None if first else kept,
                progress=heard,
            )
            for text in self._texts
        ]
        if missing := sorted(fates.keys() - predictions[0].slots.keys()):
            self.warnings.append(f"{name}: llama.cpp does not show the experts of layers {missing}")
        said = None
        if self._prompts:
            said = probe(model, self._prompts, n_new=self._wanted.n_predict, progress=heard)
        found = FileResult(
            file=name,
            size=sum(file.stat().st_size for file in source.files),
            sha256=source.fingerprint(progress=heard),
            texts=tuple(each.result() for each in predictions),
            tasks=tuple(measure_harness_task(model, source, task, progress=heard) for task in self._harness),
        )
        return _Done(source, found, predictions, said)

    def _shown(self, done: list[_Done]) -> list[_Done]:
        """Show the original what the files have written."""
        original, *files = done
        with LlamaModel(original.source.files[0], self._wanted.llama) as model:
            heard = self._heard(original.found.file)
            costs = [cost(model, each.said, progress=heard) for each in files if each.said]
        return [original, *(replace(each, strange=own) for each, own in zip(files, costs, strict=True))]

    def _outside(self, each: _Done) -> _Done:
        """Measure what programs do with a file: speed, memory, tasks."""
        file, heard, llama = each.source.files[0], self._heard(each.found.file), self._wanted.llama
        found = each.found
        if self._wanted.speed:
            speed = measure_speed(file, llama, progress=heard)
            found = replace(found, prefill=speed.prefill, decode=speed.decode, resident=speed.resident)
        tasks = tuple(measure_task(file, task, llama, progress=heard) for task in self._tasks)
        return replace(each, found=replace(found, tasks=(*tasks, *found.tasks)))

    def _concluded(self, each: _Done, original: _Done | None) -> _Done:
        """Return a file's result with what follows from the original's."""
        found = each.found
        if original:
            found = replace(found, tasks=tuple(map(self._seen, found.tasks, original.found.tasks)))
        if each.said:
            other = None
            if original and original.said and each.strange is not None:
                other = original.said, each.strange
            found = replace(found, probe=result(each.said, other))
        return replace(each, found=found)

    def _seen(self, task: TaskResult, original: TaskResult) -> TaskResult:
        if not is_blind(original):
            return task
        self.warnings.append(
            f"{task.name}: the original is within two standard errors of chance, so that it tells nothing"
        )
        return replace(task, blind=True)

    def _fates(self, name: str, source: GgufFile) -> Fates:
        arch = source.header.value("general.architecture")  # `limits` are of models with experts alone
        window = source.header.integer(f"{arch}.context_length")
        if window and self._wanted.n_ctx > window:
            self.warnings.append(f"{name} was made for {window} tokens, --ctx-size is {self._wanted.n_ctx}")
        try:
            return fates_by_slot(source.header, source.spec)
        except MoneError as error:  # of a model without experts, everything else can be measured
            self.warnings.append(f"no shares of slots: {error}")
            return {}

    def _heard(self, name: str) -> Progress | None:
        """Return a progress that says which file it is about."""
        if not (progress := self._progress):
            return None
        return lambda done, total, what: progress(done, total, f"{name}: {what}")


def _check_batch(llama: LlamaOptions, n_row: int) -> None:
    """Refuse batches that hold fewer tokens than rows run side by side."""
    for option, n_token in (("-ub", llama.n_ubatch), ("-b", llama.n_batch)):
        if n_token < n_row:
            without = ", or -n 0" if n_row > 1 else ""
            raise MoneError(f"{option} {n_token} for {n_row} rows at a time: pass {n_row} or more{without}")


def _named(files: Sequence[Path]) -> dict[str, GgufFile]:
    """Return files under the names they have in results; all must have one vocabulary."""
    for path in files:
        if path.is_dir():
            raise MoneError(f"{path} is a folder: make its GGUF with `mone-export {path} --ratio 0 -o FILE`")
        if not path.is_file():
            raise MoneError(f"there is no file {path}: check the spelling")
    names = [path.name for path in files]
    if len(set(names)) < len(names):
        names = [str(path) for path in files]
    if len(set(names)) < len(names):  # the original as one of the files
        names = [
            f"{name} ({number})" if name in names[:number] else name for number, name in enumerate(names)
        ]
    found = {name: GgufFile(path) for name, path in zip(names, files, strict=True)}
    wanted = None
    for name, source in found.items():
        own = source.header.keys.get("tokenizer.ggml.tokens")
        if own is None:
            raise MoneError(f"{name} holds no vocabulary: convert the model again with its tokenizer's files")
        wanted = wanted or (name, own)
        if own.raw != wanted[1].raw:
            raise MoneError(f"{name} and {wanted[0]} have different vocabularies: compare files of one model")
    return found


def _pairs(done: Sequence[_Done]) -> list[Pair]:
    """Return the differences between all files but the original, text by text."""
    return [
        paired((one.found.file, own), (other.found.file, their))
        for number, one in enumerate(done)
        for other in done[number + 1 :]
        for own, their in zip(one.predictions, other.predictions, strict=True)
    ]
