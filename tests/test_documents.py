"""Files, records, chats, datasets and the built-in documents."""

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mone_export.calibration import documents
from mone_export.calibration.documents import builtin_documents, read_dataset, read_documents
from mone_export.errors import MoneError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Ünïcode?"},
    {"role": "assistant", "content": "Yes.\n"},
]
TEMPLATE = (
    "<s>{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}</s>{% endfor %}"
    "{% if tools %}{{ tools | length }} tools{% endif %}"
)


@pytest.fixture
def tokenizer(small: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(small)


@pytest.fixture
def chatty(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer with a chat template, which writes the BOS itself."""
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_jsonl(path: Path, records: Sequence[Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_jsonl_is_one_document_per_line(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    # JSON allows these line separators raw inside a string
    texts = ["def f(x):\n    return x\n", "Ünïcode, too.\r\nSecond line", "a\u2028b\u2029c\x85d\x7f", ""]
    path = tmp_path / "text.jsonl"
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=False) for text in texts]
    path.write_bytes("\n\n".join(lines).replace("\n", "\r\n").encode())
    assert [document.text for document in read_documents(path, tokenizer)] == texts


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_byte_order_mark_is_no_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, suffix: str) -> None:
    path = tmp_path / f"text.{suffix}"
    path.write_text('{"text": "a"}', encoding="utf-8-sig")
    (document,) = read_documents(path, tokenizer)
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
def test_line_that_is_no_document_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, line: str, message: str
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(MoneError, match=f"text.jsonl:{message}") as error:
        list(read_documents(path, tokenizer))
    assert "\n" not in str(error.value)


def test_chat_is_rendered_with_the_models_template(tmp_path: Path, chatty: PreTrainedTokenizerBase) -> None:
    path = write_jsonl(
        tmp_path / "chat.jsonl", [{"messages": CHAT}, {"messages": CHAT[1:], "tools": [{"name": "f"}]}]
    )
    first, second = read_documents(path, chatty)
    assert (first.kind, first.text) == (
        "chat",
        "<s>[system] Be brief.</s>[user] Ünïcode?</s>[assistant] Yes.\n</s>",
    )
    assert second.text.endswith("Yes.\n</s>1 tools")


@pytest.mark.parametrize(
    ("field", "record"),
    [
        ("body", {"body": "words", "text": 3}),
        ("conversation", {"conversation": CHAT}),
        ("text", {"messages": CHAT}),
        ("text", {"text": "words", "messages": CHAT}),
    ],
)
def test_field_names_text_or_chat(
    tmp_path: Path, chatty: PreTrainedTokenizerBase, field: str, record: dict[str, Any]
) -> None:
    (found,) = read_documents(write_jsonl(tmp_path / "x.jsonl", [record]), chatty, field=field)
    assert found.kind == ("file" if isinstance(record.get(field), str) else "chat")
    assert found.text == "words" if found.kind == "file" else found.text.startswith("<s>[system]")


def test_chat_needs_a_template(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": CHAT}])
    with pytest.raises(MoneError, match=r"chat.jsonl:1 is a chat, .* no chat template: take the model's"):
        list(read_documents(path, tokenizer))


@pytest.mark.parametrize(
    "messages", [["hello"], [{"role": "user"}], [3], [{"content": "x"}], [{"role": "tool", "content": "x"}]]
)
def test_messages_that_the_template_refuses_are_one_line(
    tmp_path: Path, chatty: PreTrainedTokenizerBase, messages: list[Any]
) -> None:
    chatty.chat_template = (
        "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools') }}"
        "{% endif %}{{ message.role + message.content }}{% endfor %}"
    )
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": messages}])
    with pytest.raises(MoneError, match=r"chat.jsonl:1: the model's chat template cannot render") as error:
        list(read_documents(path, chatty))
    assert "\n" not in str(error.value)


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset folder with the splits train (60 texts) and test (1 text)."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_jsonl(tmp_path / "set" / "train.jsonl", [{"text": f"text {n}", "body": str(n)} for n in range(60)])
    write_jsonl(tmp_path / "set" / "test.jsonl", [{"text": "held out", "body": "60"}])
    return tmp_path / "set"


def texts_of(dataset: Path | str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[str]:
    return [document.text for document in read_dataset(str(dataset), tokenizer, **options)]


def test_dataset_is_shuffled_by_the_seed(dataset: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    in_order = [f"text {n}" for n in range(60)]
    first = texts_of(dataset, tokenizer)
    assert sorted(first) == sorted(in_order) and first != in_order
    assert texts_of(dataset, tokenizer, seed=0) == first
    assert texts_of(dataset, tokenizer, seed=1) not in (first, in_order)
    assert sorted(texts_of(dataset, tokenizer, field="body"), key=int) == [str(n) for n in range(60)]


@pytest.mark.parametrize("suffix", ["", ":train", ":default", ":default:train"])
def test_config_and_split_may_be_left_out(
    dataset: Path, tokenizer: PreTrainedTokenizerBase, suffix: str
) -> None:
    assert texts_of(f"{dataset}{suffix}", tokenizer) == texts_of(dataset, tokenizer)
    assert texts_of(f"{dataset}:test", tokenizer) == ["held out"]


def test_dataset_may_hold_chats(dataset: Path, chatty: PreTrainedTokenizerBase) -> None:
    write_jsonl(dataset.parent / "chats" / "chats.jsonl", [{"messages": CHAT[n:]} for n in range(3)])
    found = texts_of(dataset.parent / "chats", chatty)
    assert len(found) == 3 and all(text.endswith("[assistant] Yes.\n</s>") for text in found)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("SET:val", "has no split val, but train, test: name one of them"),
        ("SET:other:train", "has the configurations default: name one of them"),
        ("TWO", "has the configurations b, c: name one of them"),
        ("TWO:train", "has the configurations b, c: name one of them"),
        ("SET/missing", "cannot read the dataset .*; check its name"),
        ("nobody/nothing", "cannot read the dataset nobody/nothing: .*; check its name"),
        ("EMPTY", "cannot read the dataset .*; check its name"),
    ],
)
def test_dataset_that_cannot_be_read_is_one_line(
    dataset: Path, tokenizer: PreTrainedTokenizerBase, name: str, message: str
) -> None:
    (dataset.parent / "empty").mkdir()
    two = write_jsonl(dataset.parent / "two" / "b.jsonl", [{"text": "b"}]).parent
    write_jsonl(two / "c.jsonl", [{"text": "c"}])
    configs = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("b", "c")]
    (two / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    assert texts_of(f"{two}:c", tokenizer) == texts_of(f"{two}:c:train", tokenizer) == ["c"]
    name = (
        name.replace("TWO", str(two))
        .replace("SET", str(dataset))
        .replace("EMPTY", str(dataset.parent / "empty"))
    )
    with pytest.raises(MoneError, match=message) as error:
        texts_of(name, tokenizer)
    assert "\n" not in str(error.value)


def test_record_without_the_field_is_named(dataset: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(MoneError, match=r'record 1 has no string field "words"'):
        texts_of(dataset, tokenizer, field="words")


def test_missing_package_is_one_line(
    dataset: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MoneError, match=r"pip install 'mone-export\[dataset\]'"):
        texts_of(dataset, tokenizer)


@pytest.fixture
def few_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the standard library, since reading all of it takes seconds."""
    every = documents._stdlib_sources()
    monkeypatch.setattr(
        documents, "_stdlib_sources", lambda: dict(itertools.islice(sorted(every.items()), 40))
    )


@pytest.mark.usefixtures("few_sources")
def test_builtin_documents_are_the_same_every_time() -> None:
    found = list(builtin_documents("calibration"))
    assert found == list(builtin_documents("calibration"))
    assert {document.kind for document in found} == {"python", "prose"}
    assert all(document.text.strip() for document in found)
    # the order is mixed by name, so that a prefix is a sample of the whole
    kinds = [document.kind for document in found]
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
