"""Documents to calibrate with: from files, from datasets, or built in.

A file is read by what it holds, not by its name: plain text, JSON (an object per line, or one value),
Parquet, any of them compressed. A record holds its text in one field, or is a chat, rendered with the model's
own template.
"""

import ast
import bz2
import codecs
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import lzma
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from mone_export.calibration.chats import Template, UnusableError, conversation, is_message
from mone_export.errors import MoneError, first_line
from mone_export.source.tokenizing import TextReader, as_reader

if TYPE_CHECKING:
    from importlib.metadata import Distribution

    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Split = Literal["calibration", "held-out"]
HELD_OUT_SHARE = 0.1
_SHUFFLED_AT_A_TIME = 10_000  # records of a dataset: it is read as a stream
_TRIED = 1000  # records, none of which can be used, after which reading ends
_BLOCK = 1 << 18  # bytes read at a time: the form of a file is told from the first

_HALF_A_PAIR = re.compile("[\ud800-\udfff]")
_COMPRESSED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_REFUSED = {  # what a file begins with: what it is and what to do
    b"\x28\xb5\x2f\xfd": ("is compressed with Zstandard", "unpack it: zstd -d {path}"),
    b"PK\x03\x04": ("is a ZIP archive", "unpack it: unzip {path}"),
    b"ARROW1": ("is an Arrow file", "pass the dataset's folder to --dataset"),
}
_BYTE_ORDER_MARKS = (  # the longer ones first
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

Row = tuple[str, Any]  # a record and its place, for messages


@dataclass(frozen=True, slots=True)
class Document:
    """One text with the kind of its source: `python` code or `prose`, built in; the user's `file` or `chat`.

    The text of a `chat` is rendered; `control` are the places (start, end) of its control tokens. Of a long
    file, `rest` yields, once, what follows `text`.
    """

    name: str
    kind: Literal["python", "prose", "file", "chat"]
    text: str
    control: tuple[tuple[int, int], ...] = ()
    rest: Iterable[str] = ()


def read_documents(
    path: Path, tokenizer: "TextReader | PreTrainedTokenizerBase", *, field: str = "text"
) -> Iterator[Document]:
    """Yield the one document of a text file, or those of a file of records: one for each text or chat.

    Records that cannot be used are counted and the first is named. Raises `MoneError` when the file cannot be
    read, or none of its records can be used.
    """
    with _errors_named(path), _opened(path) as file:
        if file.read(4) == b"PAR1":
            yield from _usable(_parquet_rows(path, file), tokenizer, field, str(path))
            return
        file.seek(0)
        blocks = _decoded(path, file)
        head = next(blocks, "")
        while not head.strip():
            if (block := next(blocks, None)) is None:
                raise MoneError(
                    f"the calibration text {path} is empty; pass text like what the model will be used for"
                )
            head += block
        more = next(blocks, None)
        following = () if more is None else itertools.chain([more], blocks)
        rows = _json_rows(path, head, following)
        if rows is None:
            yield Document(name=path.name, kind="file", text=head, rest=following)
        else:
            yield from _usable(rows, tokenizer, field, str(path))


def read_dataset(
    name: str, tokenizer: "TextReader | PreTrainedTokenizerBase", *, field: str = "text", seed: int = 0
) -> Iterator[Document]:
    """Yield the records of a dataset `id[:config][:split]`, a hub id or a folder, shuffled by `seed`.

    Of one word after the id, a configuration comes before a split; without a split it is `train`. Records are
    streamed: only what is used is downloaded, and drawn at random from 10,000 at a time.

    Raises `MoneError` when the package `datasets` is missing, or it cannot find or read the data, or none of
    its records can be used.
    """
    try:
        import datasets
    except ImportError:
        raise MoneError("--dataset needs the package datasets: pip install 'mone-export[dataset]'") from None
    datasets.disable_progress_bars()
    yield from _usable(_dataset_rows(datasets, name, seed), tokenizer, field, f"the dataset {name}")


def _dataset_rows(datasets: Any, name: str, seed: int) -> Iterator[Row]:
    """Yield the records of a dataset; whatever the libraries below raise becomes one line."""
    try:
        found, config, split = _locate(datasets, name)
        records = datasets.load_dataset(found, config, split=split, streaming=True)
        records = iter(records.shuffle(seed=seed, buffer_size=_SHUFFLED_AT_A_TIME))
    except MoneError:
        raise
    except Exception as error:  # of the hub, HTTP, YAML, Arrow
        raise MoneError(f"cannot read the dataset {name}: {first_line(error)}; check its name") from None
    for number in itertools.count(1):
        try:
            record = next(records)
        except StopIteration:
            return
        except Exception as error:
            raise MoneError(
                f"cannot read the dataset {name} after record {number - 1}: {first_line(error)}; "
                "check its name and files"
            ) from None
        yield f"{name}, record {number}", record


def _locate(datasets: Any, name: str) -> tuple[str, str | None, str]:
    """Return (id, configuration, split) of `id[:config][:split]`, asking which there are."""
    found, *words = [name] if Path(name).exists() else name.split(":")
    if found.isidentifier() and not Path(found).exists() and _is_reader(found):
        raise MoneError(
            f"{found} is a file format that the package datasets reads, no dataset: it would take every such "
            "file under the working folder; pass a dataset's id or folder, or a file to -f"
        )
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


def _is_reader(name: str) -> bool:
    return importlib.util.find_spec(f"datasets.packaged_modules.{name}") is not None


def builtin_documents(split: Split) -> Iterator[Document]:
    """Yield text that every machine with Python has, in a fixed, mixed order.

    The standard library's sources (`python`), and as `prose` its docstrings, its manual topics and the long
    descriptions of the installed packages. A tenth of it, chosen by name, is `held-out`: never used for
    calibration nor for training the demo model. The same Python and packages give the same documents.
    """
    sources = stdlib_sources()
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


def check_there(path: Path) -> None:
    """Raise `MoneError` for a text that is not there, or out of reach."""
    with _errors_named(path):
        path.stat()


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, lzma.LZMAError) as error:  # EOFError: a compressed file that ends too early
        reason = getattr(error, "strerror", None) or first_line(error)
        raise MoneError(
            f"cannot read the calibration text {path}: {reason}; pass a readable file to -f"
        ) from None


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file, and unpack it while it is read."""
    with path.open("rb") as file:
        begins = file.read(8)
        file.seek(0)
        for magic, (what, remedy) in _REFUSED.items():
            if begins.startswith(magic):
                raise MoneError(f"the calibration text {path} {what}; {remedy.format(path=path)}")
        unpacked = next((opener for magic, opener in _COMPRESSED.items() if begins.startswith(magic)), None)
        if unpacked is None:
            yield file
        else:
            with unpacked(file) as content:
                yield content


def _decoded(path: Path, file: BinaryIO) -> Iterator[str]:
    """Yield a file's text in blocks, each line end as one newline; a byte order mark names the encoding."""
    begins = file.read(4)
    mark, encoding = next(
        ((mark, name) for mark, name in _BYTE_ORDER_MARKS if begins.startswith(mark)), (b"", "utf-8")
    )
    file.seek(len(mark))
    n_read = len(mark)
    decoder = codecs.getincrementaldecoder(encoding)()
    newlines = io.IncrementalNewlineDecoder(decoder, translate=True)
    while True:
        with _errors_named(path):
            block = file.read(_BLOCK)
        if not mark and b"\0" in block:
            raise MoneError(
                f"the calibration text {path} holds zero bytes: it is no text, or UTF-16 without a byte "
                f"order mark; convert it: iconv -f utf-16le -t utf-8 {path} > {path.stem}-utf8{path.suffix}"
            )
        kept = len(decoder.getstate()[0])  # the beginning of a character, from the block before
        try:
            text = newlines.decode(block, final=not block)
        except UnicodeDecodeError as error:
            at = n_read - kept + error.start
            raise MoneError(
                f"the calibration text {path} is not {encoding.upper()} (byte {at}): "
                f"convert it; if it is of Windows: iconv -f cp1252 -t utf-8 {path} > "
                f"{path.stem}-utf8{path.suffix}"
            ) from None
        n_read += len(block)
        if text:
            yield text
        if not block:
            return


