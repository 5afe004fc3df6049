"""Files, records, chats, datasets and the built-in documents."""

import gzip
import importlib.metadata
import itertools
import json
import lzma
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mone_export.calibration import documents
from mone_export.calibration.documents import Document, builtin_documents, read_dataset, read_documents
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
    assert document.text == "a"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "2 is not JSON"),
        ('{"txt": "a"}', '2 has no string field "text"'),
        ('{"text": 3}', '2 has no string field "text"'),
        ('{"text": "\\ud800"}', "2 holds half a surrogate pair"),
    ],
)
def test_line_that_is_no_document_is_counted_and_named(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
    line: str,
    message: str,
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n{line}\n{{"text": "fine, too"}}\n')
    assert [document.text for document in read_documents(path, tokenizer)] == ["fine", "fine, too"]
    (record,) = caplog.records
    assert "2 of 4 records" in record.message and f"text.jsonl:{message}" in record.message
    path.write_text(f"{line}\n")
    with pytest.raises(MoneError, match=f"text.jsonl:{message.replace('2', '1', 1)}") as error:
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
    ("messages", "message"),
    [
        (["hello"], "holds a message that is a text, not an object"),
        ([{"role": "user"}], "is a chat whose messages hold no text"),
        ([3], "holds a message that is a number"),
        ([[{"role": "user", "content": "x"}]], "holds a message that is a list"),
        ([{"content": "x"}], 'holds a message without a "role"'),
        ([{"role": "assistant", "tool_calls": ["f"]}], "holds a tool call that is a text, not an object"),
        ([{"role": "user", "content": {"a": [1]}}], "whose content is an object, not a text"),
        ([{"role": "user", "content": [["a"]]}], "a part that is a list, not a text"),
        ([{"role": "tool", "content": "x"}], r"cannot be rendered by the model's chat template \(no tools\)"),
        ([{"role": "system", "content": "x"}], "of whose text the model's chat template renders nothing"),
    ],
)
def test_messages_that_are_no_chat_are_one_line(
    tmp_path: Path, chatty: PreTrainedTokenizerBase, messages: list[Any], message: str
) -> None:
    chatty.chat_template = (
        "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools') }}"
        "{% elif message.role != 'system' %}{{ message.role + message.content }}{% endif %}{% endfor %}"
    )
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": messages}])
    with pytest.raises(MoneError, match=f"chat.jsonl:1 .*{message}") as error:
        list(read_documents(path, chatty))
    assert "\n" not in str(error.value)


def test_tools_that_are_no_objects_are_one_line(tmp_path: Path, chatty: PreTrainedTokenizerBase) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": CHAT, "tools": ["weather"]}])
    with pytest.raises(MoneError, match='chat.jsonl:1 has "tools" that are no list of objects'):
        list(read_documents(path, chatty))


def test_a_call_of_the_older_form_is_one_of_the_newer(
    tmp_path: Path, chatty: PreTrainedTokenizerBase
) -> None:
    chatty.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}"
        "{% for call in message.tool_calls or [] %}{{ call.function.name }} "
        "{{ call.function.arguments.city }}{% endfor %}\n{% endfor %}"
    )
    call = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    forms = [{"function_call": call}, {"tool_calls": [{"type": "function", "function": call}]}]
    question = {"role": "user", "content": "Is it raining?"}
    records = [{"messages": [question, {"role": "assistant", "content": "", **form}]} for form in forms]
    older, newer = read_documents(write_jsonl(tmp_path / "x.jsonl", records), chatty)
    assert older.text == newer.text and "weather Oslo" in older.text


CASES = Path(__file__).parent / "cases"
COLOUR = "<s>[user] Name a colour.</s><s>[assistant] Blue.</s>"
RAIN = (
    '<s>[user] Is it raining?</s><s>[assistant] weather({"city": "Oslo"})</s>'
    "<s>[tool] no</s><s>[assistant] No.</s>"
)
STRICT = (  # as many published templates are: no system turn, arguments encoded, a list of the tools
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<s>[{{ message.role }}] {{ message.content }}{% for call in message.tool_calls or [] %}"
    "{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}</s>{% endfor %}"
    "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}"
)
WHOLE_TEXT = object()


