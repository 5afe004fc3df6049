"""The loop and ending probe: what it counts, what it draws, whom it tells apart."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from torch import Tensor

from mone_export.calibration.llama_model import LlamaModel
from mone_export.evaluation.probe import Prompts, Said, cost, make_prompts, probe, result
from mone_export.evaluation.results import Measured, ProbeResult
from mone_export.evaluation.texts import Text, read_texts
from mone_export.llama_options import LlamaOptions
from mone_export.source.gguf_file import GgufFile
from mone_export.source.tokenizing import ControlToken

END = 0


class Scripted:
    """A model that goes on by a rule: `after` gives the next token of a row, whose last ones it is given."""

    n_vocab = 50

    def __init__(self, after: Callable[[list[int]], int]) -> None:
        self._after = after

    def end_tokens(self) -> list[int]:
        return [END]

    def begin(self, n_row: int, seq_len: int) -> None:
        self._rows: list[list[int]] = [[] for _ in range(n_row)]

    def extend(self, rows: Tensor, start: int) -> Tensor:
        for row, own in zip(self._rows, rows.tolist(), strict=True):
            assert len(row) == start
            row += own
        return self._logits([self._after(row) for row in self._rows])

    def logits(self, row: Tensor, _: Any, outputs: Tensor) -> Tensor:
        ids = row.tolist()
        return self._logits([self._after(ids[: at + 1]) for at in outputs.nonzero().flatten().tolist()])

    def _logits(self, tokens: list[int]) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(tokens), self.n_vocab) * 100.0


def said(after: Callable[[list[int]], int], *, closing: tuple[int, ...] = (), n_new: int = 12) -> Said:
    prompts = Prompts(np.array([[10], [20]]), closing)
    model: Any = Scripted(after)
    return probe(model, prompts, n_new=n_new)


def test_what_is_counted() -> None:
    """One row loops through three tokens, the other counts up and ends after six."""

    def after(row: list[int]) -> int:
        if row[0] == 10:
            return [11, 12, 13][(len(row) - 1) % 3]
        return row[-1] + 1 if len(row) < 6 else END

    found = said(after)
    loop, counting = [11, 12, 13] * 4, [21, 22, 23, 24, 25, END]
    assert found.written == {"greedy": [loop, counting], "sampled": [loop, counting]}
    numbers = result(found).greedy
    assert numbers.repeated == Measured(
        pytest.approx((6 / 9 + 0) / 2), pytest.approx(1 / 3)
    )  # 3 of 9 are new
    assert numbers.distinct.value == (3 + 3) / (9 + 3)
    assert numbers.ended.value == 0.5 and numbers.length.value == 9
    assert numbers.closed is None and numbers.drift is None


def test_the_jackknife_is_leaving_one_out() -> None:
    rng = np.random.default_rng(0)
    prompts = Prompts(np.arange(6)[:, None])
    written = [rng.integers(0, 3, 20).tolist() for _ in range(6)]
    found = result(Said(prompts, 20, frozenset(), {"greedy": written, "sampled": written}, np.zeros(6)))

    def distinct(rows: list[list[int]]) -> float:
        grams = [tuple(row[at : at + 4]) for row in rows for at in range(17)]
        return len(set(grams)) / len(grams)

    without = np.array([distinct(written[:row] + written[row + 1 :]) for row in range(6)])
    error = np.sqrt(5 / 6 * np.square(without - without.mean()).sum())
    assert found.greedy.distinct == Measured(pytest.approx(distinct(written)), pytest.approx(error))


def test_thoughts_that_end_are_counted() -> None:
    found = result(said(lambda row: 30 + len(row) if row[0] == 10 else 40, closing=(33, 34)))
    assert found.greedy.closed == Measured(0.5, 0.5)


def test_drawn_tokens_have_llama_cpps_chances() -> None:
    """The likeliest have 60, 30, 8 and 2 percent: the last is less than 5% of the first."""
    chances = torch.tensor([0.6, 0.3, 0.08, 0.02])
    model: Any = SimpleNamespace(
        end_tokens=lambda: [],
        begin=lambda *_: None,
        extend=lambda rows, _: chances.log().expand(len(rows), 4),
        logits=lambda row, _, outputs: torch.zeros(int(outputs.sum()), 4),
    )
    found = probe(model, Prompts(np.zeros((200, 1), int)), n_new=50).written["sampled"]
    counts = np.bincount(np.concatenate(found), minlength=4) / 10_000
    wanted = np.array([0.6, 0.3, 0.08]) ** (1 / 0.8)
    assert counts[:3] == pytest.approx(wanted / wanted.sum(), abs=0.015) and counts[3] == 0


def probed(files: dict[str, Path], text: Path, n_new: int) -> dict[str, ProbeResult]:
    """The first of the files is the original."""
    original = next(iter(files.values()))
    reader = GgufFile(original).tokenizer()
    prompts = make_prompts(read_texts([str(text)], reader, n_ctx=512, n_chunk=16), reader)
    found = {}
    for name, file in files.items():
        with LlamaModel(file, LlamaOptions()) as model:
            found[name] = probe(model, prompts, n_new=n_new)
    with LlamaModel(original, LlamaOptions()) as model:
        costs = {name: cost(model, own) for name, own in found.items()}
    first = next(iter(found.values()))
    return {name: result(own, (first, costs[name])) for name, own in found.items()}


def zeroed(file: Path, layer: int, folder: Path) -> Path:
    """A copy of a file in which all experts of a layer answer 0."""
    (tensor,) = [own for own in GGUFReader(file).tensors if own.name == f"blk.{layer}.ffn_down_exps.weight"]
    copy = folder / f"zeroed-{layer}.gguf"
    content = bytearray(file.read_bytes())
    content[tensor.data_offset : tensor.data_offset + tensor.n_bytes] = bytes(tensor.n_bytes)
    copy.write_bytes(content)
    return copy


@pytest.mark.upstream
@pytest.mark.nightly
def test_a_layer_without_experts_is_told_from_the_original_and_the_original_is_not(
    demo_gguf: Path, text: Path, tmp_path: Path
) -> None:
    files = {"original": demo_gguf, "itself": demo_gguf, "zeroed": zeroed(demo_gguf, 1, tmp_path)}
    found = probed(files, text, 128)
    assert found["itself"].differing == ()
    assert all(
        own == Measured(0, 0) for each in found["itself"].differences.values() for own in each.values()
    )
    assert "drift" in found["zeroed"].differing
    assert "drift" not in found["zeroed"].differences["greedy"]


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.upstream
def test_whichever_layer_it_is_and_not_a_file_that_hardly_strays(
    demo_gguf: Path, half_gguf: Path, text: Path, tmp_path: Path
) -> None:
    files = {f"zeroed {layer}": zeroed(demo_gguf, layer, tmp_path) for layer in range(5)}
    found = probed({"original": demo_gguf, "half": half_gguf, **files}, text, 128)
    for name, own in found.items():
        print(name, own.differing, own.differences["sampled"]["drift"])
    assert all("drift" in found[name].differing for name in files)
    assert not found["half"].differing  # of a divergence of 0.001


class Reader:
    """A tokenizer of one token a letter, with a template: what is around a passage, and before the answer."""

    before, after = [1], list[int]()
    has_template = True
    control = {"<a>": ControlToken(200), "</think>": ControlToken(201)}

    def __init__(self, template: str, answer: str) -> None:
        self._template, self._answer = template, answer

    def ids(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def render(self, messages: list[Any], tools: Any, prefix: str, *, asking: bool = False) -> str:
        return self._template.format(messages[0]["content"]) + self._answer * asking


@pytest.mark.parametrize(("answer", "closing"), [("<think>\n", (201,)), ("<think></think>", ()), ("", ())])
def test_a_passage_is_what_the_user_says(answer: str, closing: tuple[int, ...]) -> None:
    text = Text("t", np.arange(1, 81).reshape(4, 20) + 300)
    reader: Any = Reader("{}<a>be", answer)
    prompts = make_prompts([text], reader)
    after = [201 if token == "</think>" else ord(token) for token in re.findall("</think>|[^/]", answer)]
    assert prompts.rows[0].tolist() == [1, *text.rows[0, 1:], 200, *map(ord, "be"), *after]
    assert prompts.closing == closing


def test_a_template_that_adds_nothing_leaves_the_passage() -> None:
    text = Text("t", np.arange(1, 81).reshape(4, 20) + 300)
    reader: Any = Reader("{}", "")
    assert make_prompts([text], reader).rows.tolist() == [[1, *row] for row in text.rows[:, 1:].tolist()]
