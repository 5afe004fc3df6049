"""Text becomes the ids of llama.cpp's tools, for every kind of tokenizer, and no more is read than used."""

import json
import logging
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf_file import convert_upstream
from tiny import save_tiny
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from vocabularies import CONTROL, KINDS, MIXED, QWEN, SOURCES, byte_level, fast

from mone_export.calibration.corpus import make_corpus, read_corpus
from mone_export.calibration.documents import Document
from mone_export.errors import MoneError
from mone_export.source import open_source
from mone_export.source.tokenizing import Encoder, control_tokens, load_tokenizer


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, small: Path) -> PreTrainedTokenizerBase:
    return KINDS[request.param](small)


def ids_of(parts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [token for ids in Encoder(tokenizer).text(parts) for token in ids]


def test_long_text_has_the_ids_of_the_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    text = (SOURCES + MIXED * 40) * 2
    assert len(text) > 4 * 65_536, "several windows"
    whole = tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]
    assert ids_of([text], tokenizer) == whole
    pieces = [text[at : at + 10_007] for at in range(0, len(text), 10_007)]
    assert ids_of(pieces, tokenizer) == whole


def test_text_without_spaces_is_read_in_windows_too(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "abcdefghij" * 20_000
    found = ids_of([text], tokenizer)
    assert tokenizer.decode(found, skip_special_tokens=True).strip() == text


def test_names_of_control_tokens_in_a_text_are_text(tokenizer: PreTrainedTokenizerBase) -> None:
    names = [name for name in CONTROL if name in tokenizer.get_vocab()]
    assert len(names) >= 3 and set(names) <= set(control_tokens(tokenizer))
    text = "A page: " + " and ".join(f"{name}, {name}{name}" for name in names)
    control = set(tokenizer.convert_tokens_to_ids(names))
    found = ids_of([text], tokenizer)
    added = tokenizer("", verbose=False)["input_ids"]
    assert found[: len(added)] == added and not control & set(found[len(added) :])
    assert tokenizer.decode(found[len(added) :]).strip() == text
    # the same text without the brackets holds none: control tokens are found by name alone
    assert control & set(tokenizer(text, verbose=False)["input_ids"][len(added) :])


def test_chat_is_split_at_its_templates_control_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    pieces = ["system\nOne </s> two", "\n", "user\n hello<unk>"]
    text, control = "", []
    for piece in pieces:
        control.append((len(text), len(text) + 3))
        text += f"<s>{piece}"
    n_added = len(tokenizer("", verbose=False)["input_ids"])
    wanted = [[tokenizer.bos_token_id, *ids_of([piece], tokenizer)[n_added:]] for piece in pieces]
    found = [token for ids in Encoder(tokenizer).chat(text, control) for token in ids]
    assert found == sum(wanted, [])


def test_control_token_takes_the_space_beside_it_where_its_tokenizer_says_so() -> None:
    backend = byte_level()
    backend.add_special_tokens([AddedToken("<|end|>", rstrip=True, special=True)])
    tokenizer = fast(backend)
    text = "a<|end|>\n\n b"
    found = [token for ids in Encoder(tokenizer).chat(text, [(1, 8)]) for token in ids]
    assert found == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(found) == "a<|end|>b"


def test_the_tokenizers_own_settings_stay(tokenizer: PreTrainedTokenizerBase) -> None:
    before = tokenizer("a <s> b", verbose=False)["input_ids"]
    ids_of(["a <s> b"], tokenizer)
    assert tokenizer("a <s> b", verbose=False)["input_ids"] == before


def test_long_file_is_read_no_further_than_its_rows_need(tmp_path: Path, small: Path) -> None:
    path = tmp_path / "long.txt"
    with path.open("w") as file:
        for number in range(1_050_000):
            file.write(f"line {number} of a long text, with some words in it\n")
    assert path.stat().st_size > 50e6
    tokenizer = AutoTokenizer.from_pretrained(small)
    tracemalloc.start()
    try:
        found = read_corpus([path], tokenizer, n_row=4, seq_len=512)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.tokens.shape == (4, 512)
    assert peak < 20e6, f"{peak / 1e6:.0f} MB"


def test_no_more_characters_are_asked_for_than_a_few_windows(small: Path) -> None:
    asked = 0

    def rest() -> Iterator[str]:
        nonlocal asked
        for _ in range(500):
            asked += 100_000
            yield "some words " * 9_091
        raise AssertionError("the text was read to its end")

    document = Document("x", "file", "It begins here, ", rest=rest())
    make_corpus([document], AutoTokenizer.from_pretrained(small), name="x", n_row=4, seq_len=512)
    assert asked <= 200_000


@pytest.mark.parametrize("named", ["GPT2Tokenizer", "GemmaTokenizer"])
def test_ids_are_those_of_the_folders_own_rules(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, named: str
) -> None:
    """transformers has rules of its own for a class that the folder names."""
    backend = byte_level(QWEN)
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": named, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": "{{ messages }}"})
    )
    text = "Don't  split 12345 words\n\n\t東京 x=f(y):\n\n    return x,\n"
    wanted = backend.encode(text, add_special_tokens=False).ids
    assert AutoTokenizer.from_pretrained(tmp_path)(text, add_special_tokens=False)["input_ids"] != wanted
    with caplog.at_level(logging.WARNING, logger="mone_export"):
        found = load_tokenizer(tmp_path)
    assert found(text, add_special_tokens=False)["input_ids"] == wanted
    assert found.chat_template == "{{ messages }}" and found.bos_token == "<s>"
    (record,) = [record for record in caplog.records if record.name.startswith("mone_export")]
    assert "gives other ids than tokenizer.json itself" in record.message


