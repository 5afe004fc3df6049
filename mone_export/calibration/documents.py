"""Documents to calibrate with: from files, from datasets, or built in.

A record of a JSONL file or a dataset holds its text in one field, or is a chat: a list of messages, rendered
with the model's own chat template.
"""

import ast
import hashlib
import importlib.metadata
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from mone_export.errors import MoneError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["calibration", "held-out"]
HELD_OUT_SHARE = 0.1
_SHUFFLED_AT_A_TIME = 10_000  # records of a dataset: it is read as a stream


@dataclass(frozen=True, slots=True)
class Document:
    """One text with the kind of its source: `python` code or `prose`, built in; the user's `file` or `chat`.

    The text of a `chat` is rendered and holds its special tokens.
    """

    name: str
    kind: Literal["python", "prose", "file", "chat"]
    text: str


def read_documents(
    path: Path, tokenizer: "PreTrainedTokenizerBase", *, field: str = "text"
) -> Iterator[Document]:
    """Yield the one document of a text file, or those of a `.jsonl` file: one per line, a text or a chat.

    Raises `MoneError` when the file cannot be read, or names the line that holds neither.
    """
    text = _read_text(path)
    if path.suffix != ".jsonl":
        yield Document(name=path.name, kind="file", text=text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise MoneError(
                f"{path}:{number} is not JSON ({error.msg}); one JSON object per line is expected"
            ) from None
        yield _document(record, f"{path}:{number}", tokenizer, field)


def read_dataset(
    name: str, tokenizer: "PreTrainedTokenizerBase", *, field: str = "text", seed: int = 0
) -> Iterator[Document]:
    """Yield the records of a dataset `id[:config][:split]`, a hub id or a folder, shuffled by `seed`.

    Of one word after the id, a configuration comes before a split; without a split it is `train`. Records are
    streamed: only what is used is downloaded, and drawn at random from 10,000 at a time.

    Raises `MoneError` when the package `datasets` is missing, or it cannot find or read the data.
    """
    try:
        import datasets
    except ImportError:
        raise MoneError("--dataset needs the package datasets: pip install 'mone-export[dataset]'") from None
    datasets.disable_progress_bars()
    try:
        found, config, split = _locate(datasets, name)
        records = datasets.load_dataset(found, config, split=split, streaming=True)
        records = records.shuffle(seed=seed, buffer_size=_SHUFFLED_AT_A_TIME)
        for number, record in enumerate(records, start=1):
            yield _document(record, f"{name}, record {number}", tokenizer, field)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise MoneError(f"cannot read the dataset {name}: {first_line(error)}; check its name") from None


def _locate(datasets: Any, name: str) -> tuple[str, str | None, str]:
    """Return (id, configuration, split) of `id[:config][:split]`, asking which there are."""
    found, *words = [name] if Path(name).exists() else name.split(":")
    configs = datasets.get_dataset_config_names(found)
    config = words.pop(0) if len(words) > 1 or (words and words[0] in configs) else None
    config = config or datasets.get_dataset_default_config_name(found)
    if config not in configs:
        raise MoneError(f"the dataset {found} has the configurations {', '.join(configs)}: name one of them")
    splits = datasets.get_dataset_split_names(found, config)
    split = words[0] if words else "train" if "train" in splits else splits[0]
    if split not in splits:
        raise MoneError(
            f"the dataset {found} has no split {split}, but {', '.join(splits)}: name one of them"
        )
    return found, config, split


def builtin_documents(split: Split) -> Iterator[Document]:
    """Yield text that every machine with Python has, in a fixed, mixed order.

    The standard library's sources (`python`), and as `prose` its docstrings, its manual topics and the long
    descriptions of the installed packages. A tenth of it, chosen by name, is `held-out`: never used for
    calibration nor for training the demo model. The same Python and packages give the same documents.
    """
    sources = _stdlib_sources()
    prose = _package_descriptions() | _manual_topics()
    names = [*(f"python/{name}" for name in sources), *(f"docstrings/{name}" for name in sources), *prose]
    for name in sorted(names, key=_digest):
        topic = name.partition("/")[2]
        if (_digest(topic)[0] < 256 * HELD_OUT_SHARE) != (split == "held-out"):
            continue
        if name in prose:
            yield Document(name, "prose", prose[name])
            continue
        source = sources[topic].read_text(encoding="utf-8", errors="replace")
        if name.startswith("python/"):
            yield Document(name, "python", source)
        elif text := _docstrings(source):
            yield Document(name, "prose", text)


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark in front
    except OSError as error:
        raise MoneError(
            f"cannot read the calibration text {path}: {error.strerror}; pass a readable file to -f"
        ) from None
    except UnicodeDecodeError as error:
        raise MoneError(
            f"the calibration text {path} is not UTF-8 (byte {error.start}); convert it: iconv -t utf-8"
        ) from None
    if not text.strip():
        raise MoneError(
            f"the calibration text {path} is empty; pass text like what the model will be used for"
        )
    return text


def _document(record: Any, place: str, tokenizer: "PreTrainedTokenizerBase", field: str) -> Document:
    """Turn a record into a document: its field's text or messages, else its `messages`."""
    value = None
    if isinstance(record, dict):
        value = record[field] if field in record else record.get("messages")
    if isinstance(value, list):
        return Document(name=place, kind="chat", text=_render(value, record, place, tokenizer))
    if not isinstance(value, str):
        raise MoneError(
            f'{place} has no string field "{field}": write one object like {{"{field}": "..."}} '
            'or {"messages": [...]}, or name the field with --field'
        )
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise MoneError(f"{place} holds half a surrogate pair, no character: write it as UTF-8")
    return Document(name=place, kind="file", text=value)


def _render(messages: list[Any], record: Any, place: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    if not tokenizer.chat_template:
        raise MoneError(
            f"{place} is a chat, but the model's tokenizer has no chat template: "
            "take the model's chat version, or write the chats as text"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tools=record.get("tools"), tokenize=False))
    except (TemplateError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise MoneError(
            f"{place}: the model's chat template cannot render these messages ({first_line(error)}); "
            'a message is an object like {"role": "user", "content": "..."}'
        ) from None


def _stdlib_sources() -> dict[str, Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "pydoc_data", "encodings"}
    return {
        path.relative_to(root).as_posix(): path
        for path in root.rglob("*.py")
        if not skipped.intersection(path.relative_to(root).parts) and path.stat().st_size > 0
    }


def _manual_topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics  # some distributions package it separately
    except ImportError:
        return {}
    return {f"manual/{name}": text for name, text in topics.items()}


def _package_descriptions() -> dict[str, str]:
    texts = {}
    for distribution in importlib.metadata.distributions():
        metadata: Any = distribution.metadata  # an email.message.Message: the description is field or body
        text = metadata["Description"] or str(metadata.get_payload())
        if text and text.strip():
            texts[f"package/{distribution.metadata['Name']}"] = text
    return texts


def _docstrings(source: str) -> str:
    try:
        nodes = ast.walk(ast.parse(source))
    except (SyntaxError, ValueError):
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in nodes if isinstance(node, documented)]
    return "\n\n".join(text for text in found if text)


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
