"""Each caution is said where there is reason, and only there; reports and dry runs have them."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from command import Command
from families import ROWS
from family_models import calibrated, save_family, without_vocabulary

import mone_export as mone
from mone_export import cautions
from mone_export.artifacts import TextSample
from mone_export.calibration.corpus import head, read_corpus
from mone_export.source import llamacpp, open_source

ENGLISH = """The harbour was quiet when the first of the boats came back, and the men who had waited on the
wall since the early morning said nothing to each other. It is told that in those years a storm could take
half of the fleet, and that nobody in the town would speak of it for weeks. Whether this was so in that
winter is hard to say, as the books of the parish were lost with the tower that had held them. """
GERMAN = """Der Hafen war still, als die ersten Boote zurueck kamen, und die Maenner auf der Mauer sagten
nichts zu einander. Es ist die Rede davon, dass ein Sturm in den Jahren die halbe Flotte nahm und dass sich
auch im Dorf niemand mit dem Geschehen auf eine Weise befassen wollte, die von den anderen nicht verstanden
worden ist. """
RUSSIAN = (
    """Гавань была тиха, когда первые лодки вернулись, и люди на стене не сказали друг другу ни слова. """
)
CHINESE = "港口很安静，第一批船回来的时候，墙上的人们彼此一句话也没有说。那个冬天的事情现在很难说清楚了。"
CODE = """def total(rows: list[dict[str, int]]) -> int:
    found = {key: 0 for key in ("first", "second")}
    for row in rows:
        for key, value in row.items():
            found[key] += value * 2 if key == "first" else value
    return sum(found.values()) + len(rows)

"""


def said(found: Iterator[str] | tuple[str, ...]) -> str:
    """The one line that was said, or nothing."""
    lines = [*found]
    assert len(lines) <= 1 and all("\n" not in line for line in lines)
    return lines[0] if lines else ""


def pieces(text: str, n: int = 24) -> list[str]:
    whole = text * (1 + 512 * n // len(text))
    return [whole[at : at + 512] for at in range(0, 512 * n, 512)]


@pytest.mark.parametrize(
    ("text", "kind"),
    [(ENGLISH, "English"), (GERMAN, "German"), (RUSSIAN, "Cyrillic"), (CHINESE, "Cjk"), (CODE, "code")],
)
def test_text_of_one_kind_is_named(text: str, kind: str) -> None:
    assert f"all {kind}, as far" in said(cautions.one_kind(pieces(text)))
    assert not said(cautions.one_kind(pieces(text, 4))), "too little to tell"


@pytest.mark.parametrize("others", [(CODE,), (GERMAN, RUSSIAN), (CHINESE, CODE)])
def test_a_mixed_text_is_not(others: tuple[str, ...]) -> None:
    mixed = pieces(ENGLISH, 40) + [piece for other in others for piece in pieces(other, 6)]
    assert not said(cautions.one_kind(mixed))


@pytest.mark.parametrize("piece", ["", "17 23 5 99", "Qwlk zzrt bnmp kkl wqrt", "the a le la de"])
def test_what_is_not_clear_is_no_kind(piece: str) -> None:
    assert cautions.kind_of(piece) == ""


@pytest.mark.parametrize(("n_row", "seq_len"), [(64, 512), (100, 2048), (16, 512)])
def test_the_built_in_text_is_of_several_kinds(n_row: int, seq_len: int) -> None:
    corpus = read_corpus((), open_source("demo").tokenizer(), n_row=n_row, seq_len=seq_len)
    assert corpus.sample and not said(cautions.one_kind(corpus.sample.pieces))


@pytest.mark.parametrize(
    ("config", "senses"),
    [
        ({"vision_config": {"depth": 3}, "text_config": {"hidden_size": 8}}, True),
        ({"audio_config": {"depth": 3}}, True),
        ({"qwen3vlmoe.rope.dimension_sections": [24, 20, 20, 0]}, True),
        ({"hidden_size": 8, "vision_config": None}, False),
        ({"qwen3moe.rope.dimension_count": 64}, False),
    ],
)
def test_models_that_see(config: dict[str, Any], senses: bool) -> None:
    assert ("text alone" in said(cautions.senses(config))) is senses


@pytest.mark.parametrize(("n_chat", "warned"), [(0, True), (3, False), (None, False)])
def test_chat_models_without_chats(n_chat: int | None, warned: bool) -> None:
    assert ("chat template" in said(cautions.without_template(TextSample((), n_chat)))) is warned


@pytest.mark.parametrize(
    ("n_token", "window", "sliding", "words"),
    [
        (256, 4096, None, "short against the model's window of 4096"),
        (512, 4096, None, ""),
        (256, 256, None, ""),
        (2048, 131072, 4096, "sliding window of 4096.* -c 8192"),
        (2048, 131072, 1024, ""),
        (2048, 4096, 4096, ""),
        (128, None, None, ""),
    ],
)
def test_short_rows(n_token: int, window: int | None, sliding: int | None, words: str) -> None:
    found = said(cautions.short_rows(n_token, window, sliding))
    assert bool(found) is bool(words)
    assert all(part in found for part in words.split(".*"))


@pytest.mark.parametrize(
    ("config", "sliding"),
    [
        ({"sliding_window": 128}, 128),
        ({"sliding_window": None}, None),
        ({"sliding_window": 4096, "use_sliding_window": False}, None),
        ({"text_config": {"sliding_window": 1024}, "sliding_window": 5}, 1024),
        ({"gpt-oss.attention.sliding_window": 128}, 128),
        ({"gpt-oss.attention.sliding_window": 0}, None),
        ({}, None),
    ],
)
def test_sliding_windows_are_read(config: dict[str, Any], sliding: int | None) -> None:
    assert cautions.sliding_window(config) == sliding


@pytest.mark.parametrize(
    ("fit", "whole", "memory", "words"),
    [(16, 30, 64, "--n-cpu-moe"), (16, 30, 32, ""), (32, 30, 64, ""), (30, 30, 64, "")],
)
def test_experts_in_main_memory(fit: int, whole: int, memory: int, words: str) -> None:
    found = said(cautions.main_memory(fit * 10**9, whole * 10**9, memory * 10**9))
    assert words in found and bool(found) is bool(words)


# --------------------------------------------------------------------------------- in reports and dry runs


def chats(folder: Path) -> Path:
    messages = [{"role": "user", "content": ENGLISH}, {"role": "assistant", "content": GERMAN}]
    (file := folder / "chats.jsonl").write_text("\n".join([json.dumps({"messages": messages})] * 8))
    return file


def test_a_report_and_a_dry_run_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the demo, whose tokenizer has a chat template and whose window has 2048 tokens."""
    (prose := tmp_path / "prose.txt").write_text(ENGLISH * 40)
    given: dict[str, Any] = {"ratio": 0.5, "n_row": 4, "seq_len": 128, "allocation": "even"}
    report = mone.export("demo", outfile=tmp_path / "a.gguf", files=[prose], **given)
    assert report
    wanted = ("all English", "holds no chat", "rows of 128 tokens")
    assert all(any(words in remark for remark in report.remarks) for words in wanted)
    options = ["demo", "--ratio", "0.5", "-f", str(prose), "--chunks", "4", "-c", "128", "--dry-run"]
    assert mone.cli.main([*options, "--json"]) == 0
    event = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [*event["remarks"]] == [remark for remark in report.remarks if remark in event["remarks"]]
    assert len(event["remarks"]) == len(wanted)
    assert mone.cli.main(options) == 0
    out = capsys.readouterr().out
    assert all(f"note     {remark[:200]}" in out for remark in event["remarks"])
    quiet = mone.export("demo", outfile=tmp_path / "b.gguf", files=[chats(tmp_path)], **given)
    assert quiet and not [remark for remark in quiet.remarks if "chat" in remark or "all " in remark]