def test_folder_whose_rules_transformers_keeps_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    load_tokenizer(Path(__file__).parents[1] / "mone_export" / "demo")
    assert not [record for record in caplog.records if record.name.startswith("mone_export")]


@pytest.mark.parametrize("content", ["", "{", '{"model": 3}', "[]", "\x00"])
def test_broken_tokenizer_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(MoneError, match="cannot load the tokenizer in") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module", params=["sentencepiece", "byte-level"])
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedTokenizerBase, Path]:
    """A model's tokenizer, and the file that llama.cpp reads it from."""
    folder = tmp_path_factory.mktemp("written")
    if request.param == "sentencepiece":
        model = Path(__file__).parents[1] / "mone_export" / "demo"
    else:
        model = save_tiny("OlmoeForCausalLM", folder / "model")
    return load_tokenizer(model), convert_upstream(model, folder / "x.gguf", "f32")


def test_pieces_of_one_number_are_one_line(tmp_path: Path) -> None:
    for file in open_source("demo").folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    rules = json.loads((tmp_path / "tokenizer.json").read_text())
    first, second = rules["model"]["merges"][0], rules["model"]["merges"][1]
    pieces = ["".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in (first, second)]
    rules["model"]["vocab"][pieces[0]] = rules["model"]["vocab"][pieces[1]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(MoneError, match="cannot use the tokenizer in .*out of vocabulary"):
        Encoder(load_tokenizer(tmp_path))


@pytest.mark.upstream
@pytest.mark.by_day(1)
def test_ids_are_llama_cpps(written: tuple[PreTrainedTokenizerBase, Path]) -> None:
    tokenizer, file = written
    llama_cpp = pytest.importorskip("llama_cpp")
    llama = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    names = control_tokens(tokenizer)
    plain = "A page about " + ", ".join(f"{name} and {name}{name}x" for name in names) + " in 12 words."
    add_bos = bool(tokenizer("", verbose=False)["input_ids"])
    assert ids_of([plain], tokenizer) == llama.tokenize(plain.encode(), add_bos=add_bos, special=False)
    # a chat whose messages hold no names is the same for tools that parse them
    chat, control = "", []
    for piece in ("user: who are you?", " assistant: nobody.", "x"):
        chat += piece
        control.append((len(chat), len(chat) + len(names[0])))
        chat += names[0]
    found = [token for ids in Encoder(tokenizer).chat(chat, control) for token in ids]
    assert found == llama.tokenize(chat.encode(), add_bos=False, special=True)
    assert found.count(tokenizer.convert_tokens_to_ids(names[0])) == 3
