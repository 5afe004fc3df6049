"""Thin experts from end to end: both roads, streamed and in memory, packed types, sizes, refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import SMALL_TEXT, Command
from gguf import GGUFReader
from gguf_families import save_wide
from gguf_file import without_command
from gguf_models import quantised
from gguf_parts import taken_apart
from gguf_reference import keys_of, values_of
from llama_logits import logits
from reference import install, read_novices, read_thin
from torch import Tensor
from transformers import AutoModelForCausalLM

import mone_export as mone
from mone_export import cli
from mone_export.artifacts import ChannelStats, Corpus, Tier
from mone_export.calibration.channel_sums import groups
from mone_export.calibration.channels import measure_channels
from mone_export.calibration.corpus import read_corpus
from mone_export.calibration.loading import Model, load
from mone_export.calibration.through_llamacpp import LlamaEngine
from mone_export.llama_options import LlamaOptions
from mone_export.output.importance import Rounding
from mone_export.output.restore_check import restore_check
from mone_export.output.thin_experts import Thinner
from mone_export.output.writing import measure
from mone_export.source import ggml, open_source
from mone_export.source.gguf_types import kind_for

pytestmark = [pytest.mark.slow, pytest.mark.upstream]

ROWS: dict[str, Any] = {"n_row": 24, "seq_len": 256}
TOKENS = list(range(300, 364))


@pytest.fixture(scope="module")
def demo() -> Model:
    return load(open_source("demo").folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def corpus(demo: Model, text: Path) -> Corpus:
    return read_corpus([text], demo.source.tokenizer(), n_row=12, seq_len=96)


@pytest.fixture(scope="module")
def measured(demo: Model, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("channels")
    measure_channels(demo, corpus, folder)
    return folder


def loaded(folder: Path, layer: int) -> ChannelStats:
    return ChannelStats.load(folder, layer)


def nmse(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.square(found - wanted).sum() / np.square(wanted).sum())


def test_logits_equal_the_definition(text: Path, tmp_path: Path) -> None:
    """The demo; of other families `test_families.py` tells."""
    whole, outfile = tmp_path / "whole.gguf", tmp_path / "thin.gguf"
    mone.export("demo", ratio=0, outfile=whole, outtype="f32")
    mone.export("demo", ratio=0.5, novice="thin", outfile=outfile, outtype="f32", files=[text], **ROWS)
    model = AutoModelForCausalLM.from_pretrained(open_source("demo").folder, dtype=torch.float32).eval()
    own = model(torch.tensor([TOKENS])).logits[0].detach().numpy()
    thin = read_thin(outfile, whole)
    assert {len(each.channels) for layer in thin.values() for each in layer.values()} == {8, 16, 24}
    install(model, read_novices(outfile), thin)
    wanted = model(torch.tensor([TOKENS])).logits[0].detach().numpy()
    assert nmse(wanted, own) > 1e-5
    for n_batch in (len(TOKENS), 1):
        assert nmse(logits(outfile, TOKENS, n_batch=n_batch), wanted) < 1e-6
    keys = keys_of(outfile)
    assert keys["mone.format_version"] == 2
    assert (keys["mone.novice"], keys["mone.scope"]) == ("thin", "budget")
    assert keys["mone.ratio"] == pytest.approx(0.5, abs=0.01)


def test_the_second_pass_sums_what_the_definition_says(demo: Model, corpus: Corpus, measured: Path) -> None:
    """Activations and gates taken from the model by hooks of this test's own."""
    layer = demo.spec.moe_layers[1]
    block = demo.module.model.layers[layer].mlp.experts
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    forward = block.forward

    def recorded(*args: Tensor) -> Tensor:
        seen.append((args[0], args[1], args[2]))
        output: Tensor = forward(*args)
        return output

    block.forward = recorded
    try:
        with torch.inference_mode():
            demo.module(corpus.tokens)
    finally:
        del block.forward
    (hidden, ids, weights), stats = seen[0], loaded(measured, layer)
    for expert in range(demo.spec.n_expert):
        token, slot = torch.where(ids == expert)
        gate, up = (hidden[token] @ block.gate_up_proj[expert].T).double().chunk(2, dim=-1)
        h, g = torch.nn.functional.silu(gate) * up, weights[token, slot].double()
        assert stats.count[expert] == len(token)
        torch.testing.assert_close(stats.weight[expert], g.square().sum(), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(stats.first[expert], g.square() @ h, rtol=1e-4, atol=1e-6)
        second = (h * g.square()[:, None]).T @ h
        torch.testing.assert_close(stats.second[expert].double(), second, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["streamed", "in several passes", "in llama.cpp"])
def test_every_way_finds_the_same(
    how: str, demo: Model, corpus: Corpus, measured: Path, demo_gguf: Path, tmp_path: Path
) -> None:
    if how == "streamed":
        streamed = load(open_source("demo").folder, device="cpu", dtype="float32", stream="on")
        measure_channels(streamed, corpus, tmp_path)
    elif how == "in several passes":
        one = 8 * 32 * 32 * 33
        assert len(list(groups(demo.spec, demo.spec.moe_layers, 2 * 5 * one))) == 3
        measure_channels(demo, corpus, tmp_path, memory=2 * 5 * one)
    else:
        options = LlamaOptions(n_threads=1, exact=True)
        with LlamaEngine(demo_gguf, demo.spec, options=options) as engine:
            engine.measure_channels(corpus, tmp_path)
    limit = 1e-5 if how == "in llama.cpp" else 1e-6
    for layer in demo.spec.moe_layers:
        found, wanted = loaded(tmp_path, layer), loaded(measured, layer)
        assert torch.equal(found.count, wanted.count)
        for name in ("weight", "first", "second"):
            a, b = getattr(found, name), getattr(wanted, name)
            assert (a - b).abs().max() <= limit * b.abs().max(), (layer, name)


def test_both_roads_lead_to_the_same_file(demo_gguf: Path, text: Path, tmp_path: Path) -> None:
    """And a second time to the same bytes."""
    from_checkpoint, from_gguf = tmp_path / "checkpoint.gguf", tmp_path / "gguf.gguf"
    options: dict[str, Any] = {"ratio": 0.5, "novice": "thin", "files": [text], **ROWS}
    mone.export("demo", outfile=from_checkpoint, outtype="f32", **options)
    mone.export(demo_gguf, outfile=from_gguf, **options)
    one, other = (keys_of(file) for file in (from_checkpoint, from_gguf))
    n = sum(a != b for a, b in zip(one["mone.expert_order"], other["mone.expert_order"], strict=True))
    print(f"{n} of {len(one['mone.expert_order'])} places of experts differ")
    error = nmse(*(logits(file, TOKENS, n_batch=len(TOKENS)) for file in (from_gguf, from_checkpoint)))
    print(f"NMSE of the logits {error:.1e}")
    assert error < 1e-4
    again = tmp_path / "again.gguf"
    mone.export("demo", outfile=again, outtype="f32", **options)
    assert again.read_bytes() == from_checkpoint.read_bytes()


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "mxfp4_moe"])
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
@pytest.mark.by_day(2)
def test_packed_rows_stay_as_they_are_packed(name: str, kind: str, tmp_path: Path) -> None:
    """Of gate and up byte for byte; the file is as large as with constants."""
    _, exact = save_wide(name, tmp_path)
    file = quantised(exact, kind)
    rows = Corpus(
        torch.randint(3, 120, (12, 64), generator=torch.Generator().manual_seed(0)), "random", "0" * 64
    )
    thin, constant = tmp_path / "thin.gguf", tmp_path / "constant.gguf"
    engine = mone.load(file, n_threads=1)
    calibration = mone.calibrate(engine, rows)
    scores = mone.score(calibration)
    chosen, thinner = mone.plan_thin(engine, rows, scores, ratio=0.5)
    size = mone.write(file, calibration, chosen, thin, novices=thinner)
    assert measure(file, chosen) == size
    mone.write(file, calibration, mone.plan(scores, ratio=0.5), constant)
    assert abs(thin.stat().st_size - constant.stat().st_size) < 0.01 * constant.stat().st_size + 4096
    before, after = taken_apart(file).tensors, taken_apart(thin).tensors
    n_row = 0
    for layer in chosen.layers:
        for number, tier in enumerate(layer.tiers, start=1):
            for part in ("gate", "up"):
                own = before[f"blk.{layer.layer}.ffn_{part}_exps.weight"]
                new = after[f"blk.{layer.layer}.ffn_{part}_exps.t{number}.weight"]
                assert own.kind == new.kind
                whole = np.frombuffer(own.data, np.uint8).reshape(16, 256, -1)
                cut = np.frombuffer(new.data, np.uint8).reshape(len(tier.experts), tier.width, -1)
                for place, expert in enumerate(tier.experts):
                    channels = thinner.channels(layer.layer, expert, tier.width).numpy()
                    assert np.array_equal(cut[place], whole[expert][channels])
                    n_row += len(channels)
            down = after[f"blk.{layer.layer}.ffn_down_exps.t{number}.weight"]
            assert down.kind == before[f"blk.{layer.layer}.ffn_down_exps.weight"].kind
            unpacked = values_of(before[f"blk.{layer.layer}.ffn_down_exps.weight"])
            for place, expert in enumerate(tier.experts):
                own_down = torch.from_numpy(unpacked[expert].copy())
                wanted = thinner.down(layer.layer, expert, tier.width, own_down).numpy()
                found = values_of(down).reshape(len(tier.experts), *wanted.shape)[place]
                assert nmse(found, wanted) < 0.03, "rounded once more, and nothing else"
    assert n_row > 100
    assert np.isfinite(logits(thin, list(range(3, 60)), n_batch=57)).all()