@pytest.mark.parametrize(
    ("name", "wanted"),
    {
        "CHAT_UPPER_CASE.JSONL": [COLOUR] * 4,
        "chat_array.json": [COLOUR] * 4,
        "chat_from_value.jsonl": [COLOUR] * 4,
        "prompt_completion.jsonl": [COLOUR] * 4,
        "chat_arguments_as_string.jsonl": [RAIN] * 4,
        "chat_null_content.jsonl": [RAIN] * 4,
        "chat_messages_as_json_string.jsonl": ["<s>[user] What is 2 + 3?</s><s>[assistant] 5</s>"] * 4,
        "chat_tools_as_json_string.jsonl": [
            "<s>[user] Is it raining?</s><s>[assistant] Let me look.</s>weather;"
        ]
        * 4,
        "chat_one_bad_row.jsonl": [
            f"<s>[user] Count to {n}.</s><s>[assistant] {' '.join(map(str, range(n)))}</s>" for n in range(20)
        ]
        + ["<s>[user] Be brief.\n\nHi</s><s>[assistant] Hi.</s>"],
        "chat_half_a_surrogate.jsonl": MoneError,
        "plain_with_control_tokens.txt": WHOLE_TEXT,
        "front_matter_no_yaml.md": WHOLE_TEXT,
    }.items(),
)
def test_case_is_what_its_author_meant(
    chatty: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture, name: str, wanted: Any
) -> None:
    chatty.chat_template = STRICT
    if wanted is MoneError:
        with pytest.raises(MoneError, match=rf"{name}:1 holds half a surrogate pair") as error:
            list(read_documents(CASES / name, chatty))
        assert "\n" not in str(error.value)
        return
    found = list(read_documents(CASES / name, chatty))
    if wanted is WHOLE_TEXT:
        assert [(document.kind, document.text) for document in found] == [
            ("file", (CASES / name).read_text())
        ]
        return
    assert [(document.kind, document.text) for document in found] == [("chat", text) for text in wanted]
    bad = [f"{name}:21 is a chat whose messages hold no text"] if name == "chat_one_bad_row.jsonl" else []
    assert [record.message.partition(f"{CASES}/{name}:")[2] for record in caplog.records] == [
        f" 1 of 22 records not used; the first: {CASES}/{reason}" for reason in bad
    ]


def test_every_case_is_tested() -> None:
    (parameters,) = test_case_is_what_its_author_meant.pytestmark
    assert {file.name for file in CASES.iterdir()} == {"README.md", *dict(parameters.args[1])}


RECORDS = [{"messages": CHAT}, {"text": "words"}]
RENDERED = ["<s>[system] Be brief.</s>[user] Ünïcode?</s>[assistant] Yes.\n</s>", "words"]


def as_lines(records: Sequence[Any], end: str = "\n") -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + end for record in records)


@pytest.mark.parametrize(
    ("name", "content"),
    {
        "x.ndjson": as_lines(RECORDS).encode(),
        "x.txt": as_lines(RECORDS).encode(),
        "x.json": json.dumps(RECORDS, indent=2).encode(),
        "data.json": json.dumps({"version": 1, "data": RECORDS}, indent=2).encode(),
        "values.json": "\n".join(json.dumps(record, indent=2) for record in RECORDS).encode(),
        "x.jsonl.gz": gzip.compress(as_lines(RECORDS).encode()),
        "packed": gzip.compress(as_lines(RECORDS).encode()),
        "x.jsonl.xz": lzma.compress(as_lines(RECORDS).encode()),
        "mac.jsonl": as_lines(RECORDS, end="\r").encode(),
        "utf-16.jsonl": as_lines(RECORDS).encode("utf-16"),
        "big-endian.jsonl": b"\xfe\xff" + as_lines(RECORDS).encode("utf-16-be"),
    }.items(),
)
def test_records_are_found_whatever_the_files_form(
    tmp_path: Path, chatty: PreTrainedTokenizerBase, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    assert [document.text for document in read_documents(tmp_path / name, chatty)] == RENDERED


def test_parquet_is_read(tmp_path: Path, chatty: PreTrainedTokenizerBase) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist(
        [{"messages": CHAT, "text": None}, {"text": "words"}]
    )
    parquet.write_table(table, tmp_path / "x.parquet")
    assert [document.text for document in read_documents(tmp_path / "x.parquet", chatty)] == RENDERED


def test_parquet_that_is_damaged_is_one_line(tmp_path: Path, chatty: PreTrainedTokenizerBase) -> None:
    """In the middle: the records before it are read."""
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist([{"text": f"record {n}"} for n in range(256)])
    parquet.write_table(table, path := tmp_path / "x.parquet", row_group_size=64, use_dictionary=False)
    at = parquet.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    content = path.read_bytes()
    path.write_bytes(content[:at] + b"\xff" * 40 + content[at + 40 :])
    found = []
    with pytest.raises(MoneError, match="cannot read .*x.parquet.*: ") as error:
        for document in read_documents(path, chatty):
            found.append(document.text)
    assert found == [f"record {n}" for n in range(128)] and "\n" not in str(error.value)


def test_parquet_without_its_package_is_one_line(
    tmp_path: Path, chatty: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"PAR1 and more")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MoneError, match=r"needs the package pyarrow: pip install 'mone-export\[dataset\]'"):
        list(read_documents(tmp_path / "x", chatty))


