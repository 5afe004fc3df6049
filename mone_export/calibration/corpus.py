"""Calibration text: documents tokenised and cut into equal rows.

The rule, so that anybody can repeat it: documents in the order given, each tokenised on its own with the
tokenizer's special tokens (usually one BOS in front; a chat has those of its template instead; a name of one
in a text is text), concatenated, cut into rows of `seq_len` tokens, the first `n_row` rows taken; an
incomplete last row is dropped. Rows are full and equal in length, so no padding ever exists.

With weights, each text is cut into rows of its own by that rule and gives its share of the `n_row`; rows of
different texts then alternate evenly, so that the first rows are a mix like the whole.
"""

import hashlib
import json
import logging
import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mone_export.artifacts import Corpus, TextSample
from mone_export.calibration.documents import (
    Document,
    builtin_documents,
    check_there,
    read_dataset,
    read_documents,
)
from mone_export.errors import MoneError
from mone_export.lazily import Tensor
from mone_export.source.tokenizing import Encoder, TextReader, as_reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PIECE, _PIECE_EVERY = 512, 2048  # characters of a text that are looked at, of so many
BUILT_IN = "built-in"  # the name of the text where none is given

log = logging.getLogger(__name__)


class _Text(NamedTuple):
    """What one -f or --dataset gives: documents, and their weight if it is said."""

    name: str
    documents: Iterable[Document]
    weight: float | None = None


def read_corpus(
    files: Iterable[str | Path] | None,
    tokenizer: "TextReader | PreTrainedTokenizerBase",
    *,
    datasets: Iterable[str] = (),
    field: str = "text",
    seed: int = 0,
    n_row: int = 100,
    seq_len: int = 2048,
) -> Corpus:
    """Read texts, or the built-in documents where none is given, into a `Corpus`.

    `files` are paths of text or JSONL files, `datasets` have the form `id[:config][:split]`. Any of them may
    end in `=WEIGHT`, then all must: the rows are shared out in proportion. `field` is where records hold
    their text; `seed` shuffles datasets.

    Raises `MoneError` when a text cannot be used or there are fewer than `n_row` rows.
    """
    reader = as_reader(tokenizer)
    texts = [_file_text(str(file), reader, field) for file in files or ()]
    texts += [_dataset_text(name, reader, field, seed) for name in datasets]
    if not texts:
        texts = [_Text(BUILT_IN, builtin_documents("calibration"))]
    weights = [text.weight for text in texts if text.weight is not None]
    encoder = Encoder(reader)
    if not weights:
        return _corpus(texts, encoder, n_row=n_row, seq_len=seq_len)
    if len(weights) < len(texts):
        without = next(text.name for text in texts if text.weight is None)
        raise MoneError(f"{without} has no weight, but others have: give =WEIGHT to every text or to none")
    mixed = [
        _corpus([text], encoder, n_row=share, seq_len=seq_len)
        for text, share in zip(texts, _rows_per_text(texts, weights, n_row), strict=True)
    ]
    return _interleaved(mixed)


