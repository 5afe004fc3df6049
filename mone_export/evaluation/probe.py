"""How a file goes on writing: whether it repeats itself, and comes to an end, as the original does.

Pruned models that do well on given text may loop when they write it. So both go on from the same prompts,
passages of the texts, once with the likeliest token each time, once drawn as llama.cpp draws by default (40
likeliest, 95% of the probability, none of less than 5% of the largest, temperature 0.8) with the same random
numbers for both. Where the model has a chat template, a passage is what the user says.

Source: `common_params_sampling` in llama.cpp's `common/common.h` for the defaults.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from mone_export.calibration.chats import Conversation, Template, UnusableError
from mone_export.calibration.eval_callback import Tap
from mone_export.calibration.llama_model import LlamaModel
from mone_export.evaluation.results import Continuations, Measured, ProbeResult
from mone_export.evaluation.texts import Text, pieces
from mone_export.runtime import Progress
from mone_export.source.tokenizing import Encoder, TextReader

N_PROMPT, N_TOKEN = 32, 64  # prompts, and tokens of a passage
GREEDY, SAMPLED = "greedy", "sampled"
_TOP_K, _TOP_P, _MIN_P, _TEMPERATURE, _SEED = 40, 0.95, 0.05, 0.8, 0
_N_GRAM = 4
_CLEARLY = 3  # standard errors
_PASSAGE = "PASSAGE"

Values = Mapping[str, tuple[float, np.ndarray]]
"""By field of `Continuations`: its value, and numbers by prompt whose mean has its standard error."""


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """Tokens int64 [n_prompt, n]; `closing` end the thinking that prompts begin, empty if they begin none."""

    rows: np.ndarray
    closing: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Said:
    """What a model wrote after each prompt, by manner, the ending token included where one came.

    `cost` is what the sampled continuations cost the model itself, as `cost` says.
    """

    prompts: Prompts
    n_new: int
    ends: frozenset[int]
    written: Mapping[str, list[list[int]]]
    cost: np.ndarray


def make_prompts(texts: Sequence[Text], reader: TextReader) -> Prompts:
    """Return prompts of one length, made of passages of the texts."""
    n_token = min(N_TOKEN, min(text.rows.shape[1] for text in texts) - 1)
    passages = pieces(texts, N_PROMPT, n_token)
    before, after, thinks = _frame(reader)
    around = [np.tile(np.array(ids, np.int64), (len(passages), 1)) for ids in (before, after)]
    rows = np.concatenate([around[0], passages, around[1]], axis=1)
    if not thinks:
        return Prompts(rows)
    end = reader.control.get("</think>")
    return Prompts(rows, (end.id,) if end else tuple(reader.ids("</think>")))


def probe(model: LlamaModel, prompts: Prompts, *, n_new: int, progress: Progress | None = None) -> Said:
    """Let a model go on from prompts, by `n_new` tokens at most, in both manners."""
    ends = frozenset(model.end_tokens())
    draws = torch.from_numpy(np.random.default_rng(_SEED).random((len(prompts.rows), n_new)))
    greedy = _continued(model, prompts.rows, n_new, ends, progress=progress)
    sampled = _continued(model, prompts.rows, n_new, ends, draws=draws, progress=progress)
    written = {GREEDY: greedy, SAMPLED: sampled}
    return Said(prompts, n_new, ends, written, _cost(model, prompts, sampled, progress))


def cost(model: LlamaModel, said: Said, *, progress: Progress | None = None) -> np.ndarray:
    """Return what sampled continuations cost a model, float64 [n_prompt].

    That is the mean negative logarithm of the probabilities that it gives a continuation's tokens, in nats.
    """
    return _cost(model, said.prompts, said.written[SAMPLED], progress)


def result(said: Said, original: tuple[Said, np.ndarray] | None = None) -> ProbeResult:
    """Return what a file has said as numbers, and how they differ from the original's.

    `original` is what the original has said, and what the file's continuations cost it. The file differs in a
    field where, in both manners, the mean of the differences by prompt is on one side of 0 by more than three
    standard errors; in its drift where it is so in the sampled manner, since other tokens are not drawn by
    their probabilities.
    """
    n_prompt, n_prompt_token = said.prompts.rows.shape
    own = {manner: _values(said, manner) for manner in (GREEDY, SAMPLED)}
    differences: dict[str, dict[str, Measured]] = {}
    differing: tuple[str, ...] = ()
    if original:
        differences = {
            manner: _differences(values, _values(original[0], manner)) for manner, values in own.items()
        }
        drift = original[1] - said.cost
        own[SAMPLED]["drift"] = float(drift.mean()), drift
        differences[SAMPLED]["drift"] = _estimate(*own[SAMPLED]["drift"])
        names = sorted({name for each in differences.values() for name in each} - {"length"})
        differing = tuple(name for name in names if _differs(name, differences))
    return ProbeResult(
        n_prompt=n_prompt,
        n_prompt_token=n_prompt_token,
        n_new=said.n_new,
        greedy=_measured(own[GREEDY]),
        sampled=_measured(own[SAMPLED]),
        differences=differences,
        differing=differing,
    )


def _differences(values: Values, original: Values) -> dict[str, Measured]:
    return {
        name: _estimate(value - original[name][0], each - original[name][1])
        for name, (value, each) in values.items()
    }


def _differs(name: str, differences: Mapping[str, Mapping[str, Measured]]) -> bool:
    """Return whether all differences of a field are clear, and on one side of 0."""
    return {_side(own[name]) for own in differences.values() if name in own} in ({1}, {-1})


def _cost(
    model: LlamaModel, prompts: Prompts, written: Sequence[list[int]], progress: Progress | None
) -> np.ndarray:
    found = []
    for number, (prompt, tokens) in enumerate(zip(prompts.rows, written, strict=True), start=1):
        row = torch.tensor([*prompt.tolist(), *tokens])
        outputs = torch.zeros(len(row), dtype=torch.bool)
        outputs[len(prompt) - 1 : -1] = True
        likely = model.logits(row, Tap(logits=True), outputs).double().log_softmax(-1)
        found.append(-float(likely.gather(1, row[len(prompt) :, None]).mean()))
        if progress:
            progress(number, len(written), "reading what was written (continuations)")
    return np.array(found)


def _side(difference: Measured) -> int:
    """Return on which side of 0 a difference clearly is, 1 or -1; 0 where it is not clear."""
    if difference.error is None or abs(difference.value) <= _CLEARLY * difference.error:
        return 0
    return 1 if difference.value > 0 else -1


def _frame(reader: TextReader) -> tuple[list[int], list[int], bool]:
    """Return the tokens before and after a passage, and whether those after it begin a thinking."""
    plain = list(reader.before), list[int](), False
    if not reader.has_template:
        return plain
    try:
        asked = Conversation([{"role": "user", "content": _PASSAGE}])
        chat = Template(reader).render(asked, asking=True)
    except UnusableError:
        return plain
    head, found, tail = chat.text.partition(_PASSAGE)
    if not found or not (head + tail).strip():
        return plain
    start = len(head) + len(found)
    encoder = Encoder(reader)
    before = _ids(encoder, head, [place for place in chat.control if place[1] <= len(head)])
    after = _ids(encoder, tail, [(at - start, end - start) for at, end in chat.control if at >= start])
    if before[: len(reader.before)] != reader.before:  # which llama.cpp puts there, whatever a template says
        before = [*reader.before, *before]
    return before, after, tail.rstrip().endswith("<think>")


def _ids(encoder: Encoder, text: str, control: Sequence[tuple[int, int]]) -> list[int]:
    return list(chain.from_iterable(encoder.chat(text, control)))


def _continued(
    model: LlamaModel,
    prompts: np.ndarray,
    n_new: int,
    ends: frozenset[int],
    *,
    draws: Tensor | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Return what follows each prompt, up to the token that ends it: the likeliest, or by `draws`.

    `draws` are random numbers below 1, float64 [n_prompt, n_new].
    """
    n_prompt, n_token = prompts.shape
    what = f"continuing (tokens, {GREEDY if draws is None else SAMPLED})"
    model.begin(n_prompt, n_token + n_new)
    logits = model.extend(torch.from_numpy(prompts), 0)
    chosen: list[Tensor] = []
    going = torch.ones(n_prompt, dtype=torch.bool)
    for step in range(n_new):
        tokens = logits.argmax(-1) if draws is None else _drawn(logits, draws[:, step])
        chosen.append(tokens)
        going &= ~torch.isin(tokens, torch.tensor(list(ends), dtype=torch.int64))
        if progress:
            progress((step + 1) * n_prompt, n_new * n_prompt, what)
        if not going.any() or step == n_new - 1:
            break
        logits = model.extend(tokens[:, None], n_token + step)
    return [_until_end(row, ends) for row in torch.stack(chosen, 1).tolist()]


