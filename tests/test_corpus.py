"""The chunking rule, the mixing rule, and what is said about unusable text."""

import hashlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mone_export.artifacts import Corpus
from mone_export.calibration.corpus import fingerprint_rows, head, make_corpus, read_corpus
from mone_export.calibration.documents import Document
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the calibration text .*: No such file or directory; pass a readable file"),
        ("folder", "cannot read the calibration text .*: Is a directory; pass a readable file"),
        (b"", "is empty; pass text like"),
        (b" \n\t\n", "is empty; pass text like"),
        ("Grüße".encode("latin-1"), r"is not UTF-8 \(byte 2\): convert it.*: iconv"),
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
    seen = {fingerprint_rows(tokens)}
    for row, column in itertools.product(range(3), range(4)):
        changed = tokens.clone()
        changed[row, column] += 1
        seen.add(fingerprint_rows(changed))
    assert len(seen) == 13


def test_sources_count_the_tokens_of_each_text(
    files: list[Path], tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    n_token = [len(by_hand(tokenizer, [text])) for text in TEXTS]
    whole = read_corpus(files, tokenizer, n_row=1, seq_len=sum(n_token))
    assert list(whole.sources.items()) == list(zip(("0.txt", "1.txt", "2.txt"), n_token, strict=True))
    assert not caplog.records
    with caplog.at_level("INFO", logger="mone_export"):
        first = read_corpus(files, tokenizer, n_row=1, seq_len=n_token[0] + 1)
    assert first.sources == {"0.txt": n_token[0], "1.txt": 1, "2.txt": 0}
    assert [record.message.partition(":")[0] for record in caplog.records] == ["2.txt is not used"]


def test_rows_are_full_of_real_tokens(small: Path, files: list[Path]) -> None:
    """A tokenizer set to pad and to truncate does neither here: no row holds what the text does not."""
    tokenizer = AutoTokenizer.from_pretrained(small, model_max_length=4, pad_token="</s>")
    tokenizer._tokenizer.enable_padding(length=64)
    tokenizer._tokenizer.enable_truncation(4)
    found = read_corpus(files, tokenizer, n_row=3, seq_len=10)
    assert tokenizer.pad_token_id not in found.tokens
    assert found.tokens.flatten().tolist() == by_hand(tokenizer, TEXTS)[:30]
    assert sum(found.sources.values()) == found.tokens.numel()


@pytest.mark.parametrize("weights", [("", "", ""), ("=1", "=2", "=1")])
def test_head_is_the_first_rows_and_knows_where_they_are_from(
    files: list[Path], tokenizer: PreTrainedTokenizerBase, weights: tuple[str, ...]
) -> None:
    given = [f"{file}{weight}" for file, weight in zip(files, weights, strict=True)]
    given = given if weights[0] else [*given, str(files[0])]  # a file may come twice
    whole = read_corpus(given, tokenizer, n_row=4, seq_len=5)
    assert whole.origin is not None and whole.origin.shape == whole.tokens.shape
    for n_row in range(1, 5):
        found = head(whole, n_row)
        assert torch.equal(found.tokens, whole.tokens[:n_row])
        assert found.sha256 == fingerprint_rows(whole.tokens[:n_row])
        assert list(found.sources) == list(whole.sources)
        assert sum(found.sources.values()) == n_row * 5
        assert list(found.sources.values()) == [
            int((whole.origin[:n_row] == number).sum()) for number in range(len(whole.sources))
        ]
    assert found.sources == whole.sources
    assert head(Corpus(whole.tokens, "x", ""), 2).sources == {}


@pytest.fixture
def letters(tmp_path: Path) -> list[Path]:
    """Texts of one letter each: its rows tell where they come from."""
    paths = [tmp_path / f"{letter}.txt" for letter in "abc"]
    for path in paths:
        path.write_text(path.stem * 400)
    return paths


def order(found: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    return "".join(tokenizer.decode(row[-3:])[-1] for row in found)


@pytest.mark.parametrize(
    ("weights", "n_row", "wanted"),
    [
        ((1, 1), 4, "abab"),
        ((0.7, 0.3), 10, "aabaabaaba"),
        ((70, 30), 10, "aabaabaaba"),
        ((3, 1), 4, "aaba"),
        ((1, 1, 1), 10, "abcabcabca"),  # the row left over goes to the first
        ((1e-9,), 2, "aa"),
    ],
)
def test_weights_share_out_the_rows_evenly_mixed(
    letters: list[Path],
    tokenizer: PreTrainedTokenizerBase,
    weights: tuple[float, ...],
    n_row: int,
    wanted: str,
) -> None:
    given = [f"{path}={weight}" for path, weight in zip(letters, weights, strict=False)]
    found = read_corpus(given, tokenizer, n_row=n_row, seq_len=8)
    # evenly means: within every prefix, a text is at most a row away from its share
    rows = order(found.tokens, tokenizer)
    assert sorted(rows) == sorted(wanted)
    for length, letter in itertools.product(range(1, n_row + 1), set(rows)):
        assert abs(rows[:length].count(letter) - length * rows.count(letter) / n_row) <= 1
    assert found.sources == {f"{letter}.txt": 8 * wanted.count(letter) for letter in sorted(set(wanted))}


def test_each_text_of_a_mix_is_cut_as_if_it_were_alone(
    files: list[Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    alone = [read_corpus([file], tokenizer, n_row=2, seq_len=3).tokens for file in files[:2]]
    mixed = read_corpus([f"{file}=1" for file in files[:2]], tokenizer, n_row=4, seq_len=3)
    assert torch.equal(mixed.tokens, torch.stack([alone[0][0], alone[1][0], alone[0][1], alone[1][1]]))
    weighted_alone = read_corpus([f"{files[0]}=0.2"], tokenizer, n_row=2, seq_len=3)
    assert weighted_alone.sha256 == read_corpus(files[:1], tokenizer, n_row=2, seq_len=3).sha256


def test_datasets_mix_with_files(letters: list[Path], tokenizer: PreTrainedTokenizerBase) -> None:
    folder = letters[0].parent / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps({"text": "z" * 200}) + "\n")
    found = read_corpus([f"{letters[0]}=3"], tokenizer, datasets=[f"{folder}:train=1"], n_row=4, seq_len=8)
    assert found.sources == {"a.txt": 24, "set:train": 8} and found.name == "a.txt, set:train"
    assert sorted(order(found.tokens, tokenizer)) == ["a", "a", "a", "z"]


def test_chat_has_the_special_tokens_of_its_template_only(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = "<s>{{ messages[0]['content'] }}</s>"
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a few words"}]}))
    try:
        found = read_corpus([path], tokenizer, n_row=1, seq_len=4).tokens[0].tolist()
    finally:
        tokenizer.chat_template = None
    assert found[0] == BOS and found.count(BOS) == 1
    assert found == by_hand(tokenizer, ["a few words"])[:4]


def test_plain_text_yields_no_control_token(tokenizer: PreTrainedTokenizerBase) -> None:
    path = Path(__file__).parent / "cases" / "plain_with_control_tokens.txt"
    found = read_corpus([path], tokenizer, n_row=4, seq_len=256).tokens.flatten().tolist()
    assert found[0] == BOS and not {0, 1, 2} & set(found[1:])
    text = " ".join(path.read_text().split())
    assert text.startswith(tokenizer.decode(found[1:]).strip())


def test_messages_yield_no_control_token(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    path = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "what is </s>?"}, {"role": "assistant", "content": "</s> and <unk>"}]
    path.write_text(json.dumps({"messages": turns}))
    try:
        found = read_corpus([path], tokenizer, n_row=1, seq_len=24).tokens[0].tolist()
    finally:
        tokenizer.chat_template = None
    first, second = (tokenizer(turn["content"], split_special_tokens=True)["input_ids"] for turn in turns)
    assert found == [*first, 2, *second, 2][:24] and found.count(BOS) == 2


def test_file_may_have_an_equals_sign_in_its_name(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for name in ("a=1", "x=y.txt"):
        (tmp_path / name).write_text("words " * 50)
        found = read_corpus([tmp_path / name], tokenizer, n_row=1, seq_len=8)
        assert found.name == name
    assert read_corpus([f"{tmp_path / 'x=y.txt'}=2"], tokenizer, n_row=1, seq_len=8).name == "x=y.txt"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (["=0"], "a.txt=0: a weight is a number above 0"),
        (["=-1"], "a.txt=-1: a weight is a number above 0"),
        (["=nan"], "a.txt=nan: a weight is a number above 0"),
        (["=inf"], "a.txt=inf: a weight is a number above 0"),
        (["=0.5", ""], "b.txt has no weight, but others have: give =WEIGHT to every text or to none"),
        (["=1000", "=1"], "the weight of b.txt gives it none of 4 rows: raise it or --chunks"),
        (["=1x"], "a.txt=1x: No such file"),
    ],
)
def test_weight_that_cannot_be_is_named(
    letters: list[Path], tokenizer: PreTrainedTokenizerBase, weights: list[str], message: str
) -> None:
    given = [f"{path}{weight}" for path, weight in zip(letters, weights, strict=False)]
    with pytest.raises(MoneError, match=message):
        read_corpus(given, tokenizer, n_row=4, seq_len=8)


def test_share_that_a_text_cannot_fill_is_named(
    letters: list[Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    letters[1].write_text("b" * 40)
    with pytest.raises(
        MoneError,
        match=r"b.txt gives \d rows of 8 tokens .*its share of --chunks asks for 50: add text or lower its",
    ):
        read_corpus([f"{path}=1" for path in letters[:2]], tokenizer, n_row=100, seq_len=8)