def _json_rows(path: Path, head: str, following: Iterable[str]) -> Iterator[Row] | None:
    """Return the records of a JSON text, None when it is plain text: prose may begin with a bracket, too.

    `head` is the beginning of the text or, where nothing is `following`, all of it.
    """
    named = {suffix.lower() for suffix in path.suffixes[-2:]} & {".json", ".jsonl", ".ndjson"}
    lines = [line for line in head.split("\n")[: -1 if following else None] if line.strip()]
    n_object = sum(isinstance(_value(line), dict) for line in lines)
    by_line = 2 * n_object > len(lines) if not named - {".json"} else n_object > 0
    if not by_line and head.lstrip().startswith(("[", "{")) and (following == () or _begins_json(head)):
        text = "".join([head, *following])
        try:
            return _value_rows(path, text)
        except (ValueError, RecursionError) as error:
            if following != () or ".json" in named:
                raise MoneError(
                    f"{path} begins like JSON, but is not ({first_line(error)}): mend it, or write it as one "
                    'record like {"text": "..."}'
                ) from None
    return _line_rows(path, itertools.chain([head], following)) if by_line or named - {".json"} else None


def _value(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _begins_json(head: str) -> bool:
    """Return whether a text may be JSON that goes on after its `head`."""
    try:
        json.JSONDecoder().raw_decode(head.lstrip())
    except json.JSONDecodeError as error:
        # the decoder stops within a few characters of the end, or names the start of a string without end
        return error.pos > len(head.lstrip()) - 16 or error.msg.startswith("Unterminated string")
    except RecursionError:
        return False
    return True


def _value_rows(path: Path, text: str) -> Iterator[Row]:
    """Return the records of JSON values, one after another: arrays of records, or objects.

    Raises `ValueError` when the text is anything else.
    """
    records: list[Any] = []
    decoder, at = json.JSONDecoder(), len(text) - len(text.lstrip())
    while at < len(text):
        value, end = decoder.raw_decode(text, at)
        records += _records_in(value)
        at = end + len(text[end:]) - len(text[end:].lstrip())
    if not records:
        raise ValueError("no records")
    return ((f"{path}, record {number}", record) for number, record in enumerate(records, start=1))


def _records_in(value: Any) -> list[Any]:
    """Return the records of an array, or of an object that holds one; a list of messages is one chat."""
    if isinstance(value, list):
        if value and all(map(is_message, value)):
            return [{"messages": value}]
        if any(all(isinstance(item, kind) for item in value) for kind in (dict, list, str)):
            return value
    if isinstance(value, dict):
        held = [item for item in value.values() if isinstance(item, list) and item]
        inside = held[0] if len(held) == 1 and all(isinstance(item, dict) for item in held[0]) else []
        return inside if inside and not any(map(is_message, inside)) and "tools" not in value else [value]
    raise ValueError("neither an object nor an array of records")


def _line_rows(path: Path, blocks: Iterable[str]) -> Iterator[Row]:
    """Yield the JSON value of each line, and the error in the place of a line that is none."""
    for number, line in enumerate(_lines(blocks), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
            yield (
                f"{path}:{number}",
                UnusableError(f"is not JSON ({reason}); one object per line is expected"),
            )


def _lines(blocks: Iterable[str]) -> Iterator[str]:
    """Split at newlines only: JSON allows other separators inside a string."""
    kept = ""
    for block in blocks:
        *lines, kept = (kept + block).split("\n")
        yield from lines
    yield kept


def _parquet_rows(path: Path, file: BinaryIO) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MoneError(
            f"{path} is a Parquet file, which needs the package pyarrow: pip install 'mone-export[dataset]'"
        ) from None
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=64):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}, record {number}", record
    except pyarrow.ArrowException as error:
        raise MoneError(
            f"cannot read {path} after record {number}: {first_line(error)}; get it again"
        ) from None


