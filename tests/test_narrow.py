"""Ordinary files of narrower experts: the choice, the fit, the file in llama.cpp against PyTorch."""

import json
import re
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from families import ROWS, Row
from family_models import calibrated, random_tokens, save_family, without_vocabulary
from gguf import GGUFReader
from gguf_families import save_wide
from gguf_models import quantised
from gguf_parts import taken_apart
from llama_logits import logits
from reference import set_narrow, without_experts
from torch import Tensor
from transformers import AutoModelForCausalLM

import mone_export as mone
from mone_export.artifacts import Calibration, ChannelStats, Corpus, LayerPlan, MoeSpec, Scores
from mone_export.calibration.engines import InTorch
from mone_export.calibration.loading import Model
from mone_export.calibration.sums import expert_stats
from mone_export.deciding import plan_thin
from mone_export.errors import MoneError
from mone_export.evaluation.slots import fates_by_slot
from mone_export.inspection.inspecting import examine
from mone_export.output.redoing import redo
from mone_export.output.writing import measure, write
from mone_export.pipeline import export
from mone_export.pruning.fates import plan_narrow
from mone_export.pruning.planning import plan
from mone_export.pruning.scoring import score
from mone_export.pruning.thinning import narrow_widths, thin
from mone_export.recipe import Recipe
from mone_export.request import Request, not_narrow, prepare
from mone_export.source import GgufFile, llamacpp, open_source
from mone_export.source.gguf_header import read_header
from mone_export.source.shape import expert_modules

N_TOKEN = 100
# renormalised or not, biases, a shared expert of its own width, fused gate and up
FAMILIES = (
    "OlmoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "MixtralForCausalLM",
    "GptOssForCausalLM",
)
TIED = ("JambaForCausalLM",)  # dense layers go by the experts' width


def rows(*classes: str) -> list[Row]:
    """The plain row of each family."""
    return [next(row for row in ROWS if row.hf_class == each and not row.packed) for each in classes]


def nmse(found: Any, wanted: Any) -> float:
    return float(np.square(found - wanted).sum() / np.square(wanted).sum())


def scores_of(n_expert: int, size: int) -> Scores:
    """Two layers of experts that were all seen as often."""
    spec = MoeSpec("Any", 2, (0, 1), n_expert, 2, 1, 8, size)
    ids = torch.arange(n_expert).repeat_interleave(1000)
    stats = expert_stats(
        torch.ones(len(ids), 8), torch.ones(len(ids)), torch.bincount(ids), n_token=len(ids) // 2
    )
    calibration = Calibration(spec, "", "", "", stats.n_token, {0: stats, 1: stats})
    return Scores(spec, "error", torch.zeros(2, n_expert, dtype=torch.float64), calibration)


def chosen_width(errors: dict[int, np.ndarray], scores: Scores) -> Any:
    recipe = Recipe.of(0.5, method="narrow")
    return plan_narrow(scores, errors, (0, 8, 16, 32), recipe)


def test_dead_experts_go_and_the_others_become_narrow() -> None:
    """Of 8 experts half give nothing: 4 whole ones cost no error, and no width is better."""
    scores = scores_of(8, 32)
    useful = np.array([[100.0, 50.0, 20.0, 0.0]] * 4 + [[0.0] * 4] * 4)
    found = chosen_width({0: useful, 1: useful[::-1]}, scores)
    assert found.width == 0
    assert [layer.kept for layer in found.layers] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    alike = np.array([[100.0, 50.0, 2.0, 0.0]] * 8)
    found = chosen_width({0: alike, 1: alike}, scores)
    assert found.width == 16
    assert [layer.kept for layer in found.layers] == [tuple(range(8))] * 2
    assert found.share_pruned == 0.5


def test_what_a_narrow_expert_saves_decides_not_what_it_gives() -> None:
    """7 of 8 are paid for at width 18: the one whose channels save least goes, here the largest."""
    scores = scores_of(8, 32)
    errors = np.array([[100.0, 1.0, 0.0]] * 7 + [[101.0, 100.5, 0.0]])
    recipe = Recipe.of(0.5, method="narrow")
    found = plan_narrow(scores, {0: errors, 1: errors}, (0, 18, 32), recipe)
    assert found.width == 18
    assert all(layer.pruned == (7,) for layer in found.layers)
    scores.values[:, 7] = torch.inf  # guarded
    found = plan_narrow(scores, {0: errors, 1: errors}, (0, 18, 32), recipe)
    assert all(7 in layer.kept for layer in found.layers)


