"""What `mone-eval` found, as values that travel: to the terminal, to JSON, to a report. Measured elsewhere.

Every number that comes from a sample is a `Measured`. A share is between 0 and 1. Layers are numbered as in
the file. Whatever could not be measured, or was not asked for, is None or empty.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from mone_export.errors import MoneError, first_line
from mone_export.paths import replacing

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Measured:
    """A number and its standard error; None where the error is not known."""

    value: float
    error: float | None = None


def shown(number: Measured | None) -> str:
    """Return a number with its error, whose two digits decide how many the number has; empty for none."""
    if number is None:
        return ""
    if not number.error:
        return f"{number.value:.4g}"
    n_digit = max(0, 1 - math.floor(math.log10(number.error)))
    return f"{number.value:.{n_digit}f} ± {number.error:.{n_digit}f}"


def percent(share: Measured | None) -> str:
    """Return a share with its error; empty for none."""
    if share is None:
        return ""
    error = "" if share.error is None else f" ± {share.error:.1%}"
    return f"{share.value:.1%}{error}"


@dataclass(frozen=True, slots=True)
class TextResult:
    """A file on one text: `n_chunk` chunks of `n_ctx` tokens, of which `n_token` predictions were scored.

    KL divergences, in nats per token, are those of the original's predictions from the file's; `kl_99` and
    `kl_999` are quantiles, `same_top` is the share of tokens for which both find the same token likeliest.
    They are None without an original, and for the original itself. `slots` says for each layer which share of
    its routed slots (a token has `top_k` of them) went to experts of which fate: `whole`, `96 channels`,
    `constant`, with the type of tiers that have one, as in `Plan.fates`.
    """

    name: str
    sha256: str  # of the tokens' rows
    n_ctx: int
    n_chunk: int
    n_token: int
    perplexity: Measured
    kl_mean: Measured | None = None
    kl_median: Measured | None = None
    kl_99: Measured | None = None
    kl_999: Measured | None = None
    same_top: Measured | None = None
    slots: Mapping[int, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Continuations:
    """How a file goes on from the probe's prompts, in one manner.

    `repeated` is the share of a continuation's 4-grams that occurred in it before, `distinct` that of the
    4-grams of all continuations together that are different, `ended` the share of continuations that end by
    themselves, `length` their tokens, `closed` the share in which thinking that the prompt began is ended
    (None where prompts begin none). `drift`, of sampled ones beside an original, says how much less likely
    their tokens are to the original than to the file that wrote them: the mean logarithm of the ratio.
    """

    repeated: Measured
    distinct: Measured
    ended: Measured
    length: Measured
    closed: Measured | None = None
    drift: Measured | None = None


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The loop and ending probe: `n_prompt` prompts of `n_prompt_token` tokens, after each at most `n_new`.

    `differences` are the file's less the original's, paired by prompt, by manner and name of a field of
    `Continuations`: `differences["greedy"]["repeated"]`; empty without an original, and for the original.
    `differing` names the fields by which the file differs from the original: those of which both manners
    differ in one direction by more than three standard errors; `drift` where the sampled one does.
    """

    n_prompt: int
    n_prompt_token: int
    n_new: int
    greedy: Continuations
    sampled: Continuations
    differences: Mapping[str, Mapping[str, Measured]] = field(default_factory=dict)
    differing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TaskResult:
    """A file at a multiple-choice task: `chance` is the share that guessing gets right, None where unknown.

    `blind` says that the original itself is within two standard errors of chance, so that the task says
    nothing about the file.
    """

    name: str
    kind: str  # hellaswag, winogrande or multiple-choice; lm-eval
    sha256: str  # of the task's file; of lm-eval's questions with their answers
    n_question: int
    accuracy: Measured
    chance: float | None
    blind: bool = False


@dataclass(frozen=True, slots=True)
class FileResult:
    """One file: sizes in bytes, speeds in tokens per second.

    `resident` is the most memory that was resident in a process which loads the file and runs the speed
    measurement.
    """

    file: str
    size: int
    sha256: str
    texts: tuple[TextResult, ...] = ()
    probe: ProbeResult | None = None
    prefill: Measured | None = None
    decode: Measured | None = None
    resident: int | None = None
    tasks: tuple[TaskResult, ...] = ()


@dataclass(frozen=True, slots=True)
class Pair:
    """The first file less the second on one text, paired token by token, per token.

    `log_perplexity` is the logarithm of the first perplexity over the second; `kl_mean` is None without an
    original.
    """

    text: str
    first: str
    second: str
    log_perplexity: Measured
    kl_mean: Measured | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All that one run of `mone-eval` found; `against` is the original, measured like the files."""

    files: tuple[FileResult, ...]
    against: FileResult | None = None
    pairs: tuple[Pair, ...] = ()
    command: str = ""
    made_with: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def as_json(self) -> str:
        """Return it as a JSON text that `from_json` reads."""
        return json.dumps({"mone_evaluation": _VERSION, **asdict(self)}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Evaluation":
        """Read what `as_json` wrote; raises `MoneError` for anything else."""
        try:
            value = json.loads(text)
            if value["mone_evaluation"] != _VERSION:
                raise ValueError(f"version {value['mone_evaluation']}, this mone-export reads {_VERSION}")
            found: Evaluation = _built(cls, value)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MoneError(
                f"this is no evaluation of mone-eval ({first_line(error)}): make one with --json FILE"
            ) from None
        return found

    def save(self, path: str | Path) -> None:
        """Write it as JSON; raises `MoneError` where that is not possible."""
        try:
            with replacing(Path(path)) as part:
                part.write_text(self.as_json(), encoding="utf-8")
        except OSError as error:
            raise MoneError(f"cannot write {path} ({error.strerror}): choose another --json file") from None

    @classmethod
    def load(cls, path: str | Path) -> "Evaluation":
        """Read what `save` wrote; raises `MoneError` where the file is missing or something else."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MoneError(
                f"cannot read {path} ({first_line(error)}): name a file of `mone-eval --json`"
            ) from None
        try:
            return cls.from_json(text)
        except MoneError as error:
            raise MoneError(f"{path}: {error}") from None


def _built(kind: Any, value: Any) -> Any:
    """Return a JSON value as what a type says: a dataclass, a tuple, a mapping or a plain value."""
    outer, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: _built(hint, value[name]) for name, hint in hints.items()})  # type: ignore[operator]
    if outer is UnionType:
        return None if value is None else _built(inner[0], value)
    if outer is tuple:
        return tuple(_built(inner[0], each) for each in value)
    if outer is Mapping:
        return {inner[0](key): _built(inner[1], each) for key, each in value.items()}
    return kind(value)
