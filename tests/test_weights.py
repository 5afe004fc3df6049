"""Which files are the model: one answer, whoever asks; what lies beside them is named and left out."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf_file
import pytest
import torch
from safetensors.torch import load_file, save_file

from mone_export.artifacts import Calibration, Corpus
from mone_export.calibration.loading import load
from mone_export.calibration.passes import calibrate
from mone_export.errors import MoneError
from mone_export.output.writing import write
from mone_export.pruning.planning import plan
from mone_export.pruning.scoring import score
from mone_export.source import open_source
from mone_export.source.hub import INDEX, SINGLE
from mone_export.source.weights import fingerprint, left_out, weight_files

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def sharded(small: Path, folder: Path) -> Path:
    """The same model in two files and an index."""
    shutil.copytree(small, folder)
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    parts = {SHARDS[0]: names[::2], SHARDS[1]: names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
    (folder / SINGLE).unlink()
    placed = {name: file for file, own in parts.items() for name in own}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


def other_weights(small: Path, file: Path) -> None:
    save_file({name: tensor + 1 for name, tensor in load_file(small / SINGLE).items()}, file)


def older_shard(small: Path, folder: Path) -> None:
    other_weights(small, folder / "model-00003-of-00003.safetensors")


def whole_beside_shards(small: Path, folder: Path) -> None:
    other_weights(small, folder / SINGLE)


def block_outside_the_index(small: Path, folder: Path) -> None:
    save_file({"model.layers.3.input_layernorm.weight": torch.ones(64)}, folder / "mtp.safetensors")


def resource_fork(small: Path, folder: Path) -> None:
    (folder / "._model.safetensors").write_bytes(b"\0\5\x16\7")


def own_statistics(small: Path, folder: Path) -> None:
    calibrated(folder).save(folder / "statistics.safetensors")


def calibrated(folder: Path) -> Calibration:
    tokens = torch.randint(0, 400, (2, 32), generator=torch.Generator().manual_seed(0))
    model = load(folder, device="cpu", dtype="float32")
    return calibrate(model, Corpus(tokens, "random", "0"), model_sha256="")


STRAYS: list[Callable[[Path, Path], None]] = [
    older_shard,
    whole_beside_shards,
    block_outside_the_index,
    resource_fork,
    own_statistics,
]


@pytest.mark.parametrize("add", STRAYS)
def test_what_lies_beside_the_model_changes_nothing_and_is_named(
    add: Callable[[Path, Path], None], small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same fingerprint, statistics and file as of the clean folder."""
    clean, crowded = sharded(small, tmp_path / "clean"), sharded(small, tmp_path / "crowded")
    add(small, crowded)
    (stray,) = left_out(crowded)
    assert fingerprint(crowded) == fingerprint(clean) == fingerprint(small)
    with caplog.at_level(logging.WARNING):
        found, wanted = calibrated(crowded), calibrated(clean)
    assert stray in caplog.text
    for layer, stats in wanted.layers.items():
        assert torch.equal(found.layers[layer].out_mean, stats.out_mean)
    for folder in (clean, crowded):
        chosen = plan(score(wanted), ratio=0.5, allocation="even")
        write(folder, wanted, chosen, tmp_path / f"{folder.name}.gguf", outtype="f32")
    ours, theirs = (gguf_file.read(tmp_path / f"{name}.gguf") for name in ("crowded", "clean"))
    assert list(ours.tensors) == list(theirs.tensors)
    for name, tensor in theirs.tensors.items():
        assert ours.tensors[name].data.tobytes() == tensor.data.tobytes(), name


def test_files_of_the_index_are_the_model(small: Path, tmp_path: Path) -> None:
    folder = sharded(small, tmp_path / "model")
    assert [file.name for file in weight_files(folder)] == list(SHARDS)
    assert [file.name for file in weight_files(small)] == [SINGLE]
    assert open_source(folder).view == folder, "a clean folder is used as it is"


def test_an_index_of_files_that_are_gone_is_refused_with_the_remedy(small: Path, tmp_path: Path) -> None:
    folder = sharded(small, tmp_path / "model")
    for name in SHARDS:
        (folder / name).unlink()
    shutil.copy(small / SINGLE, folder / SINGLE)
    with pytest.raises(MoneError, match=f"lacks 2 of the 2 .*or remove {INDEX} if {SINGLE} is the whole"):
        weight_files(folder)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../x.safetensors"}}']
)
def test_a_broken_index_is_one_line(content: str, small: Path, tmp_path: Path) -> None:
    folder = sharded(small, tmp_path / "model")
    (folder / INDEX).write_text(content)
    with pytest.raises(MoneError) as error:
        weight_files(folder)
    assert INDEX in str(error.value) and "\n" not in str(error.value)


def test_a_fingerprint_is_computed_once_for_the_same_files(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MONE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    shutil.copytree(small, folder)
    steps: list[int] = []
    first = fingerprint(folder, progress=lambda done, *_: steps.append(done))
    n_read = len(steps)
    assert n_read and fingerprint(folder, progress=lambda done, *_: steps.append(done)) == first
    assert len(steps) == n_read, "nothing was read again"
    other_weights(folder, folder / "new")
    (folder / "new").replace(folder / SINGLE)
    assert fingerprint(folder) != first


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MONE_CACHE", str(tmp_path / "file" / "cache"))
    assert len(fingerprint(small)) == 64
