"""How text becomes ids: as llama.cpp's tools read it, so that calibration sees what the file will see.

Names of control tokens that are written in a text stay text (`parse_special` off in llama.cpp): only a chat
template yields control tokens. A chat is split at those first, and each piece between is tokenised alone.
Long text is tokenised in windows, so that no more of it is read than the rows need.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from mone_export.errors import MoneError, first_line
from mone_export.source.sandbox import Sandbox

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_WINDOW = 1 << 16  # characters tokenised at a time
_CONTEXT = 512  # characters before and after a cut that are tokenised with the text at the cut
_SEARCHED = 4096  # characters in which places between words are looked for
_TRIED = 32  # of those places, and of others
# before the space between two words, or after a line end: tokenizers usually begin a token there
_CUT = re.compile(r"(?<=\w)(?= \w)|(?<=\n)(?=\S)")
_NO_TEXT = "\U0010ffff"  # no character: no text holds it
# where pre-tokenizers and normalisers differ: line ends after punctuation, runs of spaces, digits, accents
_PROBE = (
    "  Don't SHOUT, we'll see... I'VE 3 33 333 4444 words; nai\u0308ve cafe\u0301, \ufb01ne \u00bd\n\n\n"
    "def f(x, y=(1, 2)):\n\n    if x != y:\n\t\treturn {'a': [x]};\n  \n# ======= //// ------\r\n"
    "Съешь ещё этих булок. 我想在 apple 工作 12345 天~ ទៅ مرحبا \U0001f680 \u2581\u2581 a_b camelCase   \n"
)


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Load the model's own tokenizer.

    The ids are those of the folder's tokenizer.json, where there is one: for some `tokenizer_class` values
    transformers puts another normaliser or pre-tokenizer in the place of the file's.

    Raises `MoneError` when there is no tokenizer that can be loaded.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code
        )
        named = ""
        if (path / "tokenizer.json").is_file() and not _ids_are_the_files(tokenizer, path):
            named = type(tokenizer).__name__
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    except Exception as error:  # the tokenizers library raises no class of its own for a broken file
        raise MoneError(
            f"cannot load the tokenizer in {path}: {first_line(error)}; get its files again"
        ) from None
    if named:
        log.warning(
            "%s: transformers' %s gives other ids than tokenizer.json itself, which is used for calibration; "
            "llama.cpp's converter may name the wrong pre-tokenizer in the file",
            *(path, named),
        )
    return tokenizer


def _ids_are_the_files(tokenizer: "PreTrainedTokenizerBase", path: Path) -> bool:
    if not tokenizer.is_fast:
        return True
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(path / "tokenizer.json"))
    own.no_truncation()
    own.no_padding()
    wanted = own.encode(_PROBE, add_special_tokens=False).ids
    return bool(tokenizer(_PROBE, add_special_tokens=False, verbose=False)["input_ids"] == wanted)


class ControlToken(NamedTuple):
    """A token that no text yields; some take the white space on their left or on their right away."""

    id: int
    takes_left: bool = False
    takes_right: bool = False


class TextReader(Protocol):
    """What reading texts takes of a model's tokenizer, of whatever kind it is."""

    @property
    def before(self) -> list[int]:
        """The ids in front of a document, usually one BOS."""

    @property
    def after(self) -> list[int]:
        """The ids at its end, usually none."""

    @property
    def control(self) -> Mapping[str, ControlToken]:
        """The tokens that only a chat template can yield, by name."""

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text alone; names of control tokens in it are text."""

    def render(
        self, messages: list[Any], tools: list[Any] | None, prefix: str, *, asking: bool = False
    ) -> str:
        """Return what the chat template, with `prefix` put before it, makes of messages and tools.

        With `asking` it ends where the model's answer begins. Raises whatever a template that cannot render
        them raises.
        """


class TransformersReader:
    """A `TextReader` of transformers' tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Copy the tokenizer's rules; its settings for padding and truncation stay its own.

        Raises `MoneError` for rules that contradict themselves.
        """
        self._tokenizer = tokenizer
        self._sandbox = Sandbox()
        try:
            self._plain = _plain_backend(tokenizer) if tokenizer.is_fast else None
            bare, whole = (tokenizer("a", add_special_tokens=added, verbose=False) for added in (False, True))
        except Exception as error:  # the tokenizers library raises no class of its own
            raise MoneError(
                f"cannot use the tokenizer in {tokenizer.name_or_path}: {first_line(error)}; get its files "
                "again"
            ) from None
        self.before, self.after = around(bare["input_ids"], whole["input_ids"])
        names = set(control_tokens(tokenizer))
        self.control: Mapping[str, ControlToken] = {
            token.content: ControlToken(id_, token.lstrip, token.rstrip)
            for id_, token in tokenizer.added_tokens_decoder.items()
            if token.content in names
        }

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return bool(self._tokenizer.chat_template)

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text alone."""
        if self._plain is not None:
            return list(self._plain.encode(text, add_special_tokens=False).ids)
        found = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return list(found["input_ids"])

    def render(
        self, messages: list[Any], tools: list[Any] | None, prefix: str, *, asking: bool = False
    ) -> str:
        """Return what the chat template, with `prefix` put before it, makes of messages and tools."""
        template = prefix + self._tokenizer.get_chat_template(None, tools=tools)
        given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": asking}
        return self._sandbox.render(template, self._tokenizer.special_tokens_map | given)


