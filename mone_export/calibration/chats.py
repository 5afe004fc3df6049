"""Chats: records of every usual form become messages, and messages text by the model's own chat template.

What the messages say is text, whatever it looks like: only the control tokens that the template itself writes
are control tokens. The date that some templates print is fixed, so that a chat is the same text every day.
"""

import datetime
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mone_export.errors import MoneError, first_line
from mone_export.source.sandbox import StoppedError
from mone_export.source.tokenizing import TextReader

DATE = datetime.datetime(2025, 1, 1, 12)  # what strftime_now of a template shows

_LISTS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat")
_PAIRS = (  # what is asked, further input, what is answered
    ("prompt", "", "completion"),
    ("prompt", "", "response"),
    ("prompt", "", "chosen"),
    ("instruction", "input", "output"),
    ("instruction", "input", "response"),
    ("instruction", "context", "response"),
    ("question", "context", "answer"),
    ("question", "", "response"),
    ("query", "", "response"),
)
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
    "system": "system",
}
# templates read the first, gpt-oss' the second
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")

Message = dict[str, Any]


class UnusableError(MoneError):
    """A record that is no text and no chat, or a chat that the template cannot render: others may be fine."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A rendered chat: `control` are the places (start, end) of the control tokens that the template wrote.

    Of `n_character` in the messages, `n_lost` are not in the text: templates drop thoughts of earlier turns.
    """

    text: str
    control: tuple[tuple[int, int], ...]
    n_character: int
    n_lost: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with `role` and `content`, and perhaps `tool_calls`; descriptions of the tools, if any."""

    messages: list[Message]
    tools: list[Any] | None = None


def conversation(record: Mapping[str, Any], field: str = "text") -> Conversation | None:
    """Return the conversation that a record holds, None when it holds no chat.

    Messages are looked for in `field`, then in the usual fields, then as a question and its answer. Lists and
    tools may be strings of JSON. Keys without a value are dropped, a missing content is empty.

    Raises `UnusableError` when it cannot be read.
    """
    for key in (field, *_LISTS):
        value = record.get(key)
        found = _parsed(value)
        if isinstance(value, list) or (isinstance(found, list) and all(map(is_message, found))):
            return _conversation(found, record)
        if key == field and isinstance(value, str):
            return None  # a text
    for asked, further, answered in _PAIRS:
        if record.get(asked) and isinstance(record.get(answered), (str, list)):
            question, answer = _turns(record[asked], "user"), _turns(record[answered], "assistant")
            if answer and answer[0]["role"] != "assistant":  # it holds the question too
                return _conversation(answer, record)
            if further and isinstance(record.get(further), str) and record[further].strip():
                question[-1] = {**question[-1], "content": f"{question[-1]['content']}\n\n{record[further]}"}
            return _conversation([*question, *answer], record)
    return None


class Template:
    """The chat template of a model, with the names of the control tokens that it may write."""

    def __init__(self, reader: TextReader) -> None:
        """Take the template from the tokenizer; one that has none is found out when a chat comes."""
        self._reader = reader
        names = sorted(reader.control, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, names)) or "(?!)")

    def render(self, chat: Conversation, *, asking: bool = False) -> Chat:
        """Render a conversation, in the first of these ways that the template takes.

        As it is; with the arguments of tool calls as strings; with the system's message in the user's first.
        With `asking` the text ends where the model's answer begins.

        Raises `UnusableError` when the template takes none, or nothing of the messages reaches the text.
        """
        if not self._reader.has_template:
            raise MoneError(
                "is a chat, but the model's tokenizer has no chat template: "
                "take the model's chat version, or write the chats as text"
            )
        mark = _unused_character(chat)
        refusal = None
        for variant in _variants(chat):
            try:
                told = _mapped(variant, lambda text: self._marked(text, mark))
                marked = self._reader.render(told.messages, told.tools, _FIXED_DATE, asking=asking)
            except StoppedError:
                raise
            except Exception as error:  # a template is a program: it may fail in any way
                refusal = refusal or first_line(error)
                continue
            if not _shows_python(variant, marked):
                return self._chat(marked, mark, _texts(variant))
        raise UnusableError(
            f"cannot be rendered by the model's chat template ({refusal}); "
            'a message is an object like {"role": "user", "content": "..."}'
        )

    def _marked(self, text: str, mark: str) -> str:
        """Break the control tokens' names in a message's text by a character that is taken out again."""
        return self._control.sub(lambda found: found[0][:1] + mark + found[0][1:], text)

    def _chat(self, marked: str, mark: str, texts: list[str]) -> Chat:
        pieces, control, at, length = [], [], 0, 0
        for found in self._control.finditer(marked):
            piece = marked[at : found.start()].replace(mark, "")
            pieces += [piece, found[0]]
            length += len(piece) + len(found[0])
            control.append((length - len(found[0]), length))
            at = found.end()
        text = "".join([*pieces, marked[at:].replace(mark, "")])
        n_character = sum(len(wanted) for wanted in texts)
        n_lost = sum(_lost(wanted, text) for wanted in texts)
        if not text.strip() or n_lost == n_character:
            raise UnusableError("is a chat of whose text the model's chat template renders nothing")
        return Chat(text, tuple(control), n_character, n_lost)


def _conversation(turns: list[Any], record: Mapping[str, Any]) -> Conversation:
    messages = [_message(turn) for turn in turns]
    system = record.get("system") or record.get("system_prompt")
    if isinstance(system, str) and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": system})
    found = Conversation(messages, _tools(record.get("tools")))
    if not any(text.strip() for text in _texts(found)):
        raise UnusableError("is a chat whose messages hold no text")
    return found


def _message(turn: Any) -> Message:
    """Return a message under the usual names, without keys that have no value."""
    turn = _without_nulls(turn)
    if not isinstance(turn, dict):
        raise UnusableError(
            f'holds a message that is {_kind(turn)}, not an object like {{"role": "user", "content": "..."}}'
        )
    role = turn.pop("role", None) or turn.pop("from", None)
    if not isinstance(role, str):
        raise UnusableError('holds a message without a "role"')
    content = next((turn.pop(key) for key in ("content", "value", "text") if key in turn), "")
    message = {"role": _ROLES.get(role.lower(), role), "content": _content(content), **turn}
    if "function_call" in turn:  # the older form of tool_calls
        message["tool_calls"] = [{"type": "function", "function": _parsed(message.pop("function_call"))}]
    if calls := _parsed(message.pop("tool_calls", None)):
        message["tool_calls"] = [_call(call) for call in calls]
    if thought := next((message[key] for key in _THOUGHTS if key in message), None):
        message = {"thinking": thought, **message, "reasoning_content": thought}
    return message


def is_message(value: Any) -> bool:
    """Return whether a value looks like one message of a chat."""
    return isinstance(value, dict) and ("role" in value or "from" in value)


def _content(content: Any) -> str:
    """Return a message's text; of a list of parts that of its text parts."""
    if isinstance(content, list):
        parts = [part if isinstance(part, str) else _part(part) for part in content]
        return "\n".join(part for part in parts if part)
    if not isinstance(content, str):
        raise UnusableError(f"holds a message whose content is {_kind(content)}, not a text")
    return content


