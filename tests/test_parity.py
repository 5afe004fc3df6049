"""The file in llama.cpp against the definition in PyTorch (`reference.py`), logit by logit."""

from pathlib import Path

import pytest
import torch
from llama_logits import logits
from reference import install, read_novices
from tiny import TINY, save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from mone_export.model import resolve
from mone_export.pipeline import export

pytestmark = [pytest.mark.slow, pytest.mark.upstream]

N_TOKEN = 200
LIMIT = 1e-6


def nmse_per_position(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared error over squared norm of the wanted logits, [n_token]."""
    return (found - wanted).square().sum(1) / wanted.square().sum(1)


@pytest.fixture(scope="module", params=[*TINY, "demo"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "demo":
        return resolve("demo")
    return save_tiny(request.param, tmp_path_factory.mktemp("models") / request.param)


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_logits_equal_the_definition(folder: Path, ratio: float, text: Path, tmp_path: Path) -> None:
    outfile = tmp_path / "model.gguf"
    export(str(folder), ratio=ratio, outfile=outfile, outtype="f32", files=[text], n_row=8, seq_len=128)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    novices = read_novices(outfile)
    n_expert = model.config.num_local_experts if hasattr(model.config, "num_local_experts") else 16
    assert all(len(pruned) == round(ratio * n_expert) for pruned in novices.values())
    assert novices, "nothing was pruned"
    tokens = torch.randint(3, model.config.vocab_size, (N_TOKEN,), generator=torch.Generator().manual_seed(1))
    unpruned = model(tokens[None]).logits[0].detach()
    install(model, novices)
    wanted = model(tokens[None]).logits[0].detach()
    assert nmse_per_position(unpruned, wanted).median() > 20 * LIMIT, "a forgotten novice must not pass"
    for n_batch in (N_TOKEN, 1):
        nmse = nmse_per_position(torch.from_numpy(logits(outfile, tokens.tolist(), n_batch=n_batch)), wanted)
        print(f"{folder.name} ratio {ratio} batch {n_batch}: largest NMSE {nmse.max():.1e}")
        assert nmse.max() < LIMIT