def _drawn(logits: Tensor, draws: Tensor) -> Tensor:
    """Return a token for each row of logits [n, n_vocab], by numbers below 1 [n]."""
    top = logits.double().topk(min(_TOP_K, logits.shape[1]))
    likely = top.values.softmax(-1)
    kept = (likely.cumsum(-1) - likely < _TOP_P) & (likely >= _MIN_P * likely[:, :1])
    share = (top.values / _TEMPERATURE).masked_fill(~kept, -torch.inf).softmax(-1).cumsum(-1)
    place = (share <= draws[:, None] * share[:, -1:]).sum(-1, keepdim=True)
    return top.indices.gather(1, place)[:, 0]


def _until_end(tokens: list[int], ends: frozenset[int]) -> list[int]:
    at = next((at for at, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: at + 1]


def _values(said: Said, manner: str) -> dict[str, tuple[float, np.ndarray]]:
    """Return the fields of `Continuations`, by prompt."""
    written, closing = said.written[manner], said.prompts.closing
    grams = [Counter(zip(*(tokens[at:] for at in range(_N_GRAM)), strict=False)) for tokens in written]
    by_prompt = {
        "repeated": np.array([1 - len(each) / each.total() if each else 0 for each in grams]),
        "ended": np.array([tokens[-1] in said.ends for tokens in written], float),
        "length": np.array([len(tokens) for tokens in written], float),
    }
    if closing:
        by_prompt["closed"] = np.array([_holds(tokens, closing) for tokens in written], float)
    found = {name: (float(values.mean()), values) for name, values in by_prompt.items()}
    return found | {"distinct": _distinct(grams)}


def _distinct(grams: Sequence[Counter[tuple[int, ...]]]) -> tuple[float, np.ndarray]:
    """Return the share of different n-grams among all, and the jackknife's pseudovalues of it."""
    everything = sum(grams, Counter[tuple[int, ...]]())
    n, n_all, n_different = len(grams), everything.total(), len(everything)
    value = n_different / max(1, n_all)
    without = [
        (n_different - sum(everything[gram] == times for gram, times in own.items()))
        / max(1, n_all - own.total())
        for own in grams
    ]
    return value, n * value - (n - 1) * np.array(without)


def _holds(tokens: Sequence[int], wanted: tuple[int, ...]) -> bool:
    return any(tuple(tokens[at : at + len(wanted)]) == wanted for at in range(len(tokens)))


def _measured(values: Values) -> Continuations:
    return Continuations(**{name: _estimate(value, each) for name, (value, each) in values.items()})


def _estimate(value: float, values: np.ndarray) -> Measured:
    n = len(values)
    return Measured(value, float(values.std() / np.sqrt(n - 1)) if n > 1 else None)
