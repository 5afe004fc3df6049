"""Every architecture of llama.cpp with routed experts, as a tiny GGUF: what is predicted is what is written.

The unpruned file with novices put into llama.cpp's graph by its eval callback is the prediction; the pruned
file must give the same logits. `--archs-json=FILE` keeps the measurements; `tools/pages/families_table.py`
puts them into docs/families.md.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import ARCHS, KNOWN_AS, TYPES, VARIANTS, quantised, tiny_gguf
from gguf_reference import assert_pruned_copy
from torch import Tensor

import mone_export as mone
from mone_export.artifacts import Corpus
from mone_export.calibration.corpus import fingerprint_rows
from mone_export.calibration.engines import load
from mone_export.calibration.eval_callback import Tap
from mone_export.calibration.llama_model import LlamaModel
from mone_export.errors import MoneError
from mone_export.llama_options import LlamaOptions
from mone_export.output.restore_check import restore_check
from mone_export.pruning.novices import novices

pytestmark = [pytest.mark.slow, pytest.mark.upstream]

NAMES = (*ARCHS, *VARIANTS)
# what llama.cpp does not run, or runs without its experts
REFUSED = {"refact": "only [] could be observed"}
# llama-quantize rounds a factor of these, and then llama.cpp aborts, pruned or not: "unsupported types"
ABORTS = ("qwen4exp",)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("architectures")


@pytest.fixture(scope="module")
def record(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """What was found, by name; kept where `--archs-json` says."""
    found: dict[str, Any] = {}
    yield found
    if target := request.config.getoption("--archs-json"):
        known = {arch: name for name, arch in KNOWN_AS.items()}
        rows = [
            {"name": name, "known_as": known.get(name, ""), **found[name]} for name in NAMES if name in found
        ]
        Path(target).write_text(json.dumps({"kind": "archs", "rows": rows}, indent=1) + "\n")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.by_day(20)
def test_logits_are_as_predicted(name: str, folder: Path, tmp_path: Path, record: dict[str, Any]) -> None:
    file, outfile = tiny_gguf(name, folder), tmp_path / "pruned.gguf"
    if name in REFUSED:
        with pytest.raises(MoneError) as refused:
            prune(file, outfile)
        assert REFUSED[name] in str(refused.value)
        record[name] = {"refused": str(refused.value)}
        return
    error, effect, n_layer = prune(file, outfile)
    record[name] = {"nmse": float(error.mean()), "effect": float(effect.mean()), "layers": n_layer}
    print(f"{name}: NMSE {error.mean():.1e}, without novices {effect.mean():.1e}")
    assert error.median() < 1e-10 and error.mean() < 1e-8, "one token may be close to a tie"
    assert effect.mean() > 1e-3, "a file that is not pruned must not pass"


@pytest.mark.parametrize("outtype", TYPES)
@pytest.mark.parametrize("name", [name for name in KNOWN_AS.values() if name not in ABORTS])
@pytest.mark.by_day(6)
def test_quantised_files_without_a_checkpoints_road(
    name: str, outtype: str, folder: Path, tmp_path: Path
) -> None:
    error, effect, _ = prune(quantised(tiny_gguf(name, folder), outtype), tmp_path / "pruned.gguf")
    print(f"{name} {outtype}: median {error.median():.1e}, without novices {effect.median():.1e}")
    assert error.median() < 1e-9, "except for tokens whose experts are a tie"
    assert effect.median() > 1e-3


def prune(file: Path, outfile: Path) -> tuple[Tensor, Tensor, int]:
    """Prune half of a file; return each token's error and what the novices do to it, and the layers."""
    source = mone.open_source(file)
    n_vocab, _ = source.limits
    assert n_vocab is not None
    tokens = torch.randint(0, n_vocab, (6, 48), generator=torch.Generator().manual_seed(0))
    corpus = Corpus(tokens, "random", fingerprint_rows(tokens), {"random": tokens.numel()})
    engine: Any = load(file, n_threads=1)
    calibration = mone.calibrate(engine, corpus)
    # groups are so small here that by default all experts would stay
    chosen = mone.plan(mone.score(calibration), ratio=0.5, min_kept=4, allocation="even")
    mone.write(source, calibration, chosen, outfile)
    assert_pruned_copy(file, outfile)
    pruned = {layer.layer: layer.pruned for layer in chosen.layers}
    assert restore_check(outfile, file) == (sum(chosen.n_kept.values()), len(pruned))
    vectors = {layer: novices(calibration.layers[layer], "least-squares") for layer in pruned}
    predicted = logits(file, tokens[:2], Tap(masks=engine.masks(pruned, vectors), logits=True))
    engine.close()
    whole, found = (logits(path, tokens[:2], Tap(logits=True)) for path in (file, outfile))
    return errors(found, predicted), errors(whole, predicted), len(pruned)


def logits(file: Path, rows: Tensor, tap: Tap) -> Tensor:
    model = LlamaModel(file, LlamaOptions(n_threads=1))
    try:
        every = torch.ones(rows.shape[1], dtype=torch.bool)
        return torch.cat([model.logits(row, tap, every) for row in rows])
    finally:
        model.close()


def errors(found: Tensor, wanted: Tensor) -> Tensor:
    """Return each token's squared error relative to its logits."""
    return (found - wanted).square().sum(-1) / wanted.square().sum(-1)