@pytest.fixture
def token_ids_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "converter_class", without_vocabulary(llamacpp.converter_class))


@pytest.mark.slow
@pytest.mark.upstream
@pytest.mark.usefixtures("token_ids_only")
@pytest.mark.parametrize("road", ["checkpoint", "gguf"])
@pytest.mark.parametrize("row", rows(*FAMILIES), ids=lambda row: row.name)
@pytest.mark.by_day(4)
def test_logits_equal_the_definition(row: Row, road: str, tmp_path: Path, stock_libraries: Path) -> None:
    """In llama.cpp without the patches; every expert has its own rows."""
    folder = save_family(row, tmp_path / "model")
    source = open_source(folder)
    module, calibration = calibrated(folder, source.spec)
    corpus, scores = Corpus(random_tokens(16, 64), "random", ""), score(calibration)
    engine = InTorch(Model(source=source, module=module))
    chosen, thinner = plan_thin(engine, corpus, scores, ratio=0.4, outtype="f32", method="narrow")
    assert 0 < chosen.width < source.spec.expert_size
    whole, outfile = tmp_path / "whole.gguf", tmp_path / "narrow.gguf"
    write(source, calibration, plan(scores, ratio=0), whole, outtype="f32")
    origin = source if road == "checkpoint" else whole
    write(origin, calibration, chosen, outfile, novices=thinner, outtype="f32")
    reader, before = GGUFReader(outfile), {each.name: each for each in GGUFReader(whole).tensors}
    assert {each.name for each in reader.tensors} == before.keys()
    assert not [key for key in reader.fields if "expert_kept" in key or "tier" in key]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kept = {layer.layer: layer.kept for layer in chosen.layers}
    smaller, stored = without_experts(model, kept), {each.name: each for each in reader.tensors}
    for number, experts in expert_modules(smaller):
        channels = [thinner.channels(number, expert, chosen.width) for expert in kept[number]]
        same_rows(stored, before, number, kept[number], channels)
        down = torch.from_numpy(stored[f"blk.{number}.ffn_down_exps.weight"].data.copy())
        set_narrow(experts, down, channels)
    tokens = random_tokens(1, N_TOKEN)[0]
    own, wanted = (each(tokens[None]).logits[0].detach().numpy() for each in (model, smaller))
    assert nmse(wanted, own) > 1e-5, "narrow experts must be visible for this test to mean much"
    for n_batch in (N_TOKEN, 1):
        found = logits(outfile, tokens.tolist(), n_batch=n_batch, libraries=stock_libraries)
        assert nmse(found, wanted) < 1e-6


def same_rows(
    stored: dict[str, Any], before: dict[str, Any], layer: int, kept: Any, channels: list[Tensor]
) -> None:
    """Gate and up of an expert are its own rows of its channels, bit for bit, and so are their biases."""
    for part in ("gate", "up"):
        for kind in ("weight", "bias"):
            name = f"blk.{layer}.ffn_{part}_exps.{kind}"
            for slot, expert in enumerate(kept if name in before else ()):
                own = before[name].data[expert][channels[slot].numpy()]
                np.testing.assert_array_equal(stored[name].data[slot], own)


