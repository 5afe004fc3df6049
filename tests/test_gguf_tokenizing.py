"""A GGUF's own tokenizer and template give what the checkpoint's give, and no more is read than is used."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf_file import convert_upstream
from tiny import save_small
from transformers import PreTrainedTokenizerBase
from vocabularies import CONTROL, KINDS, MIXED, SOURCES, write_gguf

from mone_export.calibration.corpus import make_corpus, read_corpus
from mone_export.calibration.documents import Document, read_documents
from mone_export.errors import MoneError
from mone_export.source import open_source
from mone_export.source.gguf_tokenizing import GgufReader
from mone_export.source.tokenizing import Encoder, TransformersReader

pytestmark = pytest.mark.upstream

CASES = Path(__file__).parent / "cases"
TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{{ strftime_now('%d %B') }}{% endif %}\n"
    "  {% for message in messages %}<s>{{ message.role }}\n{% generation %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}"
    "{% endfor %}{% endgeneration %}{{ eos_token }}\n{% endfor %}"
)
TEXTS = [
    MIXED.replace("e\u0301", "é"),
    " and ".join(f"{name}, {name}{name}x" for name in CONTROL),
    "one\r\ntwo\r\n\r\nthree\rfour\n\n\n  five\t\n",
    "日本語 テキスト\u3000です。مرحبا ٣٤ Съешь ещё булок ទៅ \U0001f469\u200d\U0001f467 ﬁ ½",
    "a\x00b\u2028c \x85\u200b\ufeff",
    "3333 44444 don't I'VE camelCase a_b ▁▁ f(x):\n\n\treturn {'a': [x]};",
    *("", "\n", "a", "<s", "a <s>b"),
]
PRE = {"unigram": "default", "byte-level": "gpt-2", "byte-level-nfc": "qwen2"}


def written(kind: str, folder: Path, template: str | dict[str, str]) -> tuple[PreTrainedTokenizerBase, Path]:
    """A tokenizer of a kind, and a GGUF that holds the same."""
    if kind in PRE:
        tokenizer = KINDS[kind](folder)
        tokenizer.chat_template = template
        return tokenizer, write_gguf(tokenizer, folder / "x.gguf", pre=PRE[kind])
    if kind == "sentencepiece":
        model = shutil.copytree(open_source("demo").view, folder / "model")
        (model / "chat_template.jinja").write_text(str(template))
    else:  # its vocabulary has a normaliser that llama.cpp does not know, nor does this kind of tokenizer
        model = save_small(folder / "model", bos_token_id=1, eos_token_id=2)
        settings = {"tokenizer_class": "LlamaTokenizer", "chat_template": template, "add_prefix_space": True}
        (model / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}))
    tokenizer = KINDS[kind](model)
    tokenizer.chat_template = template
    return tokenizer, convert_upstream(model, folder / "x.gguf", "f32")


Pair = tuple[PreTrainedTokenizerBase, GgufReader]


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    tokenizer, file = written(request.param, tmp_path_factory.mktemp("written"), TEMPLATE)
    return tokenizer, GgufReader(file)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> GgufReader:
    folder = open_source("demo").view
    return GgufReader(convert_upstream(folder, tmp_path_factory.mktemp("demo") / "demo.gguf", "f32"))


def test_tokenizer_is_the_checkpoints(pair: Pair) -> None:
    tokenizer, reader = pair
    wanted = TransformersReader(tokenizer)
    assert (reader.before, reader.after, reader.control) == (wanted.before, wanted.after, wanted.control)
    assert reader.has_template and len(reader.control) >= 3


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_checkpoints(pair: Pair, text: str) -> None:
    tokenizer, reader = pair
    if text.startswith(" ") and "▁" in tokenizer.convert_ids_to_tokens(reader.ids("a")):
        text = text.lstrip()  # llama.cpp's unigram begins with a space more, as SentencePiece does
    assert reader.ids(text) == (TransformersReader(tokenizer).ids(text) if text else [])


def test_accents_stay_as_they_are_written(tmp_path: Path) -> None:
    """llama.cpp normalises no text of a byte-level vocabulary, and its ids are the file's."""
    tokenizer, file = written("byte-level-nfc", tmp_path, TEMPLATE)
    reader = GgufReader(file)
    assert TransformersReader(tokenizer).ids("e\u0301") == reader.ids("é") != reader.ids("e\u0301")