def _usable(
    rows: Iterable[Row], tokenizer: "TextReader | PreTrainedTokenizerBase", field: str, name: str
) -> Iterator[Document]:
    """Yield the documents of those records that are one, and say in the end how many were not."""
    reader = _RecordReader(Template(as_reader(tokenizer)), field)
    try:
        for place, row in rows:
            if (document := reader.document(place, row)) is not None:
                yield document
            elif not reader.n_used and reader.n_skipped == _TRIED:
                break
    finally:
        reader.report(name)
    if not reader.n_used:
        every = (
            "" if reader.n_skipped == 1 else f"none of {reader.n_skipped} records can be used; the first: "
        )
        raise MoneError(every + reader.first)


class _RecordReader:
    """Turns records into documents, and counts what could not be used and what the template left out."""

    def __init__(self, template: Template, field: str) -> None:
        self._template, self._field = template, field
        self.n_used = self.n_skipped = 0
        self._n_chat = self._n_character = self._n_lost = 0
        self.first = ""  # why the first record that was skipped was

    def document(self, place: str, record: Any) -> Document | None:
        """Return the record's document, None when it has none."""
        try:
            document = self._document(place, record)
        except UnusableError as error:
            self.n_skipped += 1
            self.first = self.first or f"{place} {error}"
            return None
        except MoneError as error:
            raise MoneError(f"{place} {error}") from None
        self.n_used += 1
        return document

    def report(self, name: str) -> None:
        """Say what was left out."""
        if self.n_used and self.n_skipped:
            total = self.n_used + self.n_skipped
            log.warning(
                "%s: %d of %d records not used; the first: %s", name, self.n_skipped, total, self.first
            )
        if self._n_lost:
            log.info(
                "%s: %.1f%% of the text of %d chats is not in what the model's chat template renders",
                *(name, 100 * self._n_lost / self._n_character, self._n_chat),
            )

    def _document(self, place: str, record: Any) -> Document:
        if isinstance(record, UnusableError):
            raise record
        record = {self._field: record} if isinstance(record, (str, list)) else record
        found = conversation(record, self._field) if isinstance(record, dict) else None
        if found is not None:
            chat = self._template.render(found)
            self._n_chat += 1
            self._n_character += chat.n_character
            self._n_lost += chat.n_lost
            document = Document(place, "chat", chat.text, chat.control)
        else:
            text = record.get(self._field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise UnusableError(
                    f'has no string field "{self._field}": write one object like {{"{self._field}": "..."}} '
                    'or {"messages": [...]}, or name the field with --field'
                )
            document = Document(place, "file", text)
        if _HALF_A_PAIR.search(document.text):
            raise UnusableError("holds half a surrogate pair, no character: write it as UTF-8")
        return document


def stdlib_sources() -> dict[str, Path]:
    """Return the source files of the standard library, by their path in it; tests and tables are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "pydoc_data", "encodings"}
    found: dict[str, Path] = {}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped]
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        found |= {path.relative_to(root).as_posix(): path for path in paths if path.stat().st_size > 0}
    return found


def _manual_topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics  # some distributions package it separately
    except ImportError:
        return {}
    return {f"manual/{name}": text for name, text in topics.items()}


def _package_descriptions() -> dict[str, str]:
    from importlib.metadata import distributions  # which brings a reader of mails

    texts = {}
    for distribution in distributions():
        name, text = _described(distribution)
        if text.strip():
            texts[f"package/{name}"] = text
    return texts


def _described(distribution: "Distribution") -> tuple[str, str]:
    """Return a package's name and long description, which is the body of its metadata, or a field."""
    fields, _, body = (distribution.read_text("METADATA") or "").partition("\n\n")
    name = re.search("^Name: *(.*)", fields, re.M)
    if name and body and not re.search("^Description:", fields, re.M):
        return name[1], body
    metadata: Any = distribution.metadata  # an email.message.Message, which takes ten times as long
    return metadata["Name"], metadata["Description"] or str(metadata.get_payload())


def _docstrings(source: str) -> str:
    try:
        nodes: list[Any] = [ast.parse(source)]
    except (SyntaxError, ValueError):
        return ""
    for node in nodes:  # breadth first, and past all expressions: only statements hold definitions
        for part in ("body", "handlers", "orelse", "finalbody", "cases"):
            nodes += getattr(node, part, ())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in nodes if isinstance(node, documented)]
    return "\n\n".join(text for text in found if text)


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
