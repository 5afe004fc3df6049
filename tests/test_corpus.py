"""The chunking rule, what is said about unusable text, and the built-in documents."""

import hashlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mone_export import corpus
from mone_export.corpus import Document, builtin_documents, make_corpus, read_corpus, read_documents
from mone_export.errors import MoneError

TEXTS = ["def f(x):\n    return x\n", "Ünïcode, too.\r\nSecond line", "third"]
BOS = 1


@pytest.fixture(scope="module")
def tokenizer(small: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(small)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.txt" for number in range(len(TEXTS))]
    for path, text in zip(paths, TEXTS, strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def by_hand(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[int]:
    """Documents in order, one BOS in front of each, concatenated."""
    return [
        token for text in texts for token in [BOS, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    ]


@pytest.mark.parametrize(("n_row", "seq_len"), [(1, 2), (3, 5), (1, 30), (7, 4)])
def test_rows_are_cut_from_all_documents_in_order(
    files: list[Path], tokenizer: PreTrainedTokenizerBase, n_row: int, seq_len: int
) -> None:
    found = read_corpus(files, tokenizer, n_row=n_row, seq_len=seq_len)
    wanted = by_hand(tokenizer, TEXTS)[: n_row * seq_len]
    assert found.tokens.dtype == torch.int64
    assert found.tokens.tolist() == [wanted[i : i + seq_len] for i in range(0, len(wanted), seq_len)]
    assert found.name == "0.txt, 1.txt, 2.txt"


def test_incomplete_last_row_is_dropped(files: list[Path], tokenizer: PreTrainedTokenizerBase) -> None:
    ids = by_hand(tokenizer, TEXTS)
    seq_len = next(n for n in range(7, 20) if len(ids) % n)
    n_row = len(ids) // seq_len
    assert read_corpus(files, tokenizer, n_row=n_row, seq_len=seq_len).tokens.shape == (n_row, seq_len)
    with pytest.raises(MoneError, match=f"gives {n_row} rows of {seq_len} tokens"):
        read_corpus(files, tokenizer, n_row=n_row + 1, seq_len=seq_len)


def test_too_few_rows_are_counted_and_the_remedy_works(
    files: list[Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    n_token = len(by_hand(tokenizer, TEXTS[:2]))
    n_row = n_token // 8
    with pytest.raises(MoneError) as error:
        read_corpus(files[:2], tokenizer, n_row=1000, seq_len=8)
    assert str(error.value) == (
        f"0.txt, 1.txt gives {n_row} rows of 8 tokens ({n_token} tokens), --chunks asks for 1000: "
        f"add text or pass --chunks {n_row}"
    )
    assert len(read_corpus(files[:2], tokenizer, n_row=n_row, seq_len=8).tokens) == n_row
    with pytest.raises(MoneError, match=r"gives 0 rows of 2048 tokens .* lower --ctx-size"):
        read_corpus(files, tokenizer)


@pytest.mark.parametrize(("n_row", "seq_len"), [(0, 8), (-1, 8), (1, 1), (1, 0)])
def test_less_than_a_row_of_two_tokens_is_refused(
    files: list[Path], tokenizer: PreTrainedTokenizerBase, n_row: int, seq_len: int
) -> None:
    with pytest.raises(MoneError, match=f"--chunks {n_row} of --ctx-size {seq_len} tokens"):
        read_corpus(files, tokenizer, n_row=n_row, seq_len=seq_len)


def test_reading_stops_when_there_is_enough(tokenizer: PreTrainedTokenizerBase) -> None:
    def documents():
        yield Document("first", "file", "just enough")
        raise AssertionError("the second document was asked for")

    n_token = len(by_hand(tokenizer, ["just enough"]))
    assert make_corpus(documents(), tokenizer, name="x", n_row=1, seq_len=n_token).tokens.numel() == n_token


def test_jsonl_is_one_document_per_line(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    # JSON allows these line separators raw inside a string
    texts = [*TEXTS, "a\u2028b\u2029c\x85d\x7f", ""]
    path = tmp_path / "text.jsonl"
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=False) for text in texts]
    path.write_bytes("\n\n".join(lines).replace("\n", "\r\n").encode())
    assert [document.text for document in read_documents([path])] == texts
    n_token = len(by_hand(tokenizer, texts))
    found = read_corpus([path], tokenizer, n_row=1, seq_len=n_token)
    assert found.tokens[0].tolist() == by_hand(tokenizer, texts)


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_byte_order_mark_is_no_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"text.{suffix}"
    path.write_text('{"text": "a"}', encoding="utf-8-sig")
    (document,) = read_documents([path])
    assert document.text == ("a" if suffix == "jsonl" else '{"text": "a"}')


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "2 is not JSON"),
        ('{"txt": "a"}', '2 has no string field "text"'),
        ('{"text": 3}', '2 has no string field "text"'),
        ('["text"]', '2 has no string field "text"'),
        ('{"text": "\\ud800"}', "2 holds half a surrogate pair"),
    ],
)
def test_line_that_is_no_document_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(MoneError, match=f"text.jsonl:{message}") as error:
        list(read_documents([path]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the calibration text .*: No such file or directory; pass a readable file"),
        ("folder", "cannot read the calibration text .*: Is a directory; pass a readable file"),
        (b"", "is empty; pass text like"),
        (b" \n\t\n", "is empty; pass text like"),
        ("Grüße".encode("latin-1"), r"is not UTF-8 \(byte 2\); convert it: iconv"),
        ("text".encode("utf-16"), r"is not UTF-8 \(byte 0\)"),
    ],
)
def test_unusable_file_is_named_with_a_remedy(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, content: bytes | str | None, message: str
) -> None:
    path = tmp_path / "text.txt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        path.mkdir()
    with pytest.raises(MoneError, match=message) as error:
        read_corpus([path], tokenizer)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_fingerprint_is_of_shape_and_values(files: list[Path], tokenizer: PreTrainedTokenizerBase) -> None:
    found = read_corpus(files, tokenizer, n_row=2, seq_len=6)
    values = b"".join(int(token).to_bytes(8, "little") for token in found.tokens.flatten())
    assert found.sha256 == hashlib.sha256(b"[2, 6]" + values).hexdigest()
    assert read_corpus(files, tokenizer, n_row=3, seq_len=4).sha256 != found.sha256


def test_fingerprint_changes_with_any_token() -> None:
    tokens = torch.arange(12).reshape(3, 4)
    seen = {corpus._fingerprint(tokens)}
    for row, column in itertools.product(range(3), range(4)):
        changed = tokens.clone()
        changed[row, column] += 1
        seen.add(corpus._fingerprint(changed))
    assert len(seen) == 13


@pytest.fixture
def few_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the standard library, since reading all of it takes seconds."""
    every = corpus._stdlib_sources()
    monkeypatch.setattr(corpus, "_stdlib_sources", lambda: dict(itertools.islice(sorted(every.items()), 40)))


@pytest.mark.usefixtures("few_sources")
def test_builtin_documents_are_the_same_every_time() -> None:
    documents = list(builtin_documents("calibration"))
    assert documents == list(builtin_documents("calibration"))
    assert {document.kind for document in documents} == {"python", "prose"}
    assert all(document.text.strip() for document in documents)
    # the order is mixed by name, so that a prefix is a sample of the whole
    kinds = [document.kind for document in documents]
    assert {"python", "prose"} == set(kinds[:20])


@pytest.mark.usefixtures("few_sources")
def test_held_out_documents_share_no_topic_with_calibration() -> None:
    """A module's source and its docstrings are one topic: they stay on the same side."""
    splits = {split: list(builtin_documents(split)) for split in ("calibration", "held-out")}
    names = {split: {document.name for document in documents} for split, documents in splits.items()}
    topics = {split: {name.partition("/")[2] for name in names[split]} for split in names}
    # modules may share a comment of a line or two
    texts = {
        split: {document.text for document in documents if len(document.text) > 200}
        for split, documents in splits.items()
    }
    assert topics["calibration"].isdisjoint(topics["held-out"])
    assert texts["calibration"].isdisjoint(texts["held-out"])
    n_topic = {split: len(topics[split]) for split in topics}
    assert 0.05 < n_topic["held-out"] / sum(n_topic.values()) < 0.2, "about a tenth"
