"""From a GGUF to a GGUF with the demo: the checkpoint's decisions, the file's bytes, and what goes wrong."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Command
from gguf_file import without_command
from gguf_parts import taken_apart
from gguf_reference import assert_pruned_copy, keys_of, orders_of
from llama_logits import logits
from programs import run

import mone_export as mone
from mone_export import runtime
from mone_export.errors import MoneError
from mone_export.output.restore_check import restore_check
from mone_export.source import GgufFile
from mone_export.source.gguf_header import read_header

pytestmark = [pytest.mark.slow, pytest.mark.upstream]

ROWS: Mapping[str, Any] = {"n_row": 16, "seq_len": 256}
TOKENS = list(range(300, 364))
N_KILL = [2, pytest.param(10, marks=pytest.mark.nightly)]
# a step after every batch, and slow batches, so that kills hit all there is to hit
SLOW = """
import sys, time
from mone_export.calibration import llama_model, rows
rows.SECONDS_PER_STEP, run = 0, llama_model.LlamaModel.run
llama_model.LlamaModel.run = lambda *args: (time.sleep(0.2), run(*args))[1]
from mone_export.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as an F32 GGUF, all experts in it."""
    outfile = tmp_path_factory.mktemp("whole") / "demo.gguf"
    mone.export("demo", ratio=0, outtype="f32", outfile=outfile)
    return outfile


@pytest.fixture(scope="module")
def packed(whole: Path) -> Path:
    """The same in Q8_0."""
    outfile = whole.with_name("demo-q8_0.gguf")
    run(runtime.path() / "llama-quantize", whole, outfile, "q8_0")
    return outfile


@pytest.fixture(scope="module")
def half(packed: Path, text: Path) -> Path:
    """Half of it pruned."""
    outfile = packed.with_name("half.gguf")
    mone.export(packed, ratio=0.5, outfile=outfile, files=[text], **ROWS)
    return outfile


def nmse(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.square(found - wanted).sum() / np.square(wanted).sum())


@pytest.mark.parametrize("way", [{}, {"method": "drop", "score": "reap"}], ids=["default", "reap"])
def test_checkpoint_and_gguf_give_the_same_file(
    way: dict[str, Any], whole: Path, text: Path, tmp_path: Path
) -> None:
    files, kept = [], []
    for model in ("demo", whole):
        outfile = tmp_path / f"{len(files)}.gguf"
        plan = outfile.with_suffix(".json")
        options = {"files": [text], "outtype": "f32" if model == "demo" else "auto", **ROWS, **way}
        mone.export(model, ratio=0.5, outfile=outfile, plan_out=plan, **options)
        files.append(logits(outfile, TOKENS, n_batch=len(TOKENS)))
        layers = json.loads(plan.read_text())["layers"]
        kept.append({(layer, expert) for layer, found in layers.items() for expert in found["kept"]})
    different = len(kept[0] ^ kept[1]) // 2
    print(f"\n{different} of {len(kept[0])} kept experts differ, NMSE of logits {nmse(*files):.1e}")
    assert not different
    assert nmse(*files) < 1e-6
    assert nmse(files[1], logits(whole, TOKENS, n_batch=len(TOKENS))) > 1e-4, "a whole file must not pass"


def test_kept_experts_keep_their_bytes(packed: Path, half: Path) -> None:
    assert_pruned_copy(packed, half)
    assert restore_check(half, packed) == (80, 5)
    assert sum(count for count, _ in orders_of(half).values()) == 80


def test_pruned_twice(packed: Path, half: Path, text: Path, tmp_path: Path) -> None:
    outfile = tmp_path / "twice.gguf"
    report = mone.export(half, ratio=0.25, outfile=outfile, files=[text], **ROWS)
    first, second = orders_of(half), orders_of(outfile)
    n_left = sum(
        count - round(count * 0.25) for count, _ in first.values()
    )  # each layer's share is a whole number
    assert report is not None and sum(report.n_kept.values()) == n_left
    assert keys_of(outfile)["mone.ratio"] == np.float32(1 - n_left / 160)
    assert restore_check(outfile, packed) == (n_left, 5)
    before, after = (rows_of_novices(file) for file in (half, outfile))
    for layer, (count, order) in first.items():
        new_count, new_order = second[layer]
        assert set(new_order[:new_count]) <= set(order[:count]), "what was gone stays gone"
        for expert in order[count:]:
            old, new = before[layer][order.index(expert)], after[layer][new_order.index(expert)]
            assert np.array_equal(old, new), f"layer {layer}: the novice of {expert} changed"


def rows_of_novices(file: Path) -> dict[int, np.ndarray]:
    source = GgufFile(file)
    assert source.before is not None
    return {layer: source.before.novices(layer) for layer in source.before.order}


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (["--stock", "--ratio", "0.5"], "has novices, and a file by --method drop has none"),
        (["--fit", "4M"], "--fit cannot tell yet"),
        (["--ratio", "0.9"], r"that layer \d+ has left, fewer than"),
    ],
)
def test_what_cannot_be_done_twice(command: Command, half: Path, options: list[str], pattern: str) -> None:
    command(*options, "-o", half.with_name("x.gguf"), model=half).is_one_line(pattern)


def test_a_plan_serves_another_copy(packed: Path, text: Path, tmp_path: Path) -> None:
    plan, other = tmp_path / "plan.json", tmp_path / "demo.gguf"
    mone.export(packed, ratio=0.5, outfile=tmp_path / "a.gguf", files=[text], plan_out=plan, **ROWS)
    mone.export("demo", plan=plan, outfile=other, outtype="f32", files=[text], n_row=2, seq_len=64)
    assert orders_of(other) == orders_of(tmp_path / "a.gguf")
    keys = keys_of(other)
    assert (keys["mone.score"], keys["mone.scope"]) == ("error", "sensitivity")
    job, chosen = mone_rehearsed("demo", plan)
    assert {layer.layer: layer.kept for layer in chosen.layers} == {
        layer: tuple(order[:count]) for layer, (count, order) in orders_of(other).items()
    }
    assert job.size == mone_rehearsed("demo", plan)[0].size


def mone_rehearsed(model: str, plan: Path) -> Any:
    from mone_export.pipeline import rehearse

    return rehearse(model, plan=plan, n_row=2, seq_len=64)


def test_plans_that_do_not_fit(
    command: Command, small: Path, packed: Path, text: Path, tmp_path: Path
) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "x.gguf"
    mone.export(packed, ratio=0.5, outfile=out, files=[text], plan_out=plan, **ROWS)
    with pytest.raises(MoneError, match="--ratio with --plan"):
        mone.export(packed, plan=plan, ratio=0.5, outfile=out)
    with pytest.raises(MoneError, match="is a plan for 32 experts in 5 layers, the model has"):
        mone.export(small, plan=plan, outfile=out)
    with pytest.raises(MoneError, match="keeps different numbers of experts"):
        mone.export(packed, plan=plan, method="drop", outfile=out)
    with pytest.raises(MoneError, match="--plan-out .* would replace what is read as"):
        mone.export(packed, plan=plan, plan_out=plan, outfile=out)
    value = json.loads(plan.read_text())
    value["layers"]["0"]["kept"][0] = value["layers"]["0"]["kept"][1]
    plan.write_text(json.dumps(value))
    with pytest.raises(MoneError, match="does not name each of its experts once"):
        mone.export(packed, plan=plan, outfile=out)
    plan.write_text("[]")
    with pytest.raises(MoneError, match="is no plan of mone-export"):
        mone.export(packed, plan=plan, outfile=out)


def test_split_files(packed: Path, half: Path, text: Path, tmp_path: Path) -> None:
    whole = tmp_path / "in.gguf"
    shutil.copyfile(packed, whole)
    run(runtime.path() / "llama-gguf-split", "--split", "--split-max-size", "2M", whole, tmp_path / "in")
    parts = sorted(tmp_path.glob("in-*.gguf"))
    assert len(parts) > 2
    report = mone.export(
        parts[0], ratio=0.5, outfile=tmp_path / "out.gguf", files=[text], split_max_size=2_000_000, **ROWS
    )
    assert report is not None
    assert report.outfile.name.startswith("out-00001-of-") and not (tmp_path / "out.gguf").exists()
    header, wanted = read_header(report.outfile), read_header(half)
    assert len(header.files) > 1 and header.tensors.keys() == wanted.tensors.keys()
    assert restore_check(report.outfile, packed) == (80, 5)
    one, other = (logits(file, TOKENS, n_batch=64) for file in (report.outfile, half))
    assert np.array_equal(one, other)
    parts[1].unlink()
    with pytest.raises(MoneError, match=f"get {parts[1].name} as well"):
        mone.export(parts[0], ratio=0.5, outfile=tmp_path / "x.gguf", files=[text])


def test_a_changed_expert_is_found(packed: Path, whole: Path, half: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.gguf"
    shutil.copyfile(half, changed)
    info = read_header(half).tensors["blk.2.ffn_up_exps.weight"]
    count, order = orders_of(half)[2]
    with changed.open("r+b") as file:
        file.seek(info.offset + info.size // count * 3)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(MoneError, match=rf"blk\.2\.ffn_up_exps\.weight: expert {order[3]} \(now 3\) differs"):
        restore_check(changed, packed)
    with pytest.raises(MoneError, match="it was quantised since"):
        restore_check(half, whole)


def test_ordinary_files(packed: Path, text: Path, tmp_path: Path, command: Command) -> None:
    outfile, plan = tmp_path / "stock.gguf", tmp_path / "plan.json"
    mone.export(packed, ratio=0.25, method="drop", outfile=outfile, files=[text], plan_out=plan, **ROWS)
    layers = json.loads(plan.read_text())["layers"]
    assert_pruned_copy(packed, outfile, {int(layer): found["kept"] for layer, found in layers.items()})
    done = command("--restore-check", packed, model=outfile, text="")
    done.is_fine()
    assert "all 120 experts in 5 layers equal those of" in done.out


def test_saved_statistics_are_enough(
    packed: Path, half: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats, outfile = tmp_path / "stats", tmp_path / "x.gguf"
    options: dict[str, Any] = {"files": [text], "stats": stats, "outfile": outfile, **ROWS}
    mone.export(packed, ratio=0.25, **options)

    def fail(*_: object) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr("mone_export.calibration.llama_model.LlamaModel.run", fail)
    mone.export(packed, ratio=0.5, **options)
    before = without_command(outfile)
    assert read_header(outfile).tensors.keys() == read_header(half).tensors.keys()
    mone.export(packed, ratio=0.5, stats=stats, outfile=outfile)
    assert without_command(outfile) == before
    assert orders_of(outfile) == orders_of(half)


def test_statistics_serve_their_own_road(command: Command, packed: Path, text: Path, tmp_path: Path) -> None:
    own = {road: tmp_path / road for road in ("gguf", "checkpoint")}
    models = {"gguf": packed, "checkpoint": "demo"}
    for road, other in (("gguf", "checkpoint"), ("checkpoint", "gguf")):
        given = ("--stats", own[road], "-o", tmp_path / "x.gguf", "--novice", "mean")
        command(*given, model=models[road]).is_fine()
        done = command(*given, model=models[other])
        done.is_one_line(
            f"{road} was made from a {road.upper() if road == 'gguf' else road}, .* choose another"
        )


@pytest.mark.parametrize("n_kill", N_KILL)
@pytest.mark.nightly
def test_many_kills_one_result(n_kill: int, packed: Path, text: Path, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    dice, kills, numbers = random.Random(1), 0, itertools.count()

    def complete(*, mercy: bool) -> tuple[bytes, bytes]:
        nonlocal kills
        work = tmp_path / str(next(numbers))
        outfile = work.with_suffix(".gguf")
        options = ["--ratio", 0.5, "-f", text, "--chunks", 24, "-c", 64, "-ub", 64, "-b", 64, "-q"]
        arguments = [packed, "-o", outfile, "--workdir", work, *options]
        while True:
            command = [sys.executable, "-c", SLOW, *map(str, arguments)]
            with subprocess.Popen(command, env=environment) as process:
                try:
                    assert process.wait(None if mercy or kills >= n_kill else dice.uniform(2, 8)) == 0
                    break
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    kills += 1
        assert not list(tmp_path.glob("*.part"))
        return (work / "statistics.safetensors").read_bytes(), outfile.read_bytes()

    wanted = complete(mercy=True)
    while kills < n_kill:
        assert complete(mercy=False) == wanted
    print(f"\n{kills} kills")


@pytest.mark.parametrize("road", ["checkpoint", "gguf"])
@pytest.mark.by_day(1)
def test_two_bits_in_one_command(road: str, whole: Path, text: Path, tmp_path: Path) -> None:
    model, imatrix = "demo" if road == "checkpoint" else whole, tmp_path / "imatrix.gguf"
    outfile, plain = tmp_path / "iq2_xs.gguf", tmp_path / "plain.gguf"
    options: dict[str, Any] = {"ratio": 0.5, "novice": "least-squares", "files": [text], **ROWS}
    mone.export(model, outfile=outfile, outtype="iq2_xs", imatrix=imatrix, **options)
    kept = {layer: count for layer, (count, _) in orders_of(outfile).items()}
    found = read_header(imatrix).tensors
    for layer, count in kept.items():
        for matrix in ("gate", "up", "down"):
            assert found[f"blk.{layer}.ffn_{matrix}_exps.weight.counts"].shape[-1] == count
        assert f"blk.{layer}.attn_q.weight.in_sum2" in found
    assert "iq2_xs" in {info.kind for info in read_header(outfile).tensors.values()}
    # the matrix is what llama-quantize has used, and it changes what it makes
    again = tmp_path / "again.gguf"
    mone.export(model, outfile=plain, outtype="auto" if road == "gguf" else "f32", **options)
    run(runtime.path() / "llama-quantize", "--imatrix", imatrix, plain, again, "q3_k_m")
    mone.export(model, outfile=outfile, outtype="q3_k_m", **options)
    assert same_tensors(outfile, again)
    mone.export(model, outfile=outfile, outtype="q3_k_m", with_imatrix=False, **options)
    assert not same_tensors(outfile, again)


def same_tensors(one: Path, other: Path) -> bool:
    a, b = taken_apart(one).tensors, taken_apart(other).tensors
    return a.keys() == b.keys() and all(a[name].data == b[name].data for name in a)