def _part(part: Any) -> str:
    if not isinstance(part, dict):
        raise UnusableError(f"holds a message with a part that is {_kind(part)}, not a text")
    return part["text"] if isinstance(part.get("text"), str) else ""


def _call(call: Any) -> Any:
    """Return a tool call whose arguments are an object, as most templates take them."""
    if not isinstance(call, dict):
        raise UnusableError(f"holds a tool call that is {_kind(call)}, not an object")
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"])}
    arguments = _parsed(call.get("arguments"))
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _tools(tools: Any) -> list[Any] | None:
    found = _without_nulls(_parsed(tools)) or None
    if found is None:
        return None
    found = [_parsed(tool) for tool in (found if isinstance(found, list) else [found])]
    if not all(isinstance(tool, dict) for tool in found):
        raise UnusableError('has "tools" that are no list of objects')
    return found


def _turns(value: Any, role: str) -> list[Message]:
    found = _parsed(value)
    if isinstance(found, list):
        return [_message(turn) for turn in found]
    return [{"role": role, "content": _content(value)}]


def _parsed(value: Any) -> Any:
    """Return the list or object that a string of JSON holds, anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    if isinstance(found, list) and not all(isinstance(item, dict) for item in found):
        return value  # a text in brackets
    return found


def _without_nulls(value: Any) -> Any:
    """Drop the keys without a value at every depth: Arrow gives each object every key of the table."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _kind(value: Any) -> str:
    names = {list: "a list", dict: "an object", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _variants(chat: Conversation) -> Iterator[Conversation]:
    """Yield the ways to give a conversation to a template, the usual one first."""
    folded = _system_in_user(chat)
    for variant in (chat, folded) if folded else (chat,):
        yield variant
        as_strings = [_with_argument_strings(message) for message in variant.messages]
        if as_strings != variant.messages:
            yield Conversation(as_strings, variant.tools)


def _system_in_user(chat: Conversation) -> Conversation | None:
    first, *rest = chat.messages
    place = next((i for i, message in enumerate(rest) if message["role"] == "user"), None)
    if first["role"] != "system" or place is None:
        return None
    rest[place] = {**rest[place], "content": f"{first['content']}\n\n{rest[place]['content']}"}
    return Conversation(rest, chat.tools)


def _with_argument_strings(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_argument_strings(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: json.dumps(item, ensure_ascii=False)
        if key == "arguments" and isinstance(item, dict)
        else _with_argument_strings(item)
        for key, item in value.items()
    }


def _shows_python(chat: Conversation, rendered: str) -> bool:
    """Return whether a template printed arguments as Python writes an object: it expects a string."""
    calls = [call for message in chat.messages for call in message.get("tool_calls", ())]
    found = [call.get("function", call).get("arguments") for call in calls]
    return any(str(value) in rendered for value in found if value and isinstance(value, dict))


def _texts(chat: Conversation) -> list[str]:
    """Return what the messages say: contents, thoughts and calls."""
    texts = []
    for message in chat.messages:
        texts += [message["content"]]
        texts += [thought for key in _THOUGHTS if isinstance(thought := message.get(key), str)][:1]
        for call in message.get("tool_calls", ()):
            texts.append(str(call.get("function", call).get("name", "")))
    return texts


def _lost(wanted: str, text: str) -> int:
    """Count the characters of a message that are not in the text; each line is looked for on its own."""
    if wanted.strip() in text or json.dumps(wanted, ensure_ascii=False)[1:-1] in text:
        return 0
    return sum(len(line) for line in wanted.splitlines(keepends=True) if line.strip() not in text)


def _mapped(chat: Conversation, change: Callable[[str], str]) -> Conversation:
    messages = [{**_changed(message, change), "role": message["role"]} for message in chat.messages]
    return Conversation(messages, None if chat.tools is None else _changed(chat.tools, change))


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _changed(item, change) for key, item in value.items()}
    return [_changed(item, change) for item in value] if isinstance(value, list) else value


def _unused_character(chat: Conversation) -> str:
    """Return a character for private use that the conversation does not hold."""
    held = json.dumps([chat.messages, chat.tools], ensure_ascii=False, default=str)
    return next(character for character in map(chr, range(0xF0000, 0xFFFFE)) if character not in held)


def _date_macro() -> str:
    """Return a macro that takes the place of `strftime_now`, which transformers gives a template."""
    codes = "aAbBcdHIjmMpSUwWxXyYZ"
    replaced = "".join(f"|replace('%{code}', '{DATE.strftime('%' + code)}')" for code in codes)
    return "{% macro strftime_now(format) %}{{ format|replace('%-', '%')" + replaced + " }}{% endmacro %}\n"


_FIXED_DATE = _date_macro()