def as_reader(tokenizer: "TextReader | PreTrainedTokenizerBase") -> TextReader:
    """Return the reader of a tokenizer, which may be one already; it is asked nothing: it may load still."""
    known: Any = tokenizer
    return known if hasattr(type(known), "render") else TransformersReader(known)


class Encoder:
    """Turns texts into ids as llama.cpp does, a window at a time."""

    def __init__(self, tokenizer: "TextReader | PreTrainedTokenizerBase") -> None:
        """Take a tokenizer of any kind."""
        self._reader = as_reader(tokenizer)

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return self._reader.has_template

    def text(self, parts: Iterable[str]) -> Iterator[list[int]]:
        """Yield the ids of a plain text that comes in parts, with the special tokens of a document around it.

        They are the ids of the whole text; no more of it is asked for than a window beyond what they need.
        """
        yield self._reader.before
        yield from self._windows(parts)
        yield self._reader.after

    def chat(self, text: str, control: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
        """Yield the ids of a rendered chat whose template wrote control tokens at the places `control`."""
        at, strips = 0, False
        for start, end in control:
            token = self._reader.control[text[start:end]]
            piece = text[at:start].lstrip() if strips else text[at:start]
            yield from self._windows([piece.rstrip() if token.takes_left else piece])
            yield [token.id]
            at, strips = end, token.takes_right
        yield from self._windows([text[at:].lstrip() if strips else text[at:]])

    def _ids(self, text: str) -> list[int]:
        return self._reader.ids(text) if text else []

    def _windows(self, parts: Iterable[str]) -> Iterator[list[int]]:
        """Yield the ids of a text in parts, as if it were tokenised whole.

        It is cut where the tokens before do not depend on what follows; a window is tokenised with some of
        the text before it, whose own tokens are taken off again. Without such a place it grows.
        """
        context, text, size = "", "", _WINDOW
        for part in parts:
            text += part
            while len(text) > size + _CONTEXT:
                if not (end := self._cut(text, size)):
                    size *= 2
                    continue
                yield self._following(context, text[:end])
                context, text, size = (context + text[:end])[-_CONTEXT:], text[end:], _WINDOW
        yield self._following(context, text)

    def _following(self, context: str, text: str) -> list[int]:
        return self._ids(context + text)[len(self._ids(context)) :]

    def _cut(self, text: str, latest: int) -> int:
        """Return where to cut a text, at `latest` or somewhat before; 0 where no place tried is one."""
        words = [match.start() for match in _CUT.finditer(text, latest - _SEARCHED, latest)]
        places: list[int] = [*words[: -_TRIED - 1 : -1], *range(latest, latest - _TRIED, -1)]
        for at in places:
            before = self._ids(text[at - _CONTEXT : at])
            if self._ids(text[at - _CONTEXT : at + _CONTEXT])[: len(before)] == before:
                return at
        return 0


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    """Return the names that a text may hold without meaning them: llama.cpp keeps them text as well."""
    return tuple(
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.content and (token.special or _looks_special(token.content))
    )


def _looks_special(name: str) -> bool:
    """Return whether llama.cpp's converter makes an added token a control token although it is not special.

    Source: `does_token_look_special` in the pinned tree's conversion/base.py.
    """
    return (
        name in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (name.startswith("<|") and name.endswith("|>"))
        or (name.startswith("<\uff5c") and name.endswith("\uff5c>"))
        or (name.startswith("<unused") and name.endswith(">"))
    )


def _plain_backend(tokenizer: "PreTrainedTokenizerBase") -> "Tokenizer":
    """Return a copy of the tokenizer that reads the names of control tokens as text."""
    from tokenizers import Tokenizer

    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    control = set(control_tokens(tokenizer))
    for token in rules["added_tokens"]:
        token["special"] = token["content"] in control
    rules.update(truncation=None, padding=None, post_processor=None)  # which only changes offsets here
    _forget_pieces(rules, control)
    plain = Tokenizer.from_str(json.dumps(rules))
    plain.encode_special_tokens = True
    return plain


def _forget_pieces(rules: dict[str, Any], control: set[str]) -> None:
    """Change a model that would put a control token together from its characters; ids stay the same.

    SentencePiece never does; the tokenizers library, which knows no kinds of pieces, does where one is in the
    vocabulary.
    """
    model = rules["model"]
    if model.get("type") == "Unigram":
        held = {piece for piece, _ in model["vocab"]} & control
        model["vocab"] = [
            [_NO_TEXT + piece if piece in held else piece, score] for piece, score in model["vocab"]
        ]
        rules["added_tokens"] = [token for token in rules["added_tokens"] if token["content"] not in held]
    elif "merges" in model:
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if "".join(pair) not in control]


def around(bare: list[int], whole: list[int]) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before and after a text, of the text's ids alone and with them."""
    for before in range(len(whole) - len(bare) + 1):
        if whole[before : before + len(bare)] == bare:
            return list(whole[:before]), list(whole[before + len(bare) :])
    return [], []
