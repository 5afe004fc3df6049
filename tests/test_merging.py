"""Merged halves are the whole; weights are repetitions; what does not belong together is refused."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from mone_export import cli, cli_stats
from mone_export.artifacts import Calibration, Corpus, ExpertStats
from mone_export.calibration.corpus import fingerprint_rows, read_corpus
from mone_export.calibration.loading import Model, load
from mone_export.calibration.merging import merge
from mone_export.calibration.passes import calibrate
from mone_export.errors import MoneError
from mone_export.pruning.planning import plan
from mone_export.pruning.scoring import SCORES, score
from mone_export.source import open_source
from mone_export.source.tokenizing import load_tokenizer

pytestmark = pytest.mark.slow  # a whole command each

TENSORS = [field.name for field in fields(ExpertStats) if field.name != "n_token"]
TOLERANCE = 1e-11  # of float64 sums over the same rows, batched the same way


@pytest.fixture(scope="module")
def demo() -> Model:
    return load(open_source("demo").folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def rows(text: Path) -> torch.Tensor:
    return read_corpus([text], load_tokenizer(open_source("demo").folder), n_row=16, seq_len=128).tokens


def run(model: Model, rows: torch.Tensor, name: str = "text") -> Calibration:
    """Calibrate row by row, so that the matrix products do not depend on how many rows there are."""
    parts = [
        calibrate(model, Corpus(row[None], name, fingerprint_rows(row[None])), model_sha256="m" * 64)
        for row in rows
    ]
    layers, inputs = dict(parts[0].layers), dict(parts[0].inputs)
    for part in parts[1:]:
        layers = {layer: stats.merge(part.layers[layer]) for layer, stats in layers.items()}
        inputs = {name: sums.merge(part.inputs[name]) for name, sums in inputs.items()}
    sha256 = fingerprint_rows(rows)
    part = replace(parts[0].parts[0], corpus_sha256=sha256, sources={name: rows.numel()})
    changes = {"layers": layers, "inputs": inputs, "parts": (part,)}
    return replace(parts[0], corpus_sha256=sha256, n_token=rows.numel(), corpus_name=name, **changes)


def assert_close(found: Calibration, wanted: Calibration) -> None:
    assert found.layers.keys() == wanted.layers.keys() and found.n_token == wanted.n_token
    for layer, stats in wanted.layers.items():
        assert found.layers[layer].n_token == stats.n_token
        for name in TENSORS:
            a, b = getattr(found.layers[layer], name), getattr(stats, name)
            scale = b.abs().amax(-1, keepdim=True) if b.dim() == 2 else b.abs()
            assert ((a - b).abs() <= TOLERANCE * scale).all(), f"layer {layer}: {name}"
    assert found.inputs.keys() == wanted.inputs.keys() and wanted.inputs
    for matrix, sums in wanted.inputs.items():
        torch.testing.assert_close(found.inputs[matrix].squares, sums.squares, rtol=TOLERANCE, atol=0)
        assert torch.equal(found.inputs[matrix].n_row, sums.n_row)


def test_sensitivities_are_the_mean_by_tokens(demo: Model, rows: torch.Tensor) -> None:
    few, many = run(demo, rows[:4]), run(demo, rows[4:])
    sensitivity = dict.fromkeys(few.layers, 1.0)
    files = {
        "few": replace(few, sensitivity=sensitivity),
        "many": replace(many, sensitivity=dict.fromkeys(few.layers, 5.0)),
    }
    assert merge(files).sensitivity == pytest.approx(dict.fromkeys(few.layers, 4.0))
    assert merge(files, weights={"few": 0.5}).sensitivity == pytest.approx(dict.fromkeys(few.layers, 3.0))
    assert merge(files | {"many": many}).sensitivity == {}, "not of all, not known"


def test_merged_halves_equal_the_whole(
    demo: Model, rows: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command and its files, on the demo model: the same statistics and the same decision."""
    whole = run(demo, rows)
    for name, half in (("a", rows[:8]), ("b", rows[8:])):
        run(demo, half, name).save(tmp_path / name)
    files = [str(tmp_path / name) for name in "ab"]
    assert cli_stats.main(["merge", *files, "-o", str(tmp_path / "c")]) == 0
    merged = Calibration.load(tmp_path / "c")
    assert_close(merged, whole)
    assert [part.sources for part in merged.parts] in ([{"a": 1024}, {"b": 1024}], [{"b": 1024}, {"a": 1024}])
    for name in SCORES:
        assert plan(score(merged, name), ratio=0.5) == plan(score(whole, name), ratio=0.5), name
    assert cli_stats.main(["merge", *reversed(files), "-o", str(tmp_path / "d")]) == 0
    assert (tmp_path / "d").read_bytes() == (tmp_path / "c").read_bytes(), "the order does not matter"
    assert f"wrote {tmp_path / 'd'}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def thirds(demo: Model, rows: torch.Tensor) -> list[Calibration]:
    pieces = zip("abc", rows[:14].split([2, 4, 8]), strict=True)
    return [run(demo, piece, name) for name, piece in pieces]