def read_all(
    file: Path,
    tokenizer: "TextReader | PreTrainedTokenizerBase",
    *,
    field: str = "text",
    n_row: int = 100,
    seq_len: int = 2048,
) -> Corpus:
    """Read one text into as many rows as it has, `n_row` at most; one that is shorter than a row is one row.

    Raises `MoneError` when it cannot be used.
    """
    reader, ids = as_reader(tokenizer), list[int]()
    _append_ids(ids, read_documents(file, reader, field=field), Encoder(reader), n_row * seq_len)
    if len(ids) < 2:
        raise MoneError(f"{file} gives {len(ids)} tokens, too few to run a model on: add text")
    length = min(seq_len, len(ids))
    n_whole = min(n_row, len(ids) // length)
    rows = np.array(ids[: n_whole * length], np.int64).reshape(n_whole, length)
    return Corpus(rows, file.name, fingerprint_rows(rows), {file.name: rows.size})


def make_corpus(
    documents: Iterable[Document],
    tokenizer: "TextReader | PreTrainedTokenizerBase",
    *,
    name: str,
    n_row: int,
    seq_len: int,
) -> Corpus:
    """Tokenise documents by the module's rule, reading no more of them than the rows need."""
    return _corpus([_Text(name, documents)], Encoder(tokenizer), n_row=n_row, seq_len=seq_len)


def first_rows(
    documents: Iterable[Document],
    tokenizer: "TextReader | PreTrainedTokenizerBase",
    *,
    name: str,
    most: int,
    seq_len: int,
) -> np.ndarray:
    """Return the rows that documents give by the module's rule, int64 [n_row, seq_len]: `most` or fewer.

    Raises `MoneError` where there is not a single one.
    """
    ids: list[int] = []
    _append_ids(ids, documents, Encoder(tokenizer), most * seq_len)
    n_row = min(most, len(ids) // seq_len)
    if not n_row:
        raise MoneError(
            f"{name} has {len(ids)} tokens, one chunk takes {seq_len}: add text or lower --ctx-size"
        )
    return np.array(ids[: n_row * seq_len], np.int64).reshape(n_row, seq_len)


def head(corpus: Corpus, n_row: int) -> Corpus:
    """Return the first rows of a corpus as one of its own."""
    ids, origin, sources = corpus.ids[:n_row], None, {}
    if corpus.origin is not None:
        origin = corpus.origin[:n_row]
        counts = np.bincount(origin.ravel(), minlength=len(corpus.sources)).tolist()
        sources = dict(zip(corpus.sources, counts, strict=True))
    return Corpus(ids, corpus.name, fingerprint_rows(ids), sources, origin, corpus.sample)


def fingerprint_rows(tokens: Tensor | np.ndarray) -> str:
    """Return the SHA-256 of rows of tokens, int64 [n_row, seq_len]: of their shape and values."""
    header = json.dumps(list(tokens.shape)).encode()
    return hashlib.sha256(header + np.asarray(tokens, "<i8").tobytes()).hexdigest()


def _corpus(texts: Sequence[_Text], encoder: Encoder, *, n_row: int, seq_len: int) -> Corpus:
    """Concatenate the texts' documents and cut them into rows."""
    if n_row < 1 or seq_len < 2:
        raise MoneError(
            f"--chunks {n_row} of --ctx-size {seq_len} tokens: at least 1 row of 2 tokens is needed"
        )
    wanted = n_row * seq_len
    ids: list[int] = []
    seen = _Seen()
    sources: dict[str, int] = {}
    for number, text in enumerate(texts):
        before = len(ids)
        if before < wanted:
            _append_ids(ids, seen.watched(text.documents), encoder, wanted)
        label = text.name if text.name not in sources else f"{text.name} ({number + 1})"
        sources[label] = max(min(len(ids), wanted) - before, 0)
    name = ", ".join(text.name for text in texts)
    available = len(ids) // seq_len
    if available < n_row:
        asked, remedy = "--chunks", f"pass --chunks {available}" if available else "lower --ctx-size"
        if texts[0].weight is not None:
            asked, remedy = "its share of --chunks", "lower its weight or --chunks"
        raise MoneError(
            f"{name} gives {available} rows of {seq_len} tokens ({len(ids)} tokens), "
            f"{asked} asks for {n_row}: add text or {remedy}"
        )
    for unused in (source for source, n_token in sources.items() if not n_token):
        log.info("%s is not used: the text before it fills the rows; =WEIGHT gives each a share", unused)
    rows = np.array(ids[:wanted], np.int64).reshape(n_row, seq_len)
    numbers = np.arange(len(sources), dtype=np.int16)
    origin = numbers.repeat(list(sources.values())).reshape(n_row, seq_len)
    return Corpus(rows, name, fingerprint_rows(rows), sources, origin, seen.sample(encoder))


class _Seen:
    """Looks on while documents are read, and keeps pieces of them."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._n_chat = 0

    def watched(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Yield the documents."""
        for document in documents:
            text = document.text
            if document.kind == "chat":
                self._n_chat += 1
                text = _without(text, document.control)
            self._keep(text)
            yield replace(document, rest=map(self._kept, document.rest)) if document.rest else document

    def sample(self, encoder: Encoder) -> TextSample:
        """Return what was seen."""
        return TextSample(tuple(self._pieces), self._n_chat if encoder.has_template else None)

    def _kept(self, part: str) -> str:
        self._keep(part)
        return part

    def _keep(self, part: str) -> None:
        self._pieces += [part[at : at + _PIECE] for at in range(0, len(part), _PIECE_EVERY)]


def _without(text: str, control: Sequence[tuple[int, int]]) -> str:
    """Return a rendered chat without its control tokens."""
    starts, ends = [0, *(end for _, end in control)], [*(start for start, _ in control), len(text)]
    return " ".join(text[start:end] for start, end in zip(starts, ends, strict=True))


def _append_ids(ids: list[int], documents: Iterable[Document], encoder: Encoder, wanted: int) -> None:
    """Append the documents' ids until there are as many as wanted; no more of the documents is read."""
    for some in _ids(documents, encoder):
        ids += some
        if len(ids) >= wanted:
            break
    if isinstance(documents, Generator):
        documents.close()  # which says what it could not use


def _ids(documents: Iterable[Document], encoder: Encoder) -> Iterator[list[int]]:
    for document in documents:
        if document.kind == "chat":
            yield from encoder.chat(document.text, document.control)
        else:
            yield from encoder.text(chain([document.text], document.rest))


def _interleaved(parts: Sequence[Corpus]) -> Corpus:
    """Put the rows of several corpora in one order: row k of n comes at (k + 1/2) / n, equals as given."""
    places = [
        ((2 * row + 1) / (2 * len(part.ids)), number, row)
        for number, part in enumerate(parts)
        for row in range(len(part.ids))
    ]
    order = sorted(places)
    ids = np.stack([parts[number].ids[row] for _, number, row in order])
    numbers = np.array([number for _, number, _ in order], np.int16)
    names = [part.name for part in parts]
    labels = [f"{name} ({i + 1})" if name in names[:i] else name for i, name in enumerate(names)]
    sources = {label: part.ids.size for label, part in zip(labels, parts, strict=True)}
    origin = np.broadcast_to(numbers[:, None], ids.shape)
    samples = [part.sample for part in parts if part.sample]
    pieces = tuple(chain.from_iterable(sample.pieces for sample in samples))
    chats = [sample.n_chat for sample in samples if sample.n_chat is not None]
    sample = TextSample(pieces, sum(chats) if chats else None)
    return Corpus(ids, ", ".join(names), fingerprint_rows(ids), sources, origin, sample)


def _rows_per_text(texts: Sequence[_Text], weights: Sequence[float], n_row: int) -> list[int]:
    """Share out the rows in proportion: whole rows first, those left over to the largest remainders."""
    shares = [n_row * weight / sum(weights) for weight in weights]
    rows = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(texts)), key=lambda i: rows[i] - shares[i])
    for i in by_remainder[: n_row - sum(rows)]:
        rows[i] += 1
    if 0 in rows:
        name = texts[rows.index(0)].name
        raise MoneError(
            f"the weight of {name} gives it none of {n_row} rows: raise it or --chunks, or leave it out"
        )
    return rows


def check_files(files: Sequence[str | Path]) -> None:
    """Raise `MoneError` for the first text of `read_corpus` that is not there; none is read."""
    for given in map(str, files):
        check_there(Path(given if Path(given).exists() else _split_weight(given)[0]))


def _file_text(given: str, reader: TextReader, field: str) -> _Text:
    path, weight = (given, None) if Path(given).exists() else _split_weight(given)
    return _Text(Path(path).name, read_documents(Path(path), reader, field=field), weight)


def _dataset_text(given: str, reader: TextReader, field: str, seed: int) -> _Text:
    name, weight = (given, None) if Path(given).exists() else _split_weight(given)
    return _Text(Path(name).name, read_dataset(name, reader, field=field, seed=seed), weight)


def _split_weight(given: str) -> tuple[str, float | None]:
    """Split `name=0.7` into name and weight; an `=` that no number follows belongs to the name."""
    name, equals, number = given.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        return given, None
    if not equals:
        return given, None
    if not 0 < weight < math.inf:
        raise MoneError(f"{given}: a weight is a number above 0")
    return name, weight
