"""Calibration text: files or the built-in documents, tokenised and cut into equal rows.

The rule, so that anybody can repeat it: documents in the order given, each tokenised on its own with the
tokenizer's special tokens (usually one BOS in front), concatenated, cut into rows of `seq_len` tokens, the
first `n_row` rows taken; an incomplete last row is dropped. Rows are equal in length, so no padding ever
exists.
"""

import ast
import hashlib
import importlib.metadata
import json
import logging
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mone_export.artifacts import Corpus
from mone_export.errors import MoneError

log = logging.getLogger(__name__)

Split = Literal["calibration", "held-out"]
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Document:
    """One text with the kind of its source: `python` code, `prose`, or `file` for the user's own."""

    name: str
    kind: Literal["python", "prose", "file"]
    text: str


def read_corpus(
    paths: Iterable[Path] | None, tokenizer: PreTrainedTokenizerBase, *, n_row: int = 100, seq_len: int = 2048
) -> Corpus:
    """Read text or JSONL files (or the built-in documents, when `paths` is empty) into a `Corpus`.

    Raises `MoneError` when a file cannot be used or the text gives fewer than `n_row` rows.
    """
    paths = [Path(path) for path in paths or ()]
    documents = read_documents(paths) if paths else builtin_documents("calibration")
    name = ", ".join(path.name for path in paths) or "built-in"
    return make_corpus(documents, tokenizer, name=name, n_row=n_row, seq_len=seq_len)


def make_corpus(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    n_row: int,
    seq_len: int,
) -> Corpus:
    """Tokenise documents by the module's rule, reading no more of them than the rows need."""
    if n_row < 1 or seq_len < 2:
        raise MoneError(
            f"--chunks {n_row} of --ctx-size {seq_len} tokens: at least 1 row of 2 tokens is needed"
        )
    ids: list[int] = []
    for document in documents:
        # verbose=False: a document longer than the model's context is expected here, it is cut into rows
        ids += tokenizer(document.text, verbose=False)["input_ids"]
        if len(ids) >= n_row * seq_len:
            break
    available = len(ids) // seq_len
    if available < n_row:
        remedy = f"add text or pass --chunks {available}" if available else "add text or lower --ctx-size"
        raise MoneError(
            f"{name} gives {available} rows of {seq_len} tokens ({len(ids)} tokens), "
            f"--chunks asks for {n_row}: {remedy}"
        )
    tokens = torch.tensor(ids[: n_row * seq_len], dtype=torch.int64).reshape(n_row, seq_len)
    return Corpus(tokens=tokens, name=name, sha256=_fingerprint(tokens))


def read_documents(paths: Iterable[Path]) -> Iterator[Document]:
    """Yield the documents of text files (one each) and of `.jsonl` files (one per line, field `text`)."""
    for path in paths:
        text = _read_text(path)
        if path.suffix == ".jsonl":
            yield from _jsonl_documents(path, text)
        else:
            yield Document(name=path.name, kind="file", text=text)


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


def _jsonl_documents(path: Path, text: str) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise MoneError(
                f"{path}:{number} is not JSON ({error.msg}); one JSON object per line is expected"
            ) from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise MoneError(
                f'{path}:{number} has no string field "text"; write one object like {{"text": "..."}}'
            )
        if any("\ud800" <= character <= "\udfff" for character in record["text"]):
            raise MoneError(f"{path}:{number} holds half a surrogate pair, no character: write it as UTF-8")
        yield Document(name=f"{path.name}:{number}", kind="file", text=record["text"])


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


def _fingerprint(tokens: Tensor) -> str:
    header = json.dumps(list(tokens.shape)).encode()
    return hashlib.sha256(header + tokens.numpy().astype("<i8").tobytes()).hexdigest()
