"""An importance matrix made from text that never selects some of the experts, and what is made with it."""

import sys
from pathlib import Path

import gguf_file
import numpy as np
import pytest
from llama_logits import logits
from programs import run

from mone_export import runtime
from mone_export.pipeline import export

pytestmark = [pytest.mark.slow, pytest.mark.upstream]

TOKENS = list(range(300, 364))
# normalised mean squared error of each expert's weights; of the logits 0.01
BARS = {"q3_k_m": 0.05, "iq3_xxs": 0.1, "iq2_s": 0.2, "iq2_xs": 0.2}


@pytest.fixture(scope="module")
def novice_file(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    outfile = tmp_path_factory.mktemp("imatrix") / "novices.gguf"
    options = {"n_row": 16, "seq_len": 256, "novice": "least-squares"}
    export("demo", ratio=0.5, outfile=outfile, outtype="f32", files=[text], **options)
    return outfile


@pytest.fixture(scope="module")
def imatrix(novice_file: Path, text: Path) -> Path:
    """Made from 32 tokens, which do not select every expert."""
    outfile = novice_file.with_name("imatrix.gguf")
    options = ("-c", 32, "--chunks", 1, "-t", 1)
    run(runtime.path() / "llama-imatrix", "-m", novice_file, "-f", text, "-o", outfile, *options)
    return outfile


@pytest.fixture(scope="module")
def unused(imatrix: Path) -> dict[str, np.ndarray]:
    """For each tensor of experts, which of them the 32 tokens never selected."""
    counts = {
        name.removesuffix(".counts"): tensor.data.ravel() == 0
        for name, tensor in gguf_file.read(imatrix).tensors.items()
        if name.endswith("_exps.weight.counts")
    }
    assert counts and sum(never.sum() for never in counts.values()) > 10
    assert sum(len(never) for never in counts.values()) == 16 * len(counts), "half of 32, in the mean"
    return counts


@pytest.mark.parametrize("kind", BARS)
@pytest.mark.by_day(2)
def test_unused_experts_break_nothing(
    kind: str, novice_file: Path, imatrix: Path, unused: dict[str, np.ndarray], tmp_path: Path
) -> None:
    outfile = tmp_path / f"{kind}.gguf"
    run(runtime.path() / "llama-quantize", "--imatrix", imatrix, novice_file, outfile, kind)
    found, original = weights(outfile), weights(novice_file)
    for name, never in unused.items():
        error = np.square(found[name] - original[name]).sum(axis=(1, 2))
        error /= np.square(original[name]).sum(axis=(1, 2))
        print(f"{kind} {name} {error.min():.3f} to {error.max():.3f}")
        assert (error < BARS[kind]).all(), f"{name}: {error}, never selected: {never}"
    expected = logits(novice_file, TOKENS, n_batch=len(TOKENS))
    for n_batch in (1, len(TOKENS)):
        values = logits(outfile, TOKENS, n_batch=n_batch)
        error = np.square(values - expected).sum() / np.square(expected).sum()
        print(f"{kind}, {n_batch} at a time: NMSE of logits {error:.1e}", end="; ")
        assert error < 0.01


def weights(file: Path) -> dict[str, np.ndarray]:
    """Return the experts' weights by tensor, float32 [n_expert, n_out, n_in]."""
    contents = gguf_file.read(file)
    assert "gguf" in sys.modules
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    return {
        name: dequantize(tensor.data, GGMLQuantizationType[tensor.kind])
        for name, tensor in contents.tensors.items()
        if name.endswith("_exps.weight")
    }