@pytest.mark.parametrize(
    "text",
    [
        "[1] A. Author, Title.\n[2] B. Author, Title.\n",
        "[1]\n[2]\n",
        "{ braces } begin this text\nand it goes on\n",
        '{"a": 1} is an object,\nthis is prose\nand this\n',
        '[[wiki]] links\n{"text": "an example"}\n',
        "[" * 100_000,
    ],
)
def test_prose_may_begin_with_a_bracket(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    (tmp_path / "x.txt").write_text(text)
    (found,) = read_documents(tmp_path / "x.txt", tokenizer)
    assert found == Document("x.txt", "file", text)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b'{"text": "a",', r"begins like JSON, but is not \(Expecting property name.*mend it"),
        ("x.json", b"[1, 2]", r"begins like JSON, but is not \(neither an object nor an array of records"),
        (
            "x.txt.gz",
            gzip.compress(b"words " * 99, mtime=0)[:-20],
            "cannot read the calibration text .*x.txt.gz: ",
        ),
        ("x.zst", b"\x28\xb5\x2f\xfd0", "is compressed with Zstandard; unpack it: zstd -d "),
        ("x.txt", "text".encode("utf-16-le"), "holds zero bytes: .* iconv -f utf-16le -t utf-8 .*x.txt"),
        ("x.txt", "a €".encode("utf-16")[:-1], r"is not UTF-16-LE \(byte 6\)"),
    ],
)
def test_file_that_cannot_be_read_is_one_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MoneError, match=message) as error:
        list(read_documents(tmp_path / name, tokenizer))
    assert "\n" not in str(error.value)


def test_old_macs_line_ends_are_line_ends(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "x.txt").write_bytes(b"one\rtwo\rthree\r\nfour\n")
    (found,) = read_documents(tmp_path / "x.txt", tokenizer)
    assert found.text == "one\ntwo\nthree\nfour\n"


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"instruction": "Add.", "input": "2", "output": "5"}, "<s>[user] Add.\n\n2</s>[assistant] 5</s>"),
        ({"question": "Why?", "answer": "So."}, "<s>[user] Why?</s>[assistant] So.</s>"),
        ({"prompt": CHAT[:2], "completion": CHAT[2:]}, RENDERED[0]),
        ({"prompt": "Ünïcode?", "chosen": CHAT, "rejected": CHAT[:1]}, RENDERED[0]),
        ({"text": None, "conversation": CHAT}, RENDERED[0]),
        ({"system": "Be brief.", "conversations": [
            {"from": "human", "value": "Ünïcode?"}, {"from": "gpt", "value": "Yes.\n"}]}, RENDERED[0]),
        ({"messages": [{"role": "user", "content": [
            {"type": "text", "text": "Look:"}, {"type": "image"}, {"type": "text", "text": "what?"}]}]},
            "<s>[user] Look:\nwhat?</s>"),
        (CHAT, RENDERED[0]),
    ],
)  # fmt: skip
def test_chat_of_every_usual_form(
    tmp_path: Path, chatty: PreTrainedTokenizerBase, record: Any, wanted: str
) -> None:
    (found,) = read_documents(write_jsonl(tmp_path / "x.jsonl", [record]), chatty)
    assert (found.kind, found.text) == ("chat", wanted)


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("{{ call.arguments | tojson }}", '{"city": "Oslo"}'),
        ("{{ 'call ' + call.arguments }}", 'call {"city": "Oslo"}'),  # refuses an object
        ("{{ call.arguments }}", '{"city": "Oslo"}'),  # would print it as Python does
    ],
)
def test_arguments_are_given_as_the_template_takes_them(
    chatty: PreTrainedTokenizerBase, template: str, wanted: str
) -> None:
    chatty.chat_template = (
        "{% for message in messages %}{{ message.content }}{% for tool_call in message.tool_calls or [] %}"
        "{% set call = tool_call.function %}" + template + "{% endfor %}{% endfor %}"
    )
    for document in read_documents(CASES / "chat_arguments_as_string.jsonl", chatty):
        assert document.text == f"Is it raining?{wanted}noNo."