@pytest.mark.parametrize("with_imatrix", [False, True])
def test_llama_quantize_makes_any_type_of_it(with_imatrix: bool, tmp_path: Path) -> None:
    """Thin experts have the type of whole ones; the size is as foretold."""
    _, file = save_wide("MixtralForCausalLM", tmp_path)
    rows = Corpus(
        torch.randint(3, 120, (12, 64), generator=torch.Generator().manual_seed(0)), "random", "0" * 64
    )
    engine = mone.load(file, n_threads=1)
    calibration, outfile = mone.calibrate(engine, rows), tmp_path / "thin.gguf"
    chosen, thinner = mone.plan_thin(engine, rows, mone.score(calibration), ratio=0.5, outtype="q4_0")
    imatrix = tmp_path / "imatrix.gguf" if with_imatrix else None
    rounding = Rounding("q4_0", with_imatrix, imatrix)
    size = mone.write(file, calibration, chosen, outfile, novices=thinner, outtype=rounding)
    assert measure(file, chosen, outtype=rounding) == size == outfile.stat().st_size
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(outfile).tensors}
    thin = [name for name in kinds if ".t1." in name]
    assert len(thin) == 3 * len(chosen.layers)
    assert {kinds[name] for name in thin} == {"Q4_0"}
    assert np.isfinite(logits(outfile, list(range(3, 60)), n_batch=57)).all()
    if imatrix:
        found = {tensor.name: tensor.data for tensor in GGUFReader(imatrix).tensors}
        matrices = {name for name in kinds if "_exps." in name and name.endswith(".weight")}
        assert {f"{name}.in_sum2" for name in matrices} <= found.keys()
        for layer in chosen.layers:
            for number, tier in enumerate(layer.tiers, start=1):
                check_inputs(found, calibration, thinner, (layer.layer, number, tier))


