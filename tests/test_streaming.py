"""Layers that come one at a time give the sums of the whole model, and what is stopped goes on."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from mone_export.artifacts import Calibration, Corpus, ExpertStats
from mone_export.calibration import passes, rows
from mone_export.calibration.loading import Model, Stream, choose, load
from mone_export.calibration.masking import measure_residuals
from mone_export.calibration.passes import calibrate
from mone_export.calibration.sensitivity import damage_by_layer
from mone_export.calibration.work_folder import WorkFolder
from mone_export.errors import MoneError
from mone_export.pruning.planning import plan
from mone_export.pruning.scoring import score
from mone_export.source import open_source

pytestmark = pytest.mark.slow  # a whole command each

N_ROW, SEQ_LEN, N_VOCAB = 6, 32, 400
SUMS = [field.name for field in fields(ExpertStats)]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    tokens = torch.randint(0, N_VOCAB, (N_ROW, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    return Corpus(tokens=tokens, name="random", sha256="0")


@pytest.fixture
def two_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "TOKENS_PER_BATCH", 2 * SEQ_LEN)


def loaded(folder: Path, stream: Stream) -> Model:
    return load(folder, device="cpu", dtype="float32", stream=stream)


def assert_same(found: Calibration, wanted: Calibration) -> None:
    assert found.layers.keys() == wanted.layers.keys()
    for layer, stats in wanted.layers.items():
        for name in SUMS:
            a, b = getattr(found.layers[layer], name), getattr(stats, name)
            assert a == b if isinstance(b, int) else torch.equal(a, b), (layer, name)


@pytest.fixture
def whole(small: Path, corpus: Corpus, two_rows: None) -> Calibration:
    return calibrate(loaded(small, "off"), corpus, model_sha256="")


def test_streamed_layers_give_the_same_sums(small: Path, corpus: Corpus, whole: Calibration) -> None:
    assert_same(calibrate(loaded(small, "on"), corpus, model_sha256=""), whole)


def test_at_most_two_layers_are_in_memory(
    small: Path, monkeypatch: pytest.MonkeyPatch, corpus: Corpus
) -> None:
    model, seen = loaded(small, "on"), []
    original = passes.forward

    def forward(*args: Any) -> None:
        original(*args)
        assert model.files
        seen.append({n for n, layer in enumerate(model.files.layers) if not is_blank(layer)})

    monkeypatch.setattr(passes, "forward", forward)
    calibrate(model, corpus, model_sha256="")
    assert len(seen) == len(model.files.layers) if model.files else False
    for number, present in enumerate(seen):
        assert {number} <= present <= {number, number + 1}
    assert all(is_blank(layer) for layer in model.files.layers)


def test_a_second_pass_streams_too(small: Path, corpus: Corpus, whole: Calibration) -> None:
    chosen = plan(score(whole), ratio=0.5)
    wanted = measure_residuals(loaded(small, "off"), corpus, chosen)
    found = measure_residuals(loaded(small, "on"), corpus, chosen)
    assert found.keys() == wanted.keys() == set(whole.spec.moe_layers)
    for layer, residual in wanted.items():
        assert torch.equal(found[layer].gram, residual.gram)
        assert torch.equal(found[layer].cross, residual.cross)


def is_blank(layer: torch.nn.Module) -> bool:
    return all(tensor.is_meta for tensor in layer.state_dict().values())


def test_hidden_states_beyond_the_memory_go_to_disk(
    small: Path, corpus: Corpus, whole: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    save = torch.save
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(torch, "save", lambda tree, file: (written.append(file), save(tree, file)))
    assert_same(calibrate(loaded(small, "on"), corpus, model_sha256="", memory=1024), whole)
    assert len(written) == N_ROW * len(whole.spec.moe_layers)
    assert not list(tmp_path.iterdir())


def test_streams_when_the_weights_do_not_fit(small: Path) -> None:
    source, size = open_source(small), (small / "model.safetensors").stat().st_size
    options: dict[str, Any] = {"device": "cpu", "dtype": "auto", "stream": "auto"}
    assert choose(source, memory=3 * size, **options) == (torch.float32, False)
    assert choose(source, memory=size, **options) == (torch.float32, True)
    assert choose(source, memory=size, **options | {"stream": "off"}) == (torch.float32, False)
    half = options | {"dtype": "bfloat16"}
    assert choose(source, memory=size, **half) == (torch.bfloat16, False)


def test_a_checkpoint_that_lacks_a_tensor_is_refused(small: Path, tmp_path: Path, corpus: Corpus) -> None:
    from safetensors.torch import load_file, save_file

    for file in small.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(small / "model.safetensors")
    name = next(name for name in tensors if "layers.1" in name and "q_proj" in name)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MoneError, match=r"lacks model.layers.1.self_attn.q_proj.weight: get all files"):
        calibrate(loaded(tmp_path, "on"), corpus, model_sha256="")


@pytest.mark.parametrize("stream", ["on", "off"])
def test_out_of_memory_halves_the_batches(
    stream: Stream, small: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory suffices for one row at a time, and fails late: what the layers before have added must go."""
    monkeypatch.setattr(passes, "TOKENS_PER_BATCH", SEQ_LEN)
    wanted = calibrate(loaded(small, "off"), corpus, model_sha256="")
    monkeypatch.setattr(passes, "TOKENS_PER_BATCH", 4 * SEQ_LEN)
    model, failures = loaded(small, stream), []

    def scarce(_module: Any, args: Any, output: Any) -> None:
        if len(args[0]) > 1:
            failures.append(len(args[0]))
            raise torch.OutOfMemoryError("fake")

    layers = model.files.layers if model.files else model.module.base_model.layers
    layers[1].mlp.register_forward_hook(scarce)
    assert_same_but_for_rounding(calibrate(model, corpus, model_sha256=""), wanted)
    assert failures == [4, 2]


