"""Importance matrices of what a calibration has seen: whose inputs, for which types, and where none are."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf_file
import numpy as np
import pytest
import torch

import mone_export as mone
from mone_export.output.importance import Rounding, importance_matrix
from mone_export.pruning.planning import plan, plan_without_scores
from mone_export.pruning.scoring import score
from mone_export.recipe import Recipe
from mone_export.source import GgufFile

pytestmark = [pytest.mark.slow, pytest.mark.upstream]

ROWS: dict[str, Any] = {"n_row": 4, "seq_len": 128}


@pytest.fixture(scope="module")
def calibration(demo_gguf: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> mone.Calibration:
    stats = tmp_path_factory.mktemp("seen") / "stats"
    mone.export(demo_gguf, ratio=0.5, outfile=stats.with_suffix(".gguf"), files=[text], stats=stats, **ROWS)
    return mone.Calibration.load(stats)


def made(
    base: Path, calibration: mone.Calibration, chosen: mone.Plan, outtype: str, file: Path
) -> dict[str, np.ndarray]:
    """What the matrix says that is kept in a file; the one that rounds must say the same."""
    shapes = {name: info.shape[::-1] for name, info in GgufFile(base).header.tensors.items()}
    rounding = Rounding(outtype, with_imatrix=True, imatrix=file)
    means = importance_matrix(shapes, GgufFile(base), calibration, chosen, rounding)
    found = {name: tensor.data for name, tensor in gguf_file.read(file).tensors.items()}
    for name, mean in means.items():
        counts = found[f"{name}.counts"].reshape(-1, 1)
        sums = found[f"{name}.in_sum2"].reshape(len(counts), -1)
        each = np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1))
        np.testing.assert_array_equal(mean.reshape(each.shape), each)
    assert {f"{name}.counts" for name in means} == {name for name in found if name.endswith(".counts")}
    return found


def test_it_is_numbered_as_the_file(calibration: mone.Calibration, demo_gguf: Path, tmp_path: Path) -> None:
    chosen = plan(score(calibration), ratio=0.5)
    outfile = tmp_path / "half.gguf"
    mone.write(demo_gguf, calibration, chosen, outfile)
    found = made(outfile, calibration, chosen, "q4_k_m", tmp_path / "imatrix.gguf")
    for layer in chosen.layers:
        for matrix, own in (("gate", "up"), ("up", "up"), ("down", "down")):
            sums = calibration.inputs[f"blk.{layer.layer}.ffn_{own}_exps.weight"]
            squares = found[f"blk.{layer.layer}.ffn_{matrix}_exps.weight.in_sum2"]
            np.testing.assert_allclose(squares, sums.squares[list(layer.kept)], rtol=1e-6)
            counts = found[f"blk.{layer.layer}.ffn_{matrix}_exps.weight.counts"]
            assert counts.ravel().tolist() == sums.n_row[list(layer.kept)].tolist()


def test_only_types_that_need_it_hear_of_what_nobody_saw(
    calibration: mone.Calibration, demo_gguf: Path, tmp_path: Path
) -> None:
    chosen = plan_without_scores(calibration.spec, Recipe.of(0.0))
    own = {name: sums for name, sums in calibration.inputs.items() if name != "blk.0.attn_q.weight"}
    less = replace(calibration, inputs=own)
    file = tmp_path / "imatrix.gguf"
    found = made(demo_gguf, less, chosen, "iq2_xs", file)
    assert (found["blk.0.attn_q.weight.in_sum2"] == 1).all()
    assert found["blk.0.attn_q.weight.counts"].tolist() == [1]
    assert found.keys() - made(demo_gguf, less, chosen, "q4_k_m", file).keys() == {
        "blk.0.attn_q.weight.in_sum2",
        "blk.0.attn_q.weight.counts",
    }


def test_saved_statistics_have_what_it_takes(
    calibration: mone.Calibration, demo_gguf: Path, text: Path, tmp_path: Path
) -> None:
    """No text, no model in memory: the same bytes as with them."""
    stats, one, other = tmp_path / "stats", tmp_path / "one.gguf", tmp_path / "other.gguf"
    calibration.save(stats)
    options: dict[str, Any] = {"ratio": 0.5, "novice": "least-squares", "outtype": "iq2_s"}
    mone.export(demo_gguf, outfile=one, stats=stats, **options)
    mone.export(demo_gguf, outfile=other, files=[text], **ROWS, **options)
    tensors = [gguf_file.read(file).tensors for file in (one, other)]
    assert all((tensors[0][name].data == tensors[1][name].data).all() for name in tensors[0])


def test_earlier_statistics_have_not(
    calibration: mone.Calibration, demo_gguf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stats, outfile, plain = tmp_path / "stats", tmp_path / "out.gguf", tmp_path / "plain.gguf"
    replace(calibration, inputs={}).save(stats)
    options: dict[str, Any] = {"ratio": 0.5, "novice": "least-squares", "stats": stats}
    with caplog.at_level("INFO"):
        report = mone.export(demo_gguf, outfile=outfile, outtype="q4_k_m", **options)
    assert f"{stats} has nothing for an importance matrix: rounded without one" in caplog.messages
    assert report is not None and report.size == outfile.stat().st_size
    mone.export(demo_gguf, outfile=plain, outtype="q4_k_m", with_imatrix=False, **options)
    assert plain.read_bytes() == outfile.read_bytes()
    for asked in ({"outtype": "iq2_s"}, {"outtype": "q4_k_m", "imatrix": tmp_path / "imatrix.gguf"}):
        with pytest.raises(mone.MoneError, match="choose another --stats file"):
            mone.export(demo_gguf, outfile=outfile, overwrite=True, **options, **asked)
    with pytest.raises(mone.MoneError, match="without a calibration that saw"):
        chosen = plan_without_scores(calibration.spec, Recipe.of(0.0))
        mone.write(demo_gguf, None, chosen, outfile, outtype=Rounding("iq2_s", with_imatrix=True))


@pytest.mark.parametrize("model", ["checkpoint", "gguf"])
@pytest.mark.by_day(1)
def test_nothing_pruned_and_two_bits(model: str, demo_gguf: Path, text: Path, tmp_path: Path) -> None:
    """Nothing else would need the text."""
    outfile, imatrix = tmp_path / "whole.gguf", tmp_path / "imatrix.gguf"
    mone.export(
        "demo" if model == "checkpoint" else demo_gguf,
        ratio=0,
        outfile=outfile,
        outtype="iq2_s",
        imatrix=imatrix,
        files=[text],
        **ROWS,
    )
    kinds = {info.kind for info in GgufFile(outfile).header.tensors.values()}
    assert "iq2_xs" in kinds
    assert "blk.0.ffn_gate_exps.weight.in_sum2" in gguf_file.read(imatrix).tensors


def test_where_everything_fits_everything_stays(demo_gguf: Path, text: Path, tmp_path: Path) -> None:
    """A calibration for the importance matrix alone decides nothing about the experts."""
    outfile = tmp_path / "whole.gguf"
    report = mone.export(demo_gguf, fit=10**9, outtype="q4_k_m", outfile=outfile, files=[text], **ROWS)
    assert report is not None and report.size == outfile.stat().st_size
    assert "mone.expert_order" not in gguf_file.read(outfile).keys
    kinds = {info.kind for name, info in GgufFile(outfile).header.tensors.items() if "_exps" in name}
    assert kinds < {"q4_k", "q5_0", "q6_k", "q8_0", "f32", "q5_1"}


def test_no_matrix_and_a_type_that_needs_one(demo_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(mone.MoneError, match="--outtype iq2_s needs an importance matrix"):
        mone.export(demo_gguf, ratio=0.5, outtype="iq2_s", with_imatrix=False, outfile=tmp_path / "x.gguf")


def test_checkpoints_with_constants_are_told_the_way(text: Path, tmp_path: Path) -> None:
    folder, plain, outfile = tmp_path / "half", tmp_path / "half.gguf", tmp_path / "small.gguf"
    mone.export("demo", ratio=0.5, novice="least-squares", hf_out=folder, files=[text], **ROWS)
    with pytest.raises(mone.MoneError, match="leave out --imatrix and --outtype, then pass the GGUF"):
        mone.export(folder, outfile=outfile, outtype="iq2_xs", files=[text], **ROWS)
    mone.export(folder, outfile=plain)
    mone.export(plain, ratio=0, outfile=outfile, outtype="iq2_xs", files=[text], **ROWS)
    assert "iq2_xs" in {info.kind for info in GgufFile(outfile).header.tensors.values()}
    assert sum(GgufFile(outfile).spec.kept_before) == 5 * 16


def test_statistics_that_only_the_matrix_uses_are_in_the_command(
    calibration: mone.Calibration, demo_gguf: Path, tmp_path: Path
) -> None:
    stats, outfile = tmp_path / "stats", tmp_path / "whole.gguf"
    calibration.save(stats)
    mone.export(demo_gguf, ratio=0, outtype="iq2_xs", stats=stats, outfile=outfile)
    keys = gguf_file.read(outfile).keys
    assert "--stats" in str(keys["mone.options"]) and "stats" in str(keys["mone.inputs"])


@pytest.mark.parametrize(
    "spoilt",
    [
        {"squares": torch.ones(0, 4)},
        {"squares": torch.full((1, 4), float("nan"))},
        {"squares": -torch.ones(1, 4)},
        {"squares": torch.ones(1, 4, dtype=torch.bfloat16)},
        {"squares": torch.ones(4)},
        {"n_row": torch.ones(3)},
    ],
    ids=["of none", "not finite", "negative", "another type", "flat", "of others"],
)
@pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "blk.0.ffn_down_exps.weight"])
def test_inputs_that_cannot_be_are_refused(
    name: str, spoilt: dict[str, torch.Tensor], calibration: mone.Calibration, tmp_path: Path
) -> None:
    tensors = {
        key: value if value.dtype == torch.bfloat16 else value.double() for key, value in spoilt.items()
    }
    inputs = {**calibration.inputs, name: replace(calibration.inputs[name], **tensors)}
    replace(calibration, inputs=inputs).save(tmp_path / "stats")
    with pytest.raises(mone.MoneError, match=f"the inputs of {name}"):
        mone.Calibration.load(tmp_path / "stats")
