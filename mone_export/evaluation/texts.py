"""The texts a file is measured on, as llama-perplexity cuts them: chunks of tokens, each begun anew.

A text is tokenised by the model's own tokenizer and cut into chunks of `n_ctx` tokens, by the rule of
`calibration.corpus`. Where the tokenizer puts a token before a text (BOS), it takes the place of the first in
each chunk. What follows the first half of a chunk is predicted.

Source: `perplexity` in llama.cpp's `tools/perplexity/perplexity.cpp`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mone_export.calibration.corpus import fingerprint_rows, first_rows
from mone_export.calibration.documents import Document, builtin_documents, read_documents
from mone_export.errors import MoneError
from mone_export.source.tokenizing import TextReader

BUILT_IN = {"python": "built-in python", "prose": "built-in prose"}
"""The names of the texts that every machine has, by the kind of their documents."""


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """Chunks of tokens, int64 [n_chunk, n_ctx]."""

    name: str
    rows: np.ndarray

    @property
    def sha256(self) -> str:
        """The fingerprint of its tokens."""
        return fingerprint_rows(self.rows)

    @property
    def first(self) -> int:
        """The first place in a chunk whose prediction counts; the last one is that before the last token."""
        return int(self.rows.shape[1]) // 2

    @property
    def targets(self) -> np.ndarray:
        """The tokens that are predicted, int64 [n_chunk, n_scored]."""
        return self.rows[:, self.first + 1 :]


def read_texts(
    given: Sequence[str], reader: TextReader, *, n_ctx: int, n_chunk: int, field: str = "text"
) -> list[Text]:
    """Read texts, each `NAME=PATH` or a path, or the built-in ones where none is given.

    The built-in ones are the tenth of the package's own text that no calibration has seen: Python sources,
    and prose. `field` is where records hold their text. Raises `MoneError` for a text that cannot be read,
    gives no chunk, or has the name of another.
    """
    if n_ctx < 8 or n_chunk < 1:
        raise MoneError(f"--chunks {n_chunk} of --ctx-size {n_ctx}: at least 1 chunk of 8 tokens is needed")
    named: dict[str, Iterable[Document]] = {}
    for text in given:
        name, path = _named(text)
        if name in named:
            raise MoneError(f"two texts are called {name}: give one another name, -f NAME={path}")
        named[name] = read_documents(path, reader, field=field)
    if not named:
        named = {name: _of_kind(kind) for kind, name in BUILT_IN.items()}
    return [
        Text(name, _begun(first_rows(documents, reader, name=name, most=n_chunk, seq_len=n_ctx), reader))
        for name, documents in named.items()
    ]


def pieces(texts: Sequence[Text], n_piece: int, n_token: int) -> np.ndarray:
    """Return `n_piece` passages of the texts, int64 [n_piece, n_token]: evenly spread, each text as many.

    Where the texts are too short there are fewer. None holds the token that chunks begin with.
    """
    found = []
    for number, text in enumerate(texts):
        share = n_piece // len(texts) + (number < n_piece % len(texts))
        inner = text.rows[:, 1:]
        passages = inner[:, : inner.shape[1] // n_token * n_token].reshape(-1, n_token)
        places = np.linspace(0, len(passages) - 1, min(share, len(passages))).astype(int)
        found.append(passages[places])
    return np.concatenate(found)


def _named(given: str) -> tuple[str, Path]:
    name, equals, path = given.partition("=")
    if not equals or Path(given).exists():
        return Path(given).name, Path(given)
    return name, Path(path)


def _of_kind(kind: str) -> Iterator[Document]:
    return (document for document in builtin_documents("held-out") if document.kind == kind)


def _begun(rows: np.ndarray, reader: TextReader) -> np.ndarray:
    """Return chunks that each begin as a text does."""
    if reader.before:
        rows[:, 0] = reader.before[0]
    return rows
