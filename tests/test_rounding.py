"""Rounding errors are ggml's own, on the model's weights."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

from mone_export.calibration.loading import load
from mone_export.output.rounding import rounding_errors
from mone_export.pipeline import export
from mone_export.source import open_source

pytestmark = pytest.mark.upstream


def test_fewer_bits_round_more() -> None:
    errors = rounding_errors(open_source("demo"), ["f16", "q8_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k"])
    values = list(errors[name] for name in ("f16", "q8_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k"))
    assert values[0] == 0 and values == sorted(values) and len(set(values)) == len(values)
    assert 1e-6 < errors["q8_0"] < 1e-4 and 1e-3 < errors["q4_k"] < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("outtype", ["q8_0", "q4_0", "q6_k"])
def test_the_sample_stands_for_the_file(outtype: str, text: Path, tmp_path: Path) -> None:
    for name in ("auto", outtype):
        file = tmp_path / f"{name}.gguf"
        export("demo", ratio=0, outfile=file, outtype=name, files=[text], n_row=2, seq_len=64)
    tensors = {item.name: item for item in GGUFReader(tmp_path / f"{outtype}.gguf").tensors}
    total, lost = 0.0, 0.0
    for item in GGUFReader(tmp_path / "auto.gguf").tensors:
        rounded = tensors[item.name]
        if rounded.tensor_type.name == outtype.upper():
            before = dequantize(item.data, item.tensor_type)
            total += float(np.square(before).sum())
            lost += float(np.square(dequantize(rounded.data, rounded.tensor_type) - before).sum())
    assert lost / total == pytest.approx(rounding_errors(open_source("demo"), [outtype])[outtype], rel=0.1)


def test_a_model_of_narrow_matrices_has_a_sample(small: Path) -> None:
    assert load(small, device="cpu").spec.hidden_size < 256
    assert 1e-6 < rounding_errors(open_source(small), ["q8_0"])["q8_0"] < 1e-4