def test_template_sees_the_same_day_every_day(tmp_path: Path, chatty: PreTrainedTokenizerBase) -> None:
    chatty.chat_template = (
        "  {% if strftime_now is defined %}{{ strftime_now('%d %b %Y, %-d %B %H:%M') }}{% endif %}"
        "{{ messages[0].content }}"
    )
    (found,) = read_documents(write_jsonl(tmp_path / "x.jsonl", [{"messages": CHAT}]), chatty)
    assert found.text == "01 Jan 2025, 01 January 12:00Be brief."


def test_share_of_the_messages_that_a_template_drops_is_said(
    tmp_path: Path, chatty: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    chatty.chat_template = (
        "{% for message in messages %}{{ message.content.split('</think>')[-1] }}{% endfor %}"
    )
    answer = "<think>\n" + "x" * 42 + "\n</think>\n" + "y" * 40  # 100 characters, of which 59 go
    chat = [{"role": "assistant", "content": answer}]
    with caplog.at_level("INFO", logger="mone_export"):
        (found,) = read_documents(write_jsonl(tmp_path / "x.jsonl", [{"messages": chat}]), chatty)
    assert found.text == "\n" + "y" * 40
    assert len(answer) == 100
    assert [record.message.partition("jsonl: ")[2] for record in caplog.records] == [
        "60.0% of the text of 1 chats is not in what the model's chat template renders"
    ]


def test_names_of_control_tokens_in_messages_are_no_control_tokens(
    tmp_path: Path, chatty: PreTrainedTokenizerBase
) -> None:
    chat = [{"role": "user", "content": "<s>a</s><unk>"}, {"role": "assistant", "content": "<s"}]
    (found,) = read_documents(write_jsonl(tmp_path / "x.jsonl", [{"messages": chat}]), chatty)
    assert found.text == "<s>[user] <s>a</s><unk></s>[assistant] <s</s>"
    ends = [found.text.index("</s>[assistant]"), len(found.text) - 4]
    assert found.control == ((0, 3), *((end, end + 4) for end in ends))


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
        ("SCRIPT", "cannot read the dataset .*script"),
        ("YAML", "cannot read the dataset "),
        ("json", "json is a file format that the package datasets reads, no dataset: .* pass a dataset's id"),
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
    (dataset.parent / "script").mkdir()
    (dataset.parent / "script" / "script.py").write_text("raise SystemExit")
    yaml = write_jsonl(dataset.parent / "yaml" / "b.jsonl", [{"text": "b"}]).parent
    (yaml / "README.md").write_text("---\nconfigs: [a: b: c\n---\n")
    assert texts_of(f"{two}:c", tokenizer) == texts_of(f"{two}:c:train", tokenizer) == ["c"]
    name = (
        name.replace("TWO", str(two))
        .replace("SET", str(dataset))
        .replace("EMPTY", str(dataset.parent / "empty"))
        .replace("SCRIPT", str(dataset.parent / "script"))
        .replace("YAML", str(yaml))
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
    every = documents.stdlib_sources()
    monkeypatch.setattr(
        documents, "stdlib_sources", lambda: dict(itertools.islice(sorted(every.items()), 40))
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


def test_descriptions_of_packages_are_those_that_their_metadata_holds() -> None:
    """Found by reading the files themselves; the library that takes mails apart is ten times as slow."""
    both = itertools.chain(builtin_documents("calibration"), builtin_documents("held-out"))
    found = {document.name: document.text for document in both}
    wanted = {}
    for distribution in importlib.metadata.distributions():
        metadata: Any = distribution.metadata
        if (text := metadata["Description"] or str(metadata.get_payload())).strip():
            wanted[f"package/{metadata['Name']}"] = text
    assert wanted and wanted == {name: text for name, text in found.items() if name.startswith("package/")}