@pytest.mark.parametrize("stream", ["on", "off"])
def test_the_probe_halves_its_batches_when_memory_runs_out(stream: Stream, small: Path) -> None:
    """Memory suffices for two rows at a time, and fails late in the model."""
    tokens = torch.randint(0, 400, (8, 128), generator=torch.Generator().manual_seed(0))
    model = load(small, device="cpu", dtype="float32", stream=stream)
    pruned = {layer: (0, 1, 2) for layer in model.spec.moe_layers}
    vectors = {layer: torch.ones(16, 64) for layer in pruned}
    wanted = damage_by_layer(load(small, device="cpu", dtype="float32"), tokens, pruned, vectors)
    failures = []

    def scarce(_module: Any, args: Any, output: Any) -> None:
        if len(args[0]) > 2:
            failures.append(len(args[0]))
            raise torch.OutOfMemoryError("fake")

    layers = model.files.layers if model.files else model.module.base_model.layers
    layers[1].mlp.register_forward_hook(scarce)
    found = damage_by_layer(model, tokens, pruned, vectors)
    assert failures == [8, 4]
    for layer, damage in wanted.items():
        assert found[layer] == pytest.approx(damage, rel=1e-4)


def assert_same_but_for_rounding(found: Calibration, wanted: Calibration) -> None:
    """Matrix products of another height differ in their last bits."""
    for layer, stats in wanted.layers.items():
        assert torch.equal(found.layers[layer].count, stats.count)
        for name in SUMS[2:]:
            a, b = getattr(found.layers[layer], name), getattr(stats, name)
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_one_row_beyond_the_memory_is_a_moneerror(small: Path, corpus: Corpus) -> None:
    model = loaded(small, "off")

    def scarce(*_: Any) -> None:
        raise torch.OutOfMemoryError("fake")

    model.module.base_model.layers[0].register_forward_hook(scarce)
    with pytest.raises(MoneError, match="one row of 32 tokens does not fit"):
        calibrate(model, corpus, model_sha256="")


class Stop(Exception):
    """Stands in for the end of a process."""


@pytest.mark.parametrize("stream", ["on", "off"])
@pytest.mark.parametrize("n_forward", [1, 2, 5, 8])
@pytest.mark.by_day(4)
def test_a_stopped_calibration_goes_on(
    stream: Stream,
    n_forward: int,
    small: Path,
    corpus: Corpus,
    whole: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped after so many passes; the second run repeats what was not finished, and no more."""
    monkeypatch.setattr(rows, "SECONDS_PER_STEP", 0)
    original, calls = passes.forward, []

    def forward(*args: Any) -> None:
        if len(calls) == n_forward:
            raise Stop
        calls.append(args[2])
        original(*args)

    def run() -> Calibration:
        return calibrate(loaded(small, stream), corpus, model_sha256="", work=WorkFolder(tmp_path, {}))

    n_batch, n_layer = N_ROW // 2, len(whole.spec.moe_layers)
    total = n_batch * (n_layer if stream == "on" else 1)
    monkeypatch.setattr(passes, "forward", forward)
    if n_forward < total:
        with pytest.raises(Stop):
            run()
    else:
        run()
    first, n_forward = len(calls), 1000
    assert_same(run(), whole)
    finished = first // n_batch * n_batch if stream == "on" else first
    assert len(calls) - first == total - finished


def test_another_job_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    job = {"model": "a" * 64, "text": "b" * 64, "--dtype": "float32"}
    WorkFolder(tmp_path, job)
    WorkFolder(tmp_path, job)
    for what, value in (("model", "c" * 64), ("text", "c" * 64), ("--dtype", "bfloat16")):
        with pytest.raises(MoneError, match=f"begun with {what} {job[what]}, now it is {value}"):
            WorkFolder(tmp_path, job | {what: value})


def test_too_little_disk_is_said_before(tmp_path: Path) -> None:
    with pytest.raises(MoneError, match="needs 1000000 TB"):
        WorkFolder(tmp_path, {}).reserve(10**18)