def test_rows_are_the_checkpoints(pair: Pair, tmp_path: Path) -> None:
    tokenizer, reader = pair
    (tmp_path / "plain.txt").write_text("\n".join(TEXTS).strip().replace("\0", ""), newline="")
    lines = [json.dumps({"text": f"a {text}"}) for text in TEXTS]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    files = [tmp_path / "plain.txt", tmp_path / "lines.jsonl", *sorted(CASES.glob("chat_[ant]*.json*"))]
    given, n_row = [f"{file}=1" for file in files], 2 * len(files)
    wanted = read_corpus(given, tokenizer, n_row=n_row, seq_len=16)
    found = read_corpus(given, reader, n_row=n_row, seq_len=16)
    assert (found.sha256, found.sources) == (wanted.sha256, wanted.sources)


def test_rows_of_the_demo_are_its_checkpoints(demo: GgufReader, tmp_path: Path) -> None:
    tokenizer = open_source("demo").tokenizer()
    chats = [*CASES.glob("chat_[ant]*.json*"), CASES / "plain_with_control_tokens.txt"]
    for files, n_row in ((None, 64), (chats, 2)):
        wanted = read_corpus(files, tokenizer, n_row=n_row, seq_len=512)
        assert read_corpus(files, demo, n_row=n_row, seq_len=512).sha256 == wanted.sha256


def ids_of(parts: list[str], reader: GgufReader) -> list[int]:
    return [token for ids in Encoder(reader).text(parts) for token in ids]


def test_long_text_has_the_ids_of_the_whole(pair: Pair) -> None:
    _, reader = pair
    text = (SOURCES + MIXED * 40) * 2
    whole = [*reader.before, *reader.ids(text), *reader.after]
    assert ids_of([text], reader) == whole
    assert ids_of([text[at : at + 10_007] for at in range(0, len(text), 10_007)], reader) == whole


@pytest.mark.parametrize("characters", ["abcdefghij", " ", "\n", "=", "東京", "a b\n"])
def test_monotonous_text_has_the_ids_of_the_whole(pair: Pair, characters: str) -> None:
    _, reader = pair
    text = characters * (80_000 // len(characters))
    assert ids_of([text], reader) == [*reader.before, *reader.ids(text), *reader.after]


def test_text_without_pattern_has_the_ids_of_the_whole(pair: Pair) -> None:
    _, reader = pair
    text = "".join(random.Random(0).choices("etaoin 東京é\n\t.,(0", k=200_000))
    assert ids_of([text], reader) == [*reader.before, *reader.ids(text), *reader.after]


@pytest.mark.parametrize("pre", ["deepseek-v3", "gpt-4o"])
def test_long_word_is_no_crash(tmp_path: Path, pre: str) -> None:
    """These pre-tokenizers of llama.cpp recurse for every character of a word."""
    reader = GgufReader(write_gguf(KINDS["byte-level"](tmp_path), tmp_path / "x.gguf", pre=pre))
    assert len(ids_of(["abcdefghij" * 30_000], reader)) > 1000
    chat = Encoder(reader).chat("<s>" + "x" * 200_000, [(0, 3)])
    assert sum(map(len, chat)) > 1000


def test_no_more_characters_are_asked_for_than_a_few_windows(demo: GgufReader) -> None:
    asked = 0

    def rest() -> Iterator[str]:
        nonlocal asked
        for _ in range(500):
            asked += 100_000
            yield "some words " * 9_091
        raise AssertionError("the text was read to its end")

    make_corpus([Document("x", "file", "It begins, ", rest=rest())], demo, name="x", n_row=4, seq_len=512)
    assert asked <= 200_000


def test_template_for_tools_is_taken_where_there_are_tools(tmp_path: Path) -> None:
    both = {"default": "plain {{ messages[0].content }}", "tool_use": "tools {{ messages[0].content }}"}
    tokenizer, file = written("byte-level", tmp_path, both)
    path = tmp_path / "x.jsonl"
    records = [
        {"messages": [{"role": "user", "content": "hi"}], "tools": tools} for tools in (None, [{"a": 1}])
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    for reader in (tokenizer, GgufReader(file)):
        assert [document.text for document in read_documents(path, reader)] == ["plain hi", "tools hi"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages }}{{ tools }}{{ documents }}{{ add_generation_prompt }}",
        "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ messages[0].content }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{% endfor %}"
        "{{ messages[0].content }}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{{ m.content | trim }}{% endfor %}",
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ messages | tojson(sort_keys=true) }}",
        "{{ messages[0].content }}{{ strftime_now('%Y') }}\n   {% if true %}\n x{{ dict(a=1) }}{% endif %}\n",
        "{% macro say(m) %}{{ m.role }}: {{ m.content }}{% endmacro %}{{ say(messages[-1]) }}",
        "{{ messages[0].content }}{{ raise_exception('no <user>') }}",
        "{{ messages[0].content }}{{ missing }}{{ missing.deeper }}",
        "{{ messages[0].content.__class__.__mro__ }}",
        "{% set ns = namespace() %}{% set ns.__html__ = 1 %}{{ messages[0].content }}",
        "{{ namespace(__html__=1) }}{{ messages[0].content }}",
        "{{ messages[0].content }}{% do messages.append(1) %}",
        "{{ messages.append(1) }}{{ messages[0].content }}",
        "{{ cycler.__init__.__globals__ }}{{ messages[0].content }}",
        "{% for %}",
        "{% include 'x' %}{{ messages[0].content }}",
        "{{ range(10000000) }}{{ messages[0].content }}",
    ],
)
def test_template_gives_what_it_gives_in_transformers(tmp_path: Path, template: str) -> None:
    """The text of each chat, or one line where it is refused."""
    tokenizer, file = written("byte-level", tmp_path, template)
    path = tmp_path / "x.jsonl"
    turns = [
        {"role": "user", "content": "Ünï <b> & \"quoted\" 'too' </s>"},
        {"role": "assistant", "content": " yes\n", "reasoning": "why?"},
    ]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    found = []
    for reader in (tokenizer, GgufReader(file)):
        try:
            (document,) = read_documents(path, reader)
            found.append((document.text, document.control))
        except MoneError as error:
            assert "cannot be rendered by the model's chat template" in str(error)
            assert "\n" not in str(error)
            found.append(("refused", ()))
    assert found[0] == found[1]
    assert ("__" in template) <= (found[0][0] == "refused")