def check_inputs(
    found: dict[str, Any], calibration: mone.Calibration, thinner: Thinner, place: tuple[int, int, Tier]
) -> None:
    """Thin experts have the inputs that whole ones had, of the channels that they keep."""
    layer, number, tier = place
    up, down = (calibration.inputs[f"blk.{layer}.ffn_{matrix}_exps.weight"] for matrix in ("up", "down"))
    for row, expert in enumerate(tier.experts):
        channels = thinner.channels(layer, expert, tier.width)
        wanted = {
            "gate": up.squares[expert],
            "up": up.squares[expert],
            "down": down.squares[expert][channels],
        }
        for matrix, squares in wanted.items():
            name = f"blk.{layer}.ffn_{matrix}_exps.t{number}.weight"
            np.testing.assert_allclose(found[f"{name}.in_sum2"][row], squares, rtol=1e-6)
            assert found[f"{name}.counts"].ravel()[row] == down.n_row[expert]


def test_experts_too_narrow_for_a_type_are_whole_or_constants(text: Path, tmp_path: Path) -> None:
    outfile, stats = tmp_path / "thin.gguf", tmp_path / "stats"
    options: dict[str, Any] = {"files": [text], "stats": stats, **ROWS}
    report = mone.export("demo", ratio=0.5, novice="thin", outfile=outfile, outtype="q8_0", **options)
    assert report is not None and outfile.stat().st_size == report.size
    assert "mone.expert_order" in keys_of(outfile)
    assert not any(".t1." in tensor.name for tensor in GGUFReader(outfile).tensors)
    with pytest.raises(mone.MoneError, match="plan them with mone_export.plan_thin"):
        mone.plan(mone.score(mone.Calibration.load(stats)), ratio=0.5, novice="thin")