@pytest.mark.slow
@pytest.mark.upstream
@pytest.mark.families
@pytest.mark.usefixtures("token_ids_only")
@pytest.mark.parametrize("row", [row for row in ROWS if row.refused is None], ids=lambda row: row.name)
@pytest.mark.by_day(12)
def test_every_family_that_is_not_refused_loads_and_runs(
    row: Row, tmp_path: Path, stock_libraries: Path
) -> None:
    """With all experts, half as wide: what `not_narrow` lets through, llama.cpp's graph takes."""
    folder = save_family(row, tmp_path / "model")
    source = open_source(folder)
    if row.packed or (reason := not_narrow(source, Recipe.of(0.5, method="drop"), "f32")):
        pytest.skip("its weights are packed" if row.packed else reason)
    module, calibration = calibrated(folder, source.spec)
    corpus, scores = Corpus(random_tokens(16, 64), "random", ""), score(calibration)
    engine = InTorch(Model(source=source, module=module))
    chosen, thinner = plan_thin(engine, corpus, scores, ratio=0.4, outtype="f32", method="narrow")
    every = tuple(range(source.spec.n_expert))
    layers = tuple(LayerPlan(layer, every, ()) for layer in source.spec.moe_layers)
    chosen = replace(chosen, layers=layers, width=source.spec.expert_size // 2)
    whole, outfile = tmp_path / "whole.gguf", tmp_path / "narrow.gguf"
    write(source, calibration, plan(scores, ratio=0), whole, outtype="f32")
    write(source, calibration, chosen, outfile, novices=thinner, outtype="f32")
    stored = {each.name: each for each in GGUFReader(outfile).tensors}
    texts = random_tokens(15, 20) if row.limit >= 1e-3 else random_tokens(1, N_TOKEN)
    if row.as_llama_cpp:
        row.as_llama_cpp(module)
    errors = []
    for file in (whole, outfile):
        if file == outfile:
            for number, experts in expert_modules(module):
                channels = [thinner.channels(number, expert, chosen.width) for expert in every]
                down = torch.from_numpy(stored[f"blk.{number}.ffn_down_exps.weight"].data.copy())
                set_narrow(experts, down, channels)
        with torch.inference_mode():
            wanted = [module(tokens[None]).logits[0].float().numpy() for tokens in texts]
        found = [
            logits(file, tokens, n_batch=N_TOKEN, libraries=stock_libraries) for tokens in texts.tolist()
        ]
        errors.append(median(map(nmse, found, wanted)))
    assert errors[1] <= max(2 * errors[0], 1e-6)


@pytest.mark.slow
@pytest.mark.upstream
@pytest.mark.usefixtures("token_ids_only")
@pytest.mark.parametrize("row", rows(*TIED), ids=lambda row: row.name)
def test_models_whose_other_widths_follow_are_refused(row: Row, tmp_path: Path) -> None:
    folder = save_family(row, tmp_path / "model")
    with pytest.raises(MoneError, match="--method narrow: .* use --method drop"):
        export(folder, ratio=0.5, method="narrow", outfile=tmp_path / "x.gguf")


@pytest.mark.slow
@pytest.mark.upstream
def test_stock_makes_the_file_and_its_plan_makes_it_again(text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"outtype": "f32", "files": [text], "n_row": 12, "seq_len": 128}
    plan_file, first, second = (tmp_path / name for name in ("plan.json", "first.gguf", "second.gguf"))
    report = export("demo", ratio=0.5, stock=True, outfile=first, plan_out=plan_file, **options)
    assert report is not None
    assert report.recipe.method == "narrow"
    assert any("none is as it was, byte for byte" in remark for remark in report.remarks)
    stated = json.loads(plan_file.read_text())
    keys = {name: field.contents() for name, field in GGUFReader(first).fields.items()}
    assert keys["llama.feed_forward_length"] == stated["width"] < 32
    assert keys["llama.expert_count"] == len(stated["layers"]["0"]["kept"])
    assert keys["mone.format_version"] == 1 and keys["mone.novice"] == "none"
    assert keys["mone.ratio"] == pytest.approx(0.5, abs=0.05)
    fates = {f"{stated['width']} channels"}
    header = read_header(first)
    assert {*chain.from_iterable(fates_by_slot(header, GgufFile(first).spec).values())} == fates
    assert {*examine(str(first)).fates} == fates, "none is whole"
    export("demo", plan=plan_file, outfile=second, **options)
    made, again = (taken_apart(file).tensors for file in (first, second))
    assert {name: each.data for name, each in made.items()} == {
        name: each.data for name, each in again.items()
    }
    arguments = redo(first).arguments
    assert arguments[arguments.index("--method") + 1] == "narrow"
    assert "--novice" not in arguments


@pytest.mark.upstream
def test_stock_is_never_ignored(small: Path, text: Path, tmp_path: Path) -> None:
    """With a plan of novices it means the same experts dropped; what has them already is refused."""
    plan_file = tmp_path / "plan.json"
    options: dict[str, Any] = {"ratio": 0.5, "novice": "zero", "score": "random", "allocation": "even"}
    options |= {"files": [text], "seq_len": 32, "n_row": 2}
    folder = tmp_path / "half"
    export(small, hf_out=folder, plan_out=plan_file, **options)
    assert Request(model=small, plan=plan_file).recipe.method == "mone"
    assert Request(model=small, plan=plan_file, stock=True).recipe.method == "drop"
    with pytest.raises(MoneError, match="has constants in the place of experts already.*leave out --stock"):
        prepare(Request(model=folder, stock=True, outfile=tmp_path / "x.gguf"))
    with pytest.raises(MoneError, match="pass --method drop, or -o FILE without it"):
        prepare(Request(model=small, ratio=0.5, method="narrow", hf_out=tmp_path / "narrow"))


@pytest.mark.upstream
def test_a_plan_without_novices_takes_none(small: Path, tmp_path: Path) -> None:
    plan_file = tmp_path / "plan.json"
    options: dict[str, Any] = {"ratio": 0.5, "method": "drop", "score": "random"}
    export(small, outfile=tmp_path / "x.gguf", plan_out=plan_file, **options)
    with pytest.raises(MoneError, match="--novice mean with --method drop, which has no novices"):
        _ = Request(model=small, plan=plan_file, novice="mean").recipe


def test_there_are_few_widths_and_no_constants(small: Path) -> None:
    """Of 14,336 channels, say; constants that nothing reads would take gigabytes."""
    spec = replace(open_source(small).spec, expert_size=14336)
    widths = narrow_widths(spec, 1)
    assert len(widths) <= 66 and all(width % 16 == 0 for width in widths)
    size, n_out = 6, 4
    hidden = torch.randn(40, size, generator=torch.manual_seed(1), dtype=torch.float64)
    stats = ChannelStats(
        count=torch.tensor([40]),
        weight=torch.tensor([40.0], dtype=torch.float64),
        first=hidden.sum(0)[None].float(),
        second=(hidden.T @ hidden)[None].float(),
    )
    down = [torch.randn(n_out, size, generator=torch.manual_seed(2))]
    found = thin(stats, down, (0, 3, 6), centred=False)
    assert not found.constants.numel()
    assert found.errors.shape == (1, 3) and found.errors[0, 0] > found.errors[0, 1] > found.errors[0, 2] == 0


@pytest.mark.slow
@pytest.mark.upstream
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"hf_out": "folder"}, "a checkpoint .* has no place for them"),
        ({"fit": 20_000_000}, "--fit and --protect are about whole ones"),
    ],
)
def test_stock_says_why_experts_stay_whole(
    options: dict[str, Any], reason: str, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    if "hf_out" in options:
        options = {"hf_out": tmp_path / "folder"}
    report = export(
        "demo",
        ratio=0.5,
        stock=True,
        outfile=tmp_path / "x.gguf",
        files=[text],
        n_row=4,
        seq_len=128,
        **options,
    )
    assert report is not None
    assert report.recipe.method == "drop"
    assert any("keep all their channels: " in line for line in caplog.messages)
    assert re.search(reason, caplog.text)


@pytest.mark.slow
@pytest.mark.upstream
@pytest.mark.parametrize("outtype", ["auto", "q4_0"])
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
@pytest.mark.by_day(2)
def test_packed_rows_stay_as_they_are_packed(name: str, outtype: str, tmp_path: Path) -> None:
    """From a GGUF in Q8_0: gate and up byte for byte, the size as foretold; rounded to Q4_0 it runs."""
    _, exact = save_wide(name, tmp_path)
    file, outfile = quantised(exact, "q8_0"), tmp_path / "narrow.gguf"
    text = Corpus(random_tokens(12, 64), "random", "0" * 64)
    engine = mone.load(file, n_threads=1)
    calibration = mone.calibrate(engine, text)
    chosen, thinner = mone.plan_thin(
        engine, text, mone.score(calibration), ratio=0.5, outtype=outtype, method="narrow"
    )
    assert chosen.width % 32 == 0 < chosen.width
    size = mone.write(file, calibration, chosen, outfile, novices=thinner, outtype=outtype)
    assert measure(file, chosen, outtype=outtype) == size == outfile.stat().st_size
    before, after = taken_apart(file).tensors, taken_apart(outfile).tensors
    assert before.keys() == after.keys()
    assert np.isfinite(logits(outfile, list(range(3, 60)), n_batch=57)).all()
    for layer in chosen.layers if outtype == "auto" else ():
        for part in ("gate", "up"):
            own, new = (each[f"blk.{layer.layer}.ffn_{part}_exps.weight"] for each in (before, after))
            assert own.kind == new.kind
            whole = np.frombuffer(own.data, np.uint8).reshape(16, 256, -1)
            cut = np.frombuffer(new.data, np.uint8).reshape(len(layer.kept), chosen.width, -1)
            for slot, expert in enumerate(layer.kept):
                channels = thinner.channels(layer.layer, expert, chosen.width).numpy()
                np.testing.assert_array_equal(cut[slot], whole[expert][channels])
