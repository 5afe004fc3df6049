"""Calibrating on an NVIDIA GPU: the CPU's statistics, without waiting for the device in between."""

import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tiny import TINY, random_model

from mone_export.artifacts import Corpus, ExpertStats
from mone_export.calibration.loading import Stream, load
from mone_export.calibration.observer import observe
from mone_export.calibration.passes import calibrate
from mone_export.deciding import plan_thin
from mone_export.pruning.planning import plan
from mone_export.pruning.scoring import score

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no NVIDIA GPU here"),
]
SUMS = [field.name for field in fields(ExpertStats) if field.name != "n_token"]


@pytest.fixture
def corpus() -> Corpus:
    tokens = torch.randint(0, 400, (8, 64), generator=torch.Generator().manual_seed(0))
    return Corpus(tokens=tokens, name="random", sha256="0")


@pytest.mark.parametrize("stream", ["off", "on"])
def test_statistics_are_those_of_the_cpu(small: Path, corpus: Corpus, stream: Stream) -> None:
    wanted = calibrate(load(small, device="cpu", dtype="float32"), corpus, model_sha256="")
    model = load(small, device="cuda", dtype="float32", stream=stream)
    found = calibrate(model, corpus, model_sha256="")
    for layer, stats in wanted.layers.items():
        for name in SUMS:
            a, b = getattr(found.layers[layer], name), getattr(stats, name)
            error = float((a - b).double().norm() / b.double().norm())
            print(f"layer {layer}, {name}: {error:.1e}")
            assert error < 1e-4, (layer, name)
    assert plan(score(found), ratio=0.5).layers == plan(score(wanted), ratio=0.5).layers


def test_thin_experts_are_those_of_the_cpu(small: Path, corpus: Corpus) -> None:
    plans = []
    for device in ("cpu", "cuda"):
        model = load(small, device=device, dtype="float32")
        scores = score(calibrate(model, corpus, model_sha256=""))
        plans.append(plan_thin(model, corpus, scores, ratio=0.5)[0].layers)
    assert plans[0] == plans[1]


@pytest.mark.parametrize("family", TINY)
def test_observing_never_waits_for_the_device(family: str) -> None:
    model = random_model(family, 100).cuda()
    tokens = torch.randint(0, 100, (2, 64), device="cuda")

    def waits() -> int:
        model(input_ids=tokens, use_cache=False)  # the first call may set things up
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                model(input_ids=tokens, use_cache=False)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)

    with torch.inference_mode():
        plain = waits()
        with observe(model):
            observed = waits()
    assert observed <= plain


def test_out_of_memory_halves_the_batch(small: Path) -> None:
    tokens = torch.randint(0, 400, (64, 512), generator=torch.Generator().manual_seed(0))
    corpus = Corpus(tokens=tokens, name="random", sha256="0")
    model = load(small, device="cuda", dtype="float32")
    wanted = calibrate(model, corpus, model_sha256="")
    peak = torch.cuda.max_memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.6 * peak / total)
    try:
        found = calibrate(model, corpus, model_sha256="")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for layer, stats in wanted.layers.items():
        assert torch.equal(found.layers[layer].count, stats.count)
        torch.testing.assert_close(found.layers[layer].out_mean, stats.out_mean, rtol=1e-4, atol=1e-5)
