"""Quantised GGUFs of many families, pruned: bytes, and logits against the definition in plain PyTorch.

Two steps, since llama.cpp rounds what goes into a quantised product, and then routes some tokens otherwise.
The pruned file gives about what its unpruned one gives with the novices put into its graph. And the same
numbers as F32 give what the model does in transformers, experts replaced one by one (`reference.py`).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_families import NAMES, dequantised_model, save_wide
from gguf_models import TYPES, quantised
from gguf_reference import assert_pruned_copy, dequantised, keys_of
from llama_logits import logits
from reference import install, read_novices
from torch import Tensor

import mone_export as mone
from mone_export.artifacts import Corpus
from mone_export.calibration.corpus import fingerprint_rows
from mone_export.calibration.engines import load
from mone_export.calibration.eval_callback import Tap
from mone_export.calibration.llama_model import LlamaModel
from mone_export.calibration.through_llamacpp import LlamaEngine
from mone_export.llama_options import LlamaOptions
from mone_export.output.restore_check import restore_check
from mone_export.pruning.novices import novices

pytestmark = [pytest.mark.slow, pytest.mark.upstream]

TOKENS = list(range(3, 51))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By family: its checkpoint and its F32 GGUF, made when they are asked for."""
    folder = tmp_path_factory.mktemp("types")

    class Made(dict[str, tuple[Path, Path]]):
        def __missing__(self, name: str) -> tuple[Path, Path]:
            parent = folder / str(len(self))
            parent.mkdir()
            self[name] = save_wide(name, parent)
            return self[name]

    return Made()


@pytest.mark.parametrize("outtype", TYPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.by_day(6)
def test_quantised_files(name: str, outtype: str, made: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    checkpoint, whole = made[name]
    file, outfile = quantised(whole, outtype), tmp_path / "pruned.gguf"
    tokens = torch.randint(3, 128, (8, 48), generator=torch.Generator().manual_seed(0))
    corpus = Corpus(tokens, "random", fingerprint_rows(tokens), {"random": tokens.numel()})
    engine: Any = load(file, n_threads=1)
    calibration = mone.calibrate(engine, corpus)
    engine.close()
    chosen = mone.plan(mone.score(calibration), ratio=0.5, min_kept=4, allocation="even")
    mone.write(file, calibration, chosen, outfile)
    assert_pruned_copy(file, outfile)
    assert restore_check(outfile, file)[0] == sum(chosen.n_kept.values())
    arch = keys_of(file)["general.architecture"]
    assert sum(n > 0 for n in keys_of(outfile)[f"{arch}.expert_kept_count"]) == len(chosen.layers)

    pruned = {layer.layer: layer.pruned for layer in chosen.layers}
    vectors = {layer: novices(calibration.layers[layer], "least-squares") for layer in pruned}
    with LlamaEngine(file, calibration.spec) as other:
        tap = Tap(masks=other.masks(pruned, vectors), logits=True)
    predicted, found = graph_logits(file, tap), graph_logits(outfile, Tap(logits=True))
    effect = median_error(graph_logits(file, Tap(logits=True)), predicted)
    print(
        f"{name} {outtype}: NMSE of the prediction {median_error(found, predicted):.1e}, effect {effect:.1e}"
    )
    assert median_error(found, predicted) < 1e-3  # where one bit differs, llama.cpp rounds inputs otherwise
    assert median_error(found, predicted) < effect / 20, "an unpruned file must not pass"

    model = dequantised_model(checkpoint, file)
    install(model, read_novices(outfile))
    with torch.inference_mode():
        wanted = model(torch.tensor([TOKENS])).logits[0].float()
    exact = torch.from_numpy(logits(dequantised(outfile, tmp_path / "f32.gguf"), TOKENS, n_batch=len(TOKENS)))
    errors = ((exact - wanted).square().sum(-1) / wanted.square().sum(-1)).sort().values
    print(
        f"{name} {outtype}: error of the same numbers in F32, by token, largest last {errors[-3:].tolist()}"
    )
    assert errors[-2] < 1e-6 and errors[-1] < 1e-2  # a router's tie may end otherwise in one


def graph_logits(file: Path, tap: Tap) -> Tensor:
    """Return the logits of a file, with a tap on its graph, float32 [n_token, n_vocab]."""
    model = LlamaModel(file, LlamaOptions(n_threads=1))
    try:
        return model.logits(torch.tensor(TOKENS), tap, torch.ones(len(TOKENS), dtype=torch.bool))
    finally:
        model.close()


def median_error(found: Tensor, wanted: Tensor) -> float:
    """Return the median over the tokens: where the router's choice is a tie, some are routed otherwise."""
    return float(((found - wanted).square().sum(-1) / wanted.square().sum(-1)).median())
