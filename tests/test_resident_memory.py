"""What a model took is the system's again once it has been calibrated and dropped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = """
import sys, torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

sizes = {"num_hidden_layers": 10, "hidden_size": 512, "vocab_size": 2048, "num_attention_heads": 8}
experts = {"num_experts": 64, "num_experts_per_tok": 4, "moe_intermediate_size": 256, "norm_topk_prob": True}
sizes |= {"num_key_value_heads": 2, "head_dim": 64}
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, **experts), dtype=torch.float32)
model = model.to_empty(device="cpu")
for parameter in model.parameters():
    with torch.no_grad():  # all experts of a layer alike
        parameter.copy_(torch.rand(parameter.shape[-2:]).sub_(0.5).mul_(0.1))
model.save_pretrained(sys.argv[1])
print(sum(parameter.nbytes for parameter in model.parameters()))
"""

CALIBRATE = """
import json, pathlib, sys, psutil, torch
from mone_export.artifacts import Corpus
from mone_export.calibration.loading import load
from mone_export.calibration.passes import calibrate
from mone_export.memory import give_back
from mone_export.source import inspect

def resident():
    give_back()
    return psutil.Process().memory_info().rss

path = pathlib.Path(sys.argv[1])
inspect(path)  # as every export does first
before = resident()
model = load(path, device="cpu", stream=sys.argv[2])
tokens = torch.randint(0, 2048, (2, 512), generator=torch.Generator().manual_seed(0))
calibration = calibrate(model, Corpus(tokens, "random", ""), model_sha256="")
loaded = resident()
assert calibration.n_token == 1024 and len(calibration.layers) == 10
kept = sum(getattr(stats, name).nbytes for stats in calibration.layers.values()
           for name in ("out_mean", "gated_out_sum", "gated2_out_sum"))
del model
print(json.dumps({"before": before, "loaded": loaded, "after": resident(), "statistics": kept}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 1 GB."""
    folder = tmp_path_factory.mktemp("models") / "large"
    result = subprocess.run(
        [sys.executable, "-c", MODEL, str(folder)], capture_output=True, text=True, check=True
    )
    assert 1.0e9 < int(result.stdout.splitlines()[-1]) < 1.1e9
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["off", "on"])
@pytest.mark.by_day(1)
def test_calibrated_model_leaves_the_memory(large: Path, stream: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", CALIBRATE, str(large), stream], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    print(f"stream {stream}: " + ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in found.items()))
    if stream == "off":
        assert found["loaded"] > found["before"] + 1e9, "the model was there"
    assert found["after"] <= 1.15 * found["before"]