def named(parts: Sequence[Calibration]) -> dict[str, Calibration]:
    return {part.corpus_name: part for part in parts}


def test_inputs_are_those_that_all_have_seen(thirds: list[Calibration]) -> None:
    a, b, c = thirds
    less = replace(c, inputs={name: sums for name, sums in c.inputs.items() if "down" in name})
    found = merge(named([a, b, less]), weights={"a": 0.5})
    assert found.inputs.keys() == less.inputs.keys()
    times = 0.5 * 14 / 2, 0.5 * 14 / 12  # of the 14 rows: those of a, those of b and c
    for name, sums in found.inputs.items():
        wanted = times[0] * a.inputs[name].n_row + times[1] * (b.inputs[name].n_row + c.inputs[name].n_row)
        torch.testing.assert_close(sums.n_row, wanted)
    assert merge(named([a, replace(b, inputs={})])).inputs == {}


def test_grouping_changes_neither_values_nor_fingerprint(thirds: list[Calibration]) -> None:
    a, b, c = thirds
    at_once = merge(named(thirds))
    for pair, other in (((a, b), c), ((b, c), a)):
        in_steps = merge({"pair": merge(named(pair)), "other": other})
        assert_close(in_steps, at_once)
        assert (in_steps.corpus_sha256, in_steps.parts) == (at_once.corpus_sha256, at_once.parts)
    assert len({at_once.corpus_sha256, *(part.corpus_sha256 for part in thirds)}) == 4


def test_weight_repeats_the_tokens_of_a_file(demo: Model, rows: torch.Tensor) -> None:
    """6 rows of a as 6/10 of the evidence beside 12 rows of b: each row of a counts 1.8 times, of b 0.6."""
    a, b = run(demo, rows[:3], "a"), run(demo, rows[3:9], "b")
    found = merge(named([a, b]), weights={"a": 0.6})
    assert {part.sources.popitem()[0]: part.weight for part in found.parts} == pytest.approx(
        {"a": 1.8, "b": 0.6}
    )
    # the same evidence spelt out: 3 copies of a beside 1 of b, all scaled by 0.6
    repeated = {
        layer: a.layers[layer].merge(a.layers[layer]).merge(a.layers[layer]).merge(b.layers[layer])
        for layer in a.layers
    }
    for layer, stats in found.layers.items():
        assert stats.n_token == rows[:9].numel()
        assert torch.equal(stats.count, a.layers[layer].count + b.layers[layer].count)
        wanted = repeated[layer].reweighted(0.6)
        for name in set(TENSORS) - {"count"}:
            x, y = getattr(stats, name), getattr(wanted, name)
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10 * float(y.abs().max()))
        assert float(stats.weight.sum()) == pytest.approx(stats.n_token * found.spec.top_k)


def test_weights_that_are_the_files_own_shares_change_no_score(thirds: list[Calibration]) -> None:
    plain = merge(named(thirds))
    weighted = merge(named(thirds), weights={"a": 2 / 14, "b": 4 / 14})
    for name in SCORES:
        torch.testing.assert_close(score(weighted, name).values, score(plain, name).values, rtol=1e-9, atol=0)


def test_files_without_a_weight_divide_the_rest_by_tokens(thirds: list[Calibration]) -> None:
    found = merge(named(thirds), weights={"a": 0.4})  # b : c = 4 : 8 of the remaining 0.6
    times = {next(iter(part.sources)): part.weight for part in found.parts}
    assert times == pytest.approx({"a": 0.4 * 14 / 2, "b": 0.2 * 14 / 4, "c": 0.4 * 14 / 8})
    other = merge(named(thirds), weights={"a": 0.5})
    assert other.corpus_sha256 != found.corpus_sha256 != merge(named(thirds)).corpus_sha256


