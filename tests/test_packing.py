"""Rounding on the way: llama-quantize's bytes, with no file beside the output."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gguf_file
import numpy as np
import pytest
from programs import run

import mone_export as mone
from mone_export import runtime
from mone_export.calibration.corpus import read_corpus
from mone_export.errors import MoneError
from mone_export.output.importance import Rounding
from mone_export.output.packing import Rounded
from mone_export.output.quantizing import IMATRIX_TYPES, QUANTIZE_TYPES
from mone_export.source import ggml, open_source
from mone_export.source.gguf_types import dequantize

pytestmark = [pytest.mark.slow, pytest.mark.upstream]

OWN = {"mone.options", "mone.inputs", "quantize.imatrix.file", "quantize.imatrix.dataset"}


class Seen(NamedTuple):
    """A model, the text it has seen, and what was found on the way."""

    file: Any
    engine: Any
    corpus: mone.Corpus
    calibration: mone.Calibration


@pytest.fixture(scope="module")
def seen(text: Path, demo_gguf: Path) -> dict[str, Seen]:
    """The demo, from its checkpoint and from its GGUF."""
    found = {}
    for road, file in (("checkpoint", "demo"), ("gguf", demo_gguf)):
        engine = mone.load(file)
        corpus = read_corpus([text], open_source(file).tokenizer(), n_row=8, seq_len=128)
        found[road] = Seen(file, engine, corpus, mone.calibrate(engine, corpus))
    return found


@pytest.mark.parametrize("road", ["checkpoint", "gguf"])
@pytest.mark.parametrize("outtype", [*QUANTIZE_TYPES, *IMATRIX_TYPES])
@pytest.mark.by_day(7)
def test_the_bytes_are_those_of_llama_quantize(
    outtype: str, road: str, seen: dict[str, Seen], tmp_path: Path
) -> None:
    """Thin experts and constants in it, by an importance matrix; all tensors, and what else the file says."""
    file, engine, corpus, calibration = seen[road]
    exact, made, again, imatrix = (tmp_path / name for name in ("exact", "made", "again", "imatrix"))
    chosen, thinner = mone.plan_thin(engine, corpus, mone.score(calibration), ratio=0.5, outtype=outtype)
    rounding = Rounding(outtype, with_imatrix=True, imatrix=imatrix)
    mone.write(file, calibration, chosen, exact, novices=thinner)
    mone.write(file, calibration, chosen, made, novices=thinner, outtype=rounding)
    run(runtime.path() / "llama-quantize", "--imatrix", imatrix, exact, again, outtype)
    ours, theirs = gguf_file.read(made), gguf_file.read(again)
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in ours.tensors.items():
        assert tensor.kind == theirs.tensors[name].kind, name
        assert np.array_equal(tensor.data, theirs.tensors[name].data), name
    different = {key for key in {*ours.keys} | {*theirs.keys} if ours.keys.get(key) != theirs.keys.get(key)}
    assert different <= OWN


def test_nothing_lies_beside_the_output(seen: dict[str, Seen], tmp_path: Path) -> None:
    calibration = seen["checkpoint"].calibration
    chosen, most = mone.plan(mone.score(calibration), ratio=0.5), [0]
    outfile = tmp_path / "model.gguf"

    def look(*_: Any) -> None:
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        most.append(sum(path.stat().st_size for path in files))
        assert {path.name for path in files} <= {"model.gguf", "lock"}

    size = mone.write("demo", calibration, chosen, outfile, outtype="q4_0", progress=look)
    assert 0 < max(most) <= size


@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
def test_the_converters_own_types_need_no_build(
    outtype: str, seen: dict[str, Seen], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = seen["checkpoint"].calibration
    chosen, files = mone.plan(mone.score(calibration), ratio=0.5), []
    for there in (True, False):
        monkeypatch.setattr(ggml, "available", lambda there=there: there)
        files.append(tmp_path / f"{there}.gguf")
        mone.write("demo", calibration, chosen, files[-1], outtype=outtype)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_k", "iq4_nl"])
def test_ggml_unpacks_as_the_gguf_package_does(kind: str) -> None:
    values = np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
    packed = ggml.packed(values, kind)
    np.testing.assert_array_equal(ggml.unpacked(packed, kind), dequantize(packed, kind))


def test_rows_are_weighed_by_the_importance_of_their_own_matrix() -> None:
    """However the parts are cut, which never happens within a row."""
    random = np.random.default_rng(0)
    values = random.standard_normal((4, 6, 64)).astype(np.float32)
    importance = random.uniform(0.01, 9, (4, 64)).astype(np.float32)
    whole = np.stack([ggml.packed(*pair) for pair in zip(values, ["q4_0"] * 4, importance, strict=True)])
    raw = values.reshape(-1, 64).view(np.uint8)
    for cuts in ([], [1, 2, 9], [6, 12, 18], range(1, 24)):
        parts = (part.reshape(-1) for part in np.split(raw, cuts))
        rounded = Rounded({"x": "q4_0"}, {"x": importance}, n_thread=2)
        found = np.concatenate([each.reshape(-1) for each in rounded.packed("x", "f32", (4, 6, 64), parts)])
        assert np.array_equal(found, whole.reshape(-1))


@pytest.mark.parametrize(("value", "kind"), [(np.nan, "f32"), (np.inf, "f16"), (-1e20, "f32")])
def test_weights_that_are_not_finite_are_refused(value: float, kind: str) -> None:
    values = np.ones((2, 32), np.float32)
    values[1, 5] = value
    raw = values.astype({"f32": np.float32, "f16": np.float16}[kind]).reshape(-1).view(np.uint8)
    message = r"^x cannot be rounded to q4_0: it has weights beyond 1e\+15$"
    with pytest.raises(MoneError, match=message):
        list(Rounded({"x": "q4_0"}).packed("x", kind, (2, 32), [raw]))


@pytest.mark.parametrize("outtype", IMATRIX_TYPES)
def test_a_type_that_needs_importances_is_refused_without(
    outtype: str, seen: dict[str, Seen], tmp_path: Path
) -> None:
    less = replace(seen["checkpoint"].calibration, inputs={})
    chosen = mone.plan(mone.score(less), ratio=0.5)
    with pytest.raises(MoneError, match=f"^{outtype} needs an importance matrix: pass a calibration"):
        mone.write("demo", less, chosen, tmp_path / "model.gguf", outtype=outtype)
    assert not [*tmp_path.iterdir()]
    if outtype in ("iq2_xxs", "iq2_xs", "iq1_s"):  # ggml would end the process
        with pytest.raises(MoneError, match=f"{outtype} needs an importance matrix"):
            ggml.packed(np.ones((1, 256), np.float32), outtype)
