"""The file in llama.cpp against the definition in PyTorch (`reference.py`), logit by logit."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_logits import logits
from reference import install, read_novices, set_experts, without_experts
from tiny import TINY, save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from mone_export.artifacts import Calibration
from mone_export.pipeline import export
from mone_export.pruning.dern import recombine
from mone_export.pruning.planning import plan
from mone_export.pruning.scoring import score
from mone_export.recipe import OWN_SCORE
from mone_export.source import inspect, open_source
from mone_export.source.shape import expert_modules

pytestmark = [pytest.mark.slow, pytest.mark.upstream]

N_TOKEN = 200
LIMIT = 1e-6


def read_segments(experts: Any, e: int) -> Tensor:
    gate, up = experts.gate_up_proj[e].detach().chunk(2)
    return torch.stack([gate, up, experts.down_proj[e].detach().T], dim=1)


def nmse_per_position(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared error over squared norm of the wanted logits, [n_token]."""
    return (found - wanted).square().sum(1) / wanted.square().sum(1)


@pytest.fixture(scope="module", params=[*TINY, "demo"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "demo":
        return open_source("demo").folder
    return save_tiny(request.param, tmp_path_factory.mktemp("models") / request.param)


@pytest.mark.parametrize("ratio", [pytest.param(0.25, marks=pytest.mark.nightly), 0.5])
@pytest.mark.by_day(1)
def test_logits_equal_the_definition(folder: Path, ratio: float, text: Path, tmp_path: Path) -> None:
    outfile = tmp_path / "model.gguf"
    options: dict[str, Any] = {"files": [text], "n_row": 8, "seq_len": 128, "novice": "least-squares"}
    export(str(folder), ratio=ratio, outfile=outfile, outtype="f32", **options)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    novices = read_novices(outfile)
    n_expert = model.config.num_local_experts if hasattr(model.config, "num_local_experts") else 16
    n_pruned = len(inspect(folder).moe_layers) * round(ratio * n_expert)
    assert sum(len(pruned) for pruned in novices.values()) == n_pruned, "in all layers together"
    tokens = torch.randint(3, model.config.vocab_size, (N_TOKEN,), generator=torch.Generator().manual_seed(1))
    unpruned = model(tokens[None]).logits[0].detach()
    install(model, novices)
    wanted = model(tokens[None]).logits[0].detach()
    assert nmse_per_position(unpruned, wanted).max() > 20 * LIMIT, "a forgotten novice must not pass"
    for n_batch in (N_TOKEN, 1):
        nmse = nmse_per_position(torch.from_numpy(logits(outfile, tokens.tolist(), n_batch=n_batch)), wanted)
        print(f"{folder.name} ratio {ratio} batch {n_batch}: largest NMSE {nmse.max():.1e}")
        assert_same(nmse)


def assert_same(nmse: Tensor) -> None:
    """Assert that logits agree; in a tie of the router, rounding may send one token elsewhere."""
    assert nmse.sort().values[-2] < LIMIT and nmse.max() < 0.01, nmse


@pytest.mark.parametrize(
    ("method", "ratio"),
    [pytest.param("drop", 0.25, marks=pytest.mark.nightly), ("drop", 0.5), ("dern", 0.5)],
)
@pytest.mark.by_day(4)
def test_unpatched_llama_cpp_runs_ordinary_files(
    folder: Path, method: str, ratio: float, text: Path, tmp_path: Path, stock_libraries: Path
) -> None:
    if method == "dern" and "GptOss" in folder.name:
        pytest.skip("its experts have biases")
    outfile, stats = tmp_path / "model.gguf", tmp_path / "stats"
    options: dict[str, Any] = {"files": [text], "n_row": 8, "seq_len": 128, "stats": stats}
    export(str(folder), ratio=ratio, outfile=outfile, outtype="f32", method=method, **options)
    calibration = Calibration.load(stats)
    chosen = plan(score(calibration, OWN_SCORE[method]), ratio=ratio, method=method)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    smaller = without_experts(model, {layer.layer: layer.kept for layer in chosen.layers})
    if method == "dern":
        before, after = (dict(expert_modules(each)) for each in (model, smaller))
        for layer in chosen.layers:
            importance = calibration.layers[layer.layer].gate_sum
            read = partial(read_segments, before[layer.layer])
            set_experts(after[layer.layer], list(recombine(read, layer.kept, layer.pruned, importance)))
    tokens = torch.randint(3, model.config.vocab_size, (N_TOKEN,), generator=torch.Generator().manual_seed(1))
    unpruned, wanted = (each(tokens[None]).logits[0].detach() for each in (model, smaller))
    assert nmse_per_position(unpruned, wanted).max() > 20 * LIMIT, "a forgotten row must not pass"
    for n_batch in (N_TOKEN, 1):
        found = logits(outfile, tokens.tolist(), n_batch=n_batch, libraries=stock_libraries)
        nmse = nmse_per_position(torch.from_numpy(found), wanted)
        print(f"{folder.name} {method} {ratio} batch {n_batch}: largest NMSE {nmse.max():.1e}")
        assert_same(nmse)


@pytest.mark.nightly  # `test_run.py` does it with the demo model
@pytest.mark.parametrize("outtype", ["f32", "q8_0"])
def test_unpruned_files_give_equal_logits_patched_and_unpatched(
    folder: Path, outtype: str, tmp_path: Path, stock_libraries: Path
) -> None:
    outfile, tokens = tmp_path / "model.gguf", list(range(3, 3 + N_TOKEN))
    export(str(folder), ratio=0, outfile=outfile, outtype=outtype)
    for n_batch in (N_TOKEN, 1):
        patched = logits(outfile, tokens, n_batch=n_batch)
        stock = logits(outfile, tokens, n_batch=n_batch, libraries=stock_libraries)
        np.testing.assert_array_equal(patched, stock)
    print(f"{folder.name} {outtype}: {patched.size} logits equal, bit by bit")
