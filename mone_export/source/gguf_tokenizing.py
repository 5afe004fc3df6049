"""A GGUF's own tokenizer and chat template: what llama.cpp's tools make of a text, without transformers.

The tokenizer is llama.cpp's, of the model loaded without its weights; a `Sandbox` renders the template.
"""

import ctypes
import logging
import re
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from mone_export.errors import MoneError
from mone_export.source.sandbox import Sandbox
from mone_export.source.tokenizing import ControlToken, around

log = logging.getLogger(__name__)

_ERROR = 4  # GGML_LOG_LEVEL_ERROR of ggml.h
_SHORT = 1024  # characters of a text that any stack has room for
_STACK = 1 << 28  # bytes; the system gives no more of them than are used
_TEMPLATE = "tokenizer.chat_template"
_SPECIAL = {  # a template's name of a token: a GGUF's
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",
    "pad_token": "padding",
    "mask_token": "mask",
}


class GgufReader:
    """A `TextReader` of a GGUF."""

    def __init__(self, path: Path) -> None:
        """Begin to load the tokenizer, no weights, in a thread: it takes up to half a second.

        Whatever is asked first waits for it; it raises `MoneError` when llama.cpp finds none that it can use.
        """
        self._path, self._sandbox = path, Sandbox()
        thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._loading = thread.submit(_load, path)
        thread.shutdown(wait=False)

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return bool(self._template)

    @cached_property
    def before(self) -> list[int]:
        """The special tokens in front of a document."""
        return self._around[0]

    @cached_property
    def after(self) -> list[int]:
        """The special tokens at its end."""
        return self._around[1]

    @cached_property
    def control(self) -> Mapping[str, ControlToken]:
        """The tokens that llama.cpp finds in a text by name when it is told to, and only then."""
        llama, found = self._llama, {}
        for token in range(llama.llama_vocab_n_tokens(self._vocab)):
            attr = llama.llama_vocab_get_attr(self._vocab, token)
            is_control = attr & (llama.LLAMA_TOKEN_ATTR_CONTROL | llama.LLAMA_TOKEN_ATTR_UNKNOWN)
            if is_control and (name := self._name(token)):
                strips = (llama.LLAMA_TOKEN_ATTR_LSTRIP, llama.LLAMA_TOKEN_ATTR_RSTRIP)
                found[name] = ControlToken(token, *(bool(attr & side) for side in strips))
        return found

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text alone."""
        return self._tokens(text) if len(text) <= _SHORT else _with_room(lambda: self._tokens(text))

    def render(
        self, messages: list[Any], tools: list[Any] | None, prefix: str, *, asking: bool = False
    ) -> str:
        """Return what the chat template, with `prefix` put before it, makes of messages and tools.

        With `asking` it ends where the model's answer begins. Like transformers, this gives the template
        nothing but plain values.
        """
        with_tools = self._value(f"{_TEMPLATE}.tool_use") if tools else ""
        template = with_tools or self._template
        given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": asking}
        return self._sandbox.render(prefix + template, self._special | given)

    @property
    def _llama(self) -> Any:
        return _library()

    @cached_property
    def _model(self) -> Any:
        model = self._loading.result()
        weakref.finalize(self, self._llama.llama_model_free, model).atexit = False
        return model

    @cached_property
    def _vocab(self) -> Any:
        vocab = self._llama.llama_model_get_vocab(self._model)
        if self._llama.llama_vocab_type(vocab) == self._llama.LLAMA_VOCAB_TYPE_NONE:
            kind = self._value("tokenizer.ggml.model")
            raise MoneError(
                f"{self._path} holds no tokenizer (tokenizer.ggml.model is {kind}): convert the model again "
                "together with its tokenizer's files"
            )
        return vocab

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        return around(self._tokens("a"), self._tokens("a", add_special=True))

    @cached_property
    def _template(self) -> str:
        return self._value(_TEMPLATE)

    @cached_property
    def _special(self) -> dict[str, str]:
        ids = {name: self._value(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL.items()}
        return {name: self._name(int(found)) for name, found in ids.items() if found}

    def _tokens(self, text: str, *, add_special: bool = False) -> list[int]:
        content = text.encode()
        n_token = -len(content) - 8  # a token has a byte or more, unless a normaliser made text longer
        while n_token < 0:
            found = (self._llama.llama_token * -n_token)()
            n_token = self._llama.llama_tokenize(
                self._vocab, content, len(content), found, len(found), add_special, False
            )
        return list(found[:n_token])

    def _name(self, token: int) -> str:
        name: bytes = self._llama.llama_vocab_get_text(self._vocab, token)
        return name.decode(errors="replace")

    def _value(self, key: str) -> str:
        """Return the value of a key as text, an empty one where there is no such key."""
        length = max(self._llama.llama_model_meta_val_str(self._model, key.encode(), None, 0), 0)
        value = ctypes.create_string_buffer(length + 1)
        self._llama.llama_model_meta_val_str(self._model, key.encode(), value, length + 1)
        return value.value.decode(errors="replace")


def _with_room(call: Callable[[], list[int]]) -> list[int]:
    """Call with a large stack: a word costs most of llama.cpp's pre-tokenizers 400 bytes per character."""
    usual = threading.stack_size(_STACK)
    try:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(call).result()
    finally:
        threading.stack_size(usual)


def _library() -> Any:
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError):  # the package, or its library, is not there
        raise MoneError("a GGUF's tokenizer is read by llama.cpp: run `mone-llama build`") from None
    return llama_cpp


def _load(path: Path) -> Any:
    """Return a model without its weights; what llama.cpp says of it is said at debug level."""
    llama = _library()
    listener, errors = _listener()
    errors.clear()
    llama.llama_log_set(listener, None)
    llama.llama_backend_init()
    settings = llama.llama_model_default_params()
    settings.vocab_only = True
    model = llama.llama_model_load_from_file(bytes(path), settings)
    if not model:
        reason = re.sub(r"^\w+: (error loading model[\w ]*: )*", "", errors[0] if errors else "unknown error")
        raise MoneError(
            f"llama.cpp cannot read the tokenizer in {path}: {reason}; convert the model again with the "
            "llama.cpp that `mone-llama info` names"
        )
    return model


@cache
def _listener() -> tuple[Any, list[str]]:
    """Return a function for llama.cpp's log, which must live as long as the process, and errors it heard."""
    llama, errors = _library(), list[str]()

    def listen(level: int, text: bytes, _: Any) -> None:
        line = text.decode(errors="replace").strip()
        log.debug("llama.cpp: %s", line)
        if level == _ERROR:
            errors.append(line)

    return llama.llama_log_callback(listen), errors