def test_files_of_different_models_are_refused_with_both_fingerprints(thirds: list[Calibration]) -> None:
    other = replace(thirds[1], model_sha256="n" * 64)
    with pytest.raises(MoneError, match=f"a and b are of different models .*{'m' * 16} and {'n' * 16}"):
        merge({"a": thirds[0], "b": other})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a"], "merging takes two statistics files or more"),
        (["a", "a"], "a is named twice"),
        (["a", "copy"], r"a and copy hold the same text \(SHA-256 [0-9a-f]{16}\), which would count twice"),
        (["a", "missing"], "missing is not a statistics file"),
        (["a", "b", "--weight", "c=0.5"], "--weight names c, which is none of the files: a, b"),
        (["a", "b", "--weight", "a"], "--weight a: write FILE=SHARE"),
        (["a", "b", "--weight", "a=1"], "--weight a=1: a share of the evidence is between 0 and 1"),
        (["a", "b", "--weight", "a=nan"], "--weight a=nan: a share of the evidence is between 0 and 1"),
        (["a", "b", "--weight", "a=0.7", "--weight", "b=0.7"], "the weights sum to 1.4: all shares"),
        (["a", "b", "--weight", "a=0.2", "--weight", "b=0.2"], "the weights sum to 0.4: all shares"),
    ],
)
def test_merge_that_cannot_be_is_one_line(
    thirds: list[Calibration],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, calibration in zip(("a", "b", "copy"), (*thirds[:2], thirds[0]), strict=True):
        calibration.save(Path(name))
    assert cli_stats.main(["merge", *arguments, "-o", "out"]) == 1
    captured = capsys.readouterr()
    assert re.match(f"mone-stats: .*{message}", captured.err), captured.err
    assert captured.err.count("\n") == 1 and not captured.out and not Path("out").exists()


@pytest.mark.parametrize("way", ["./a", "linked", "hard"])
@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_merge_never_replaces_what_it_reads(
    thirds: list[Calibration],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    way: str,
    options: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, calibration in zip(("a", "b"), thirds[:2], strict=True):
        calibration.save(Path(name))
    Path("linked").symlink_to("a")
    Path("hard").hardlink_to("a")
    before = Path("a").read_bytes()
    assert cli_stats.main(["merge", "a", "b", "-o", way, *options]) == 1
    assert Path("a").read_bytes() == before and Path("linked").is_symlink()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mone-stats: -o ") and "would replace what is read" in line


def test_merge_replaces_another_file_only_when_told(
    thirds: list[Calibration], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, calibration in zip(("a", "b"), thirds[:2], strict=True):
        calibration.save(tmp_path / name)
    notes = tmp_path / "notes.txt"
    notes.write_text("of great value")
    command = ["merge", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(notes)]
    assert cli_stats.main(command) == 1
    assert notes.read_text() == "of great value" and "--overwrite" in capsys.readouterr().err
    assert cli_stats.main([*command, "--overwrite"]) == 0
    assert Calibration.load(notes).n_token == thirds[0].n_token + thirds[1].n_token
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b", "notes.txt"]


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
@pytest.mark.by_day(1)
def test_show_survives_its_reader(thirds: list[Calibration], tmp_path: Path, encoding: str) -> None:
    """The reader of a pipe goes away; the name of a text has letters that the output lacks."""
    part = replace(thirds[0].parts[0], sources={"Wörter.txt": 256})
    replace(thirds[0], parts=(part,)).save(tmp_path / "a")
    code = "import sys; from mone_export.cli_stats import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "show", str(tmp_path / "a")]
    env = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(command, env=env, capture_output=True, text=True, encoding=encoding)
    assert (done.returncode, done.stderr) == (0, "") and re.search("W.rter.txt 256", done.stdout)
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, env=env, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, env=env, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "No space left" in done.stderr


def test_merged_file_serves_an_export(
    small: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [str(small), "--ratio", "0.5", "--chunks", "2", "-c", "32", "-o", str(tmp_path / "x.gguf")]
    other = tmp_path / "other.txt"
    other.write_text("words of another text " * 20)
    for name, file in (("a", text), ("b", other)):
        assert cli.main([*options, "-q", "-f", str(file), "--stats", str(tmp_path / name)]) == 0
    merged = str(tmp_path / "c")
    assert cli_stats.main(["merge", str(tmp_path / "a"), str(tmp_path / "b"), "-o", merged]) == 0
    assert cli.main([*options, "--stats", merged]) == 0
    out = capsys.readouterr().out
    assert f"text     {text.name} 64 tokens" in out and "text     other.txt 64 tokens" in out
    assert cli.main([*options, "--stats", merged, "-f", str(text)]) == 1, "another text than the file's"


def test_show_is_one_line_a_layer(
    thirds: list[Calibration], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thirds[0].save(tmp_path / "a")
    assert cli_stats.main(["show", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "32 experts, 4 used per token" in out and "256 tokens" in out
    lines = [line.split() for line in out.splitlines() if line.startswith("    ") and " of " in line]
    assert [int(line[0]) for line in lines] == list(thirds[0].layers)
    for line, stats in zip(lines, thirds[0].layers.values(), strict=True):
        count = stats.count.double()
        shares = count[count > 0] / count.sum()
        assert int(line[1]) == int((count > 0).sum())
        assert float(line[4]) == pytest.approx(float(-(shares * shares.log2()).sum()), abs=0.006)
        assert int(line[5]) == int((count < 32).sum())