def test_a_mix_is_looked_at_as_a_whole(tmp_path: Path) -> None:
    (prose := tmp_path / "prose.txt").write_text(ENGLISH * 40)
    (code := tmp_path / "code.txt").write_text(CODE * 60)
    tokenizer = open_source("demo").tokenizer()
    mixed = read_corpus([f"{prose}=1", f"{code}=1"], tokenizer, n_row=8, seq_len=128)
    assert mixed.sample and {*map(cautions.kind_of, mixed.sample.pieces)} == {"English", "code"}
    assert mixed.sample.n_chat == 0 and head(mixed, 2).sample == mixed.sample
    with_chats = read_corpus([f"{prose}=1", f"{chats(tmp_path)}=1"], tokenizer, n_row=4, seq_len=128)
    assert with_chats.sample and with_chats.sample.n_chat
    assert not any("<|" in piece for piece in with_chats.sample.pieces), "control tokens are no text"


def test_nothing_is_said_where_nothing_is_pruned(tmp_path: Path) -> None:
    report = mone.export("demo", ratio=0, outfile=tmp_path / "a.gguf")
    assert report and not report.remarks


def test_a_size_and_the_memory(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = 4 * sum(file.stat().st_size for file in command.model.glob("*.safetensors"))
    for memory, warned in ((whole, True), (1000, False)):
        found = psutil.virtual_memory()._replace(total=memory)
        monkeypatch.setattr(cautions.psutil, "virtual_memory", lambda found=found: found)
        done = command("--fit", "800k", "--dry-run", "--allocate", "even", quiet=False)
        done.is_fine()
        assert ("--n-cpu-moe" in done.out) is warned
        assert (
            bool(re.search(r"would have [\d.]+ [kM]B, this machine has [\d.]+ [kM]B of memory", done.out))
            is warned
        )


@pytest.mark.parametrize("ratio", [0.5, 0.0])
@pytest.mark.parametrize("mtp", ["keep", "drop"])
def test_blocks_that_predict_further_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mtp: str, ratio: float
) -> None:
    """By what the file holds; of statistics made before, since the model has no tokenizer."""
    monkeypatch.setattr(llamacpp, "converter_class", without_vocabulary(llamacpp.converter_class))
    row = next(row for row in ROWS if row.mtp and row.mtp_kept)
    source = open_source(save_family(row, tmp_path / "model"))
    assert source.predicts and not open_source("demo").predicts
    stats = replace(calibrated(tmp_path / "model", source.spec)[1], config=source.computing_config)
    replace(stats, model_sha256=source.fingerprint()).save(tmp_path / "stats")
    given: dict[str, Any] = {"ratio": ratio, "allocation": "even", "outtype": "f32", "mtp": mtp}
    report = mone.export(source, outfile=tmp_path / "a.gguf", stats=tmp_path / "stats", **given)
    assert report
    wanted = {("keep", 0.5): ["stays, with all"], ("keep", 0.0): []}.get((mtp, ratio), ["is not in the file"])
    found = [remark for remark in report.remarks if "multi-token" in remark]
    assert len(found) == len(wanted) and all(words in found[0] for words in wanted)
    assert open_source(tmp_path / "a.gguf").predicts is (mtp == "keep")