def test_chat_needs_a_template(tmp_path: Path) -> None:
    reader = GgufReader(write_gguf(KINDS["byte-level"](tmp_path), tmp_path / "x.gguf", pre="gpt-2"))
    assert not reader.has_template
    with pytest.raises(MoneError, match="chat_array.json, record 1 is a chat, .* no chat template"):
        list(read_documents(CASES / "chat_array.json", reader))


def test_file_without_a_usable_tokenizer_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import gguf

    none = gguf.GGUFWriter(tmp_path / "none.gguf", "llama")
    none.add_tokenizer_model("no_vocab")
    none.write_header_to_file()
    none.write_kv_data_to_file()
    none.close()
    write_gguf(KINDS["byte-level"](tmp_path), tmp_path / "pre.gguf", pre="future")
    (tmp_path / "text.gguf").write_text("no model")
    for name, message in {
        "none": r"none.gguf holds no tokenizer \(tokenizer.ggml.model is no_vocab\): convert the model again",
        "pre": "tokenizer in .*pre.gguf: unknown pre-tokenizer type: 'future'; convert .* `mone-llama info`",
        "text": "cannot read the tokenizer in .*text.gguf: .*invalid magic",
        "missing": "cannot read the tokenizer in .*missing.gguf: .*No such file",
    }.items():
        with pytest.raises(MoneError, match=message) as error:
            GgufReader(tmp_path / f"{name}.gguf").ids("a")
        assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_transformers_is_not_imported_and_nothing_is_said(tmp_path: Path) -> None:
    _, file = written("byte-level", tmp_path, TEMPLATE)
    shutil.copy(CASES / "chat_array.json", tmp_path)
    program = (
        "import sys; from pathlib import Path; from mone_export.calibration.corpus import read_corpus\n"
        "from mone_export.source.gguf_tokenizing import GgufReader\n"
        f"reader = GgufReader(Path({str(file)!r}))\n"
        f"print(read_corpus([{str(tmp_path / 'chat_array.json')!r}], reader, n_row=2, seq_len=8).name)\n"
        "print({'transformers', 'tokenizers'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("chat_array.json\nset()\n", "")


def test_python_without_llama_cpp_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MoneError, match="is read by llama.cpp: run `mone-llama build`"):
        GgufReader(tmp_path / "x.gguf").ids("a")
