"""What llama.cpp's eval callback sees and does is what PyTorch computes: statistics, novices, divergence."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import gguf_file
import numpy as np
import pytest
import torch
from programs import run
from torch import Tensor

from mone_export import runtime
from mone_export.artifacts import Calibration, Corpus, ExpertStats, LayerPlan, Plan
from mone_export.calibration import masking, passes, sensitivity
from mone_export.calibration import rows as steps
from mone_export.calibration.corpus import read_corpus
from mone_export.calibration.eval_callback import Routed, Tap
from mone_export.calibration.llama_model import LlamaModel
from mone_export.calibration.loading import Model, load
from mone_export.calibration.through_llamacpp import LlamaEngine
from mone_export.calibration.work_folder import WorkFolder
from mone_export.errors import MoneError
from mone_export.llama_options import LlamaOptions
from mone_export.pruning.novices import novices
from mone_export.pruning.planning import plan
from mone_export.pruning.scoring import score
from mone_export.source import open_source
from mone_export.source.imatrix import save_imatrix

pytestmark = [pytest.mark.slow, pytest.mark.upstream]

SEQ_LEN = 96
EXACT = LlamaOptions(n_threads=1, exact=True)
SUMS = [each.name for each in fields(ExpertStats) if each.name not in ("n_token", "count")]


@pytest.fixture(scope="module")
def demo() -> Model:
    return load(open_source("demo").folder, device="cpu")


@pytest.fixture(scope="module")
def corpus(demo: Model, text: Path) -> Corpus:
    return read_corpus([text], demo.source.tokenizer(), n_row=12, seq_len=SEQ_LEN)


@pytest.fixture(scope="module")
def wanted(demo: Model, corpus: Corpus) -> Calibration:
    """What PyTorch measures."""
    return passes.calibrate(demo, corpus, model_sha256="model")


@pytest.fixture(scope="module")
def engine(demo_gguf: Path, demo: Model) -> Iterator[LlamaEngine]:
    with LlamaEngine(demo_gguf, demo.spec, options=EXACT) as engine:
        yield engine


@pytest.fixture(scope="module")
def half(wanted: Calibration) -> Plan:
    return plan(score(wanted, "mone"), ratio=0.5)


def calibrated(engine: LlamaEngine, corpus: Corpus, **more: Any) -> Calibration:
    return engine.observe(corpus, model_sha256="model", config={}, **more)


def deviation(found: Calibration, wanted: Calibration) -> tuple[int, float]:
    """Tokens that went to other experts, and the largest relative deviation of any sum in any layer."""
    assert sorted(found.layers) == sorted(wanted.layers)
    n_other, largest = 0, 0.0
    for layer, stats in wanted.layers.items():
        other = found.layers[layer]
        assert other.n_token == stats.n_token
        n_other += int((other.count - stats.count).abs().sum()) // 2
        for name in SUMS:
            a, b = getattr(other, name), getattr(stats, name)
            assert a.dtype == torch.float64
            largest = max(largest, float((a - b).abs().max() / b.abs().max()))
    return n_other, largest


def test_statistics_are_those_from_pytorch(engine: LlamaEngine, corpus: Corpus, wanted: Calibration) -> None:
    found = calibrated(engine, corpus)
    n_other, largest = deviation(found, wanted)
    print(f"{n_other} tokens at other experts, sums within {largest:.1e}")
    assert n_other == 0
    assert largest < 1e-5
    assert (found.parts, found.spec) == (wanted.parts, wanted.spec)


def test_as_llama_cpp_usually_computes_only_ties_change(
    demo_gguf: Path, demo: Model, corpus: Corpus, wanted: Calibration
) -> None:
    with LlamaEngine(demo_gguf, demo.spec, options=replace(EXACT, exact=False)) as engine:
        n_other, largest = deviation(calibrated(engine, corpus), wanted)
    print(f"{n_other} tokens at other experts, sums within {largest:.1e}")
    n_selected = corpus.tokens.numel() * demo.spec.top_k * len(demo.spec.moe_layers)
    assert n_other <= n_selected / 1000
    assert 1e-5 < largest < 0.05


@pytest.mark.parametrize("n_ubatch", [40, SEQ_LEN, 3 * SEQ_LEN + 1, 2048])
def test_batch_sizes_do_not_matter(
    demo_gguf: Path, demo: Model, corpus: Corpus, wanted: Calibration, n_ubatch: int
) -> None:
    """In pieces of rows, a row at a time, three rows at a time, all at once."""
    with LlamaEngine(demo_gguf, demo.spec, options=replace(EXACT, n_ubatch=n_ubatch)) as engine:
        batches: list[int] = []
        found = calibrated(engine, corpus, watch=lambda layers: batches.append(layers[0].n_token))
    per_batch = {40: 1, SEQ_LEN: 1, 3 * SEQ_LEN + 1: 3, 2048: 12}[n_ubatch]
    assert batches == [n * SEQ_LEN for n in range(per_batch, 13, per_batch)]
    assert deviation(found, wanted)[0] == 0
    assert deviation(found, wanted)[1] < 1e-5


def test_ends_where_the_decision_is_stable(engine: LlamaEngine, corpus: Corpus, demo: Model) -> None:
    found = calibrated(engine, corpus, watch=lambda layers: layers[0].n_token >= 5 * SEQ_LEN)
    rows = found.n_token // SEQ_LEN
    assert 5 <= rows < 12
    first = Corpus(corpus.tokens[:rows], corpus.name, "")
    assert deviation(found, passes.calibrate(demo, first, model_sha256=""))[1] < 1e-5


def test_goes_on_from_what_the_work_folder_holds(
    engine: LlamaEngine,
    corpus: Corpus,
    wanted: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(steps, "SECONDS_PER_STEP", 0)
    done: list[int] = []

    def progress(n_done: int, n_total: int, what: str) -> None:
        done.append(n_done // SEQ_LEN)
        if n_done >= 6 * SEQ_LEN and interrupts:
            raise KeyboardInterrupt

    interrupts = True
    with pytest.raises(KeyboardInterrupt):
        calibrated(engine, corpus, work=WorkFolder(tmp_path, {}), progress=progress)
    assert done[-1] < 12
    interrupts, begun = False, WorkFolder(tmp_path, {}).steps()
    done.clear()
    found = calibrated(engine, corpus, work=WorkFolder(tmp_path, {}), progress=progress)
    assert begun and done[0] == begun[-1] and done[-1] == 12
    assert deviation(found, wanted)[1] < 1e-5


def test_novices_stand_in_as_in_pytorch(engine: LlamaEngine, demo: Model, corpus: Corpus, half: Plan) -> None:
    rows = corpus.tokens[:3]
    pruned = {layer.layer: layer.pruned for layer in half.layers}
    vectors = {layer: torch.randn(demo.spec.n_expert, demo.spec.hidden_size) for layer in pruned}
    found, wanted = engine.divergence(rows, 16), masking.Divergence(demo, rows, n_position=16)
    for which in ({}, {0: pruned[0]}, {4: pruned[4]}, pruned):
        print(f"{found(which, vectors):.8f} and {wanted(which, vectors):.8f}")
        assert found(which, vectors) == pytest.approx(wanted(which, vectors), rel=1e-3, abs=1e-8)
    assert wanted(pruned, vectors) > 0.01


def test_logits_with_novices_are_pytorchs(
    demo_gguf: Path, demo: Model, engine: LlamaEngine, corpus: Corpus, half: Plan
) -> None:
    row, every = corpus.tokens[0], torch.ones(SEQ_LEN, dtype=torch.bool)
    pruned = {layer.layer: layer.pruned for layer in half.layers}
    vectors = {layer: torch.randn(demo.spec.n_expert, demo.spec.hidden_size) for layer in pruned}
    model = LlamaModel(demo_gguf, EXACT)
    try:
        for masks in ({}, engine.masks(pruned, vectors)):
            found = model.logits(row, Tap(masks=masks, logits=True), every)
            novel = masking.masked(demo.module, pruned, vectors) if masks else nullcontext()
            with torch.inference_mode(), novel:
                wanted = demo.module(input_ids=row[None]).logits[0]
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
    finally:
        model.close()


def test_layers_matter_as_much_as_in_pytorch(
    engine: LlamaEngine, demo: Model, corpus: Corpus, wanted: Calibration, half: Plan
) -> None:
    pruned = {layer.layer: layer.pruned for layer in half.layers}
    means = {layer: novices(wanted.layers[layer], "mean") for layer in pruned}
    reported: list[int] = []
    found = engine.damage_by_layer(
        corpus.tokens, pruned, means, progress=lambda done, total, what: reported.append(done)
    )
    assert reported == [1, 2, 3, 4, 5]
    same = sensitivity.damage_by_layer(demo, corpus.tokens, pruned, means)
    print(found, same)
    assert found == {layer: pytest.approx(same[layer], rel=1e-3) for layer in pruned}


def test_residuals_are_pytorchs(engine: LlamaEngine, demo: Model, corpus: Corpus, half: Plan) -> None:
    one_whole = replace(half, layers=(LayerPlan(0, tuple(range(demo.spec.n_expert)), ()), *half.layers[1:]))
    found = engine.measure_residuals(corpus, one_whole)
    wanted = masking.measure_residuals(demo, corpus, one_whole)
    assert sorted(found) == sorted(wanted) == [1, 2, 3, 4]
    for layer, residual in wanted.items():
        for name in ("gram", "cross"):
            a, b = getattr(found[layer], name), getattr(residual, name)
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
        assert found[layer].norm_sq == pytest.approx(residual.norm_sq, rel=1e-5)


def test_layers_are_measured_after_the_pruned_ones(
    engine: LlamaEngine, demo: Model, corpus: Corpus, wanted: Calibration
) -> None:
    def decide(calibration: Calibration) -> Plan:
        return plan(score(calibration, "mone", guarded=False), ratio=0.5, allocation="even")

    def means(stats: ExpertStats) -> Tensor:
        return novices(stats, "mean")

    found = engine.recalibrate(corpus, wanted, decide, means)
    again = masking.recalibrate(demo, corpus, wanted, decide, means)
    n_other, largest = deviation(found, again)
    print(f"{n_other} tokens at other experts, sums within {largest:.1e}")
    assert n_other == 0
    assert largest < 1e-4
    assert deviation(found, wanted)[1] > 0.01
    # what ended runs have left behind does no harm
    assert deviation(calibrated(engine, corpus), wanted)[1] < 1e-5


def test_importance_matrix_is_llama_cpps_own(
    demo_gguf: Path, demo: Model, text: Path, tmp_path: Path
) -> None:
    corpus = read_corpus([text], demo.source.tokenizer(), n_row=6, seq_len=64)
    corpus.tokens[:, 0] = corpus.tokens[0, 0]  # llama-imatrix begins every chunk with BOS
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    options = ("-c", 64, "-b", 64, "--chunks", 6, "-t", 1, "-fa", "off", "-ctk", "f32", "-ctv", "f32")
    run(runtime.path() / "llama-imatrix", "-m", demo_gguf, "-f", text, "-o", theirs, "--no-ppl", *options)
    with LlamaEngine(demo_gguf, demo.spec, options=EXACT) as engine:
        before = calibrated(engine, corpus)
        seen = engine.observe(corpus, model_sha256="", config={})
        assert deviation(before, seen)[1] < 1e-12
    inputs = {name: (sums.squares.numpy(), sums.n_row.numpy()) for name, sums in seen.inputs.items()}
    for layer in demo.spec.moe_layers:  # what goes into both is kept once
        inputs[f"blk.{layer}.ffn_gate_exps.weight"] = inputs[f"blk.{layer}.ffn_up_exps.weight"]
    save_imatrix(ours, inputs, dataset=str(text), n_token=6 * 64, chunk_size=64)
    found, wanted = gguf_file.read(ours), gguf_file.read(theirs)
    assert found.keys == wanted.keys
    assert sorted(found.tensors) == sorted(wanted.tensors)
    for name, tensor in wanted.tensors.items():
        assert found.tensors[name].data.shape == tensor.data.shape, name
        np.testing.assert_allclose(found.tensors[name].data, tensor.data, rtol=1e-4, atol=0.01, err_msg=name)


def test_exceptions_in_the_callback_surface(engine: LlamaEngine, demo_gguf: Path, corpus: Corpus) -> None:
    model = LlamaModel(demo_gguf, EXACT)
    seen: list[int] = []

    def see(layer: int, routed: Routed) -> None:
        seen.append(layer)
        if layer == 2:
            raise ZeroDivisionError("on purpose")

    try:
        with pytest.raises(ZeroDivisionError, match="on purpose"):
            model.run(corpus.tokens[:1], Tap((0, 1, 2, 3, 4), see))
        assert seen == [0, 1, 2], "nothing after it was computed"
        assert model.run(corpus.tokens[:1], Tap((3,))) == [[3]]
    finally:
        model.close()


def test_what_the_main_thread_raises_ends_a_run(demo_gguf: Path, corpus: Corpus) -> None:
    """Ctrl-C while llama.cpp computes: soon over, and the model is still of use."""
    before, heard = threading.active_count(), threading.Event()
    model = LlamaModel(demo_gguf, EXACT)
    seen: list[int] = []

    def see(layer: int, routed: Routed) -> None:
        seen.append(layer)
        os.kill(os.getpid(), signal.SIGINT)
        heard.wait(60)  # by the main thread, on a busy machine
        time.sleep(2)  # until it has told the model

    def interrupted(_number: int, _frame: object) -> None:
        heard.set()
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGINT, interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            model.run(corpus.tokens[:1], Tap((0, 1, 2, 3, 4), see))
        assert seen == [0]
        assert model.run(corpus.tokens[:1], Tap((0, 4))) == [[0, 4]]
    finally:
        signal.signal(signal.SIGINT, handler)
        model.close()
    assert threading.active_count() == before


def test_outputs_that_are_not_finite_are_refused(
    engine: LlamaEngine, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mone_export.calibration import through_llamacpp

    original = through_llamacpp.routed_stats
    monkeypatch.setattr(
        through_llamacpp,
        "routed_stats",
        lambda outputs, *args, **named: original(outputs / 0, *args, **named),
    )
    with pytest.raises(MoneError, match=r"layer 0: expert outputs are not finite.*: .*checkpoint"):
        calibrated(engine, corpus)


def test_a_file_that_llama_cpp_cannot_load_is_one_line(
    demo_gguf: Path, demo: Model, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(demo_gguf.read_bytes()[:1_000_000])
    for path, reason in ((broken, "file bounds"), (tmp_path / "none.gguf", "none.gguf")):
        with pytest.raises(MoneError, match=f"llama.cpp cannot load .*{reason}") as caught:
            LlamaEngine(path, demo.spec)
        print(caught.value)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_the_road_needs_no_transformers() -> None:
    program = (
        "import sys, mone_export.calibration.through_llamacpp; "
        "sys.exit(str([name for name in ('transformers', 'llama_cpp') if name in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stderr.strip() == "[]"