@pytest.mark.parametrize(
    ("name", "n_column", "kind"),
    [
        ("q4_k", 512, "q4_k"),
        ("q4_k", 96, "q5_0"),
        ("q6_k", 96, "q8_0"),
        ("iq2_xs", 512, "q2_k"),
        ("iq2_xs", 96, "iq4_nl"),
        ("mxfp4", 96, "mxfp4"),
        ("q8_0", 8, "f16"),
        ("bf16", 8, "bf16"),
    ],
)
def test_rows_too_short_for_a_type_have_a_better_one(name: str, n_column: int, kind: str) -> None:
    assert kind_for(name, n_column) == kind


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_k", "q6_k", "iq4_nl", "mxfp4", "q2_k", "f16", "bf16"])
def test_rows_are_packed_as_ggml_packs_them(kind: str, tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, dequantize

    weights = np.random.default_rng(0).normal(size=(6, 512)).astype(np.float32)
    packed = ggml.packed(weights, kind)
    found = dequantize(packed, GGMLQuantizationType[kind.upper()]).reshape(6, 512)
    limit = {"q8_0": 1e-4, "q6_k": 1e-3, "f16": 1e-6, "bf16": 1e-5, "q2_k": 0.15}.get(kind, 0.02)
    assert nmse(found, weights) < limit


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--fit", "40K", "--ratio", "0.5"), "--fit shares out thin experts by itself: leave out --ratio"),
        (("--sequential",), "--sequential does not know thin experts"),
        (("--allocate", "even"), "--novice thin with --allocate even"),
        (("--score", "random"), "--novice thin with --score random"),
        (("--method", "drop"), "--novice thin with --method drop"),
    ],
)
def test_what_does_not_know_thin_experts_says_so(
    command: Command, arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    done = command("--novice", "thin", *arguments, "-o", tmp_path / "x.gguf")
    done.is_one_line(said)
    assert not (tmp_path / "x.gguf").exists()


def test_they_are_the_default_where_they_are_possible(text: Path, tmp_path: Path) -> None:
    for name, novice in (("default", None), ("auto", "auto"), ("thin", "thin")):
        options = {"outfile": tmp_path / name, "outtype": "f32", "files": [text], **ROWS}
        mone.export("demo", ratio=0.5, novice=novice, **options)
    assert len({(tmp_path / name).read_bytes() for name in ("default", "auto", "thin")}) == 1
    assert keys_of(tmp_path / "default")["mone.novice"] == "thin"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--sequential",), "--sequential does not know them"),
        (("--fit", "6M", "--outtype", "q8_0"), "experts of 32 channels are too narrow for it in this type"),
        (("--outtype", "q8_0"), "experts of 32 channels are too narrow for it in this type"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_where_they_are_not_possible_one_line_says_why(
    command: Command, arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    done = command(*arguments, "-o", tmp_path / "x.gguf", model="demo", quiet=False)
    done.is_fine()
    assert f"pruned experts become constants, none is thin: {said}" in done.err
    assert keys_of(tmp_path / "x.gguf")["mone.novice"] == "least-squares"


def test_that_the_text_runs_twice_is_said_before(command: Command, tmp_path: Path) -> None:
    done = command("-o", tmp_path / "x.gguf", quiet=False)
    done.is_fine()
    assert done.err.index("64 tokens run through the model twice") < done.err.index("calibrating  ")
    done = command("-o", tmp_path / "y.gguf", "--novice", "mean", quiet=False)
    assert done.status == 0 and "through the model twice" not in done.err


def test_a_folder_too_small_for_temporary_files_means_constants(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mone_export.request.channel_bytes", lambda _: 10**18)
    done = command("-o", tmp_path / "x.gguf", quiet=False)
    done.is_fine()
    assert "none is thin: " in done.err and "temporary files need 1000000 TB" in done.err


def test_saved_statistics_need_the_text_for_thin_experts(
    command: Command, text: Path, tmp_path: Path
) -> None:
    stats = ("--stats", tmp_path / "stats")
    first, again, other = (tmp_path / f"{name}.gguf" for name in ("first", "again", "other"))
    command(*stats, "-o", first).is_fine()
    command(*stats, "-o", again).is_fine()
    assert first.read_bytes() == again.read_bytes()
    done = command(*stats, "-o", other, text="", quiet=False)
    done.is_fine()
    assert "they take the text of the statistics once more: pass it with -f" in done.err
    assert keys_of(other)["mone.novice"] == "least-squares"


def test_a_plan_with_thin_experts_is_applied_again(command: Command, tmp_path: Path) -> None:
    plan, first, again = (tmp_path / name for name in ("plan.json", "first.gguf", "again.gguf"))
    command("--plan-out", plan, "-o", first).is_fine()
    value = json.loads(plan.read_text())
    assert value["mone_plan"] == 2 and any(layer["tiers"] for layer in value["layers"].values())
    once_more = ("--plan", plan, "--ratio", "0.5")
    command(*once_more, "-o", again).is_one_line("--ratio with --plan, which says which experts go")
    status = cli.main(
        [str(command.model), *map(str, ("--plan", plan, "-o", again, "-f", command.text, *SMALL_TEXT, "-q"))]
    )
    assert status == 0 and without_command(first) == without_command(again)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"width": 999}, "layer [0-9]+ has tiers that a layer cannot have"),
        ({"width": 0}, "layer [0-9]+ has tiers that a layer cannot have"),
        ({"experts": []}, "does not name each of its experts once"),
        ({"width": "wide"}, "is no plan of mone-export"),
    ],
    ids=str,
)
def test_plans_that_cannot_be_are_refused(
    command: Command, change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    command("--plan-out", plan, "-o", tmp_path / "first.gguf").is_fine()
    value = json.loads(plan.read_text())
    next(layer for layer in value["layers"].values() if layer["tiers"])["tiers"][0] |= change
    plan.write_text(json.dumps(value))
    with pytest.raises(mone.MoneError, match=said):
        mone.export(command.model, plan=plan, outfile=tmp_path / "x.gguf", files=[command.text], n_row=2)


def test_a_calibration_that_ends_early_has_thin_experts(command: Command, tmp_path: Path) -> None:
    done = command("--until-stable", "0.1", "--chunks", "64", "-o", tmp_path / "x.gguf", quiet=False)
    done.is_fine()
    assert keys_of(tmp_path / "x.gguf")["mone.novice"] == "thin"


def test_a_work_folder_keeps_the_second_pass(command: Command, text: Path, tmp_path: Path) -> None:
    options = ("--workdir", tmp_path / "work")
    first = command(*options, "-o", tmp_path / "half.gguf", quiet=False)
    again = command(*options, "--ratio", "0.25", "-o", tmp_path / "more.gguf", quiet=False)
    command("--ratio", "0.25", "-o", tmp_path / "alone.gguf").is_fine()
    first.is_fine()
    again.is_fine()
    assert "second pass  " in first.err and "second pass  " not in again.err
    assert "the second pass is in" in again.err
    assert (tmp_path / "more.gguf").read_bytes() == (tmp_path / "alone.gguf").read_bytes()
    (tmp_path / "work" / "rank-0" / "channels" / "layer-1.half.safetensors").unlink()  # as if killed in it
    command(*options, "-o", tmp_path / "again.gguf").is_fine()
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "half.gguf").read_bytes()


def test_a_file_with_thin_experts_is_not_pruned_again(text: Path, tmp_path: Path) -> None:
    outfile, whole = tmp_path / "thin.gguf", tmp_path / "whole.gguf"
    mone.export("demo", ratio=0, outfile=whole, outtype="f32")
    mone.export("demo", ratio=0.5, novice="thin", outfile=outfile, outtype="f32", files=[text], **ROWS)
    assert restore_check(outfile, whole)[0] >= 5, "its whole experts are those of the original"
    with pytest.raises(mone.MoneError, match="has thin experts"):
        mone.export(outfile, ratio=0.25, outfile=tmp_path / "again.gguf", files=[text], **ROWS)


def test_without_pruning_the_file_is_the_ordinary_one(text: Path, tmp_path: Path) -> None:
    plain, thin = tmp_path / "plain.gguf", tmp_path / "thin.gguf"
    mone.export("demo", ratio=0, outfile=plain, outtype="f32")
    mone.export("demo", ratio=0, novice="thin", outfile=thin, outtype="f32", files=[text], **ROWS)
    assert without_command(plain) == without_command(thin)


def test_a_plan_with_thin_experts_needs_what_makes_them(demo: Model, corpus: Corpus, tmp_path: Path) -> None:
    calibration = mone.calibrate(demo, corpus)
    plan, _ = mone.plan_thin(demo, corpus, mone.score(calibration), ratio=0.5)
    with pytest.raises(mone.MoneError, match="pass as novices what plan_thin returned"):
        mone.write("demo", calibration, plan, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_too_little_room_for_temporary_files_is_said_first(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mone_export.request.channel_bytes", lambda _: 10**18)
    done = command("--novice", "thin", "-o", tmp_path / "x.gguf")
    done.is_one_line("temporary files need 1000000 TB: set TMPDIR")
