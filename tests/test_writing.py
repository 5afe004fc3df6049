"""The written file: upstream's own at ratio 0, the format's at any other, complete or not there at all."""

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf_file
import numpy as np
import pytest
import torch
from gguf_file import Contents
from tiny import TINY, save_tiny

from mone_export.artifacts import Calibration, Plan
from mone_export.calibration.corpus import read_corpus
from mone_export.calibration.loading import load
from mone_export.calibration.passes import calibrate
from mone_export.errors import MoneError
from mone_export.output.quantizing import QUANTIZE_TYPES
from mone_export.output.writing import measure, write
from mone_export.pruning.dern import recombine
from mone_export.pruning.novices import NOVICES, novices
from mone_export.pruning.planning import plan, plan_without_scores
from mone_export.pruning.scoring import score
from mone_export.recipe import Recipe
from mone_export.source.llamacpp import CONVERTER_TYPES, Conversion
from mone_export.source.shape import expert_modules
from mone_export.source.tokenizing import load_tokenizer
from mone_export.source.weights import fingerprint

FAMILIES_OF = {
    "f32": tuple(TINY),
    "bf16": ("OlmoeForCausalLM", "GptOssForCausalLM", "DeepseekV2ForCausalLM"),
    "q8_0": ("Qwen3MoeForCausalLM", "GptOssForCausalLM"),
}
CASES = [(family, outtype) for outtype, families in FAMILIES_OF.items() for family in families]
ONE_OF_EACH = dict(CASES)  # every family in one type, every type
PARAMS = [
    pytest.param(
        case, marks=[pytest.mark.slow, *([] if case in ONE_OF_EACH.items() else [pytest.mark.nightly])]
    )
    for case in CASES
]
SMALL = ("small", "f32")


def calibration_of(folder: Path, text: Path) -> Calibration:
    model = load(folder, device="cpu")
    corpus = read_corpus([text], load_tokenizer(folder), n_row=2, seq_len=64)
    return calibrate(model, corpus, model_sha256=fingerprint(folder))


@pytest.fixture(scope="module")
def folder_of(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model of a family, made when first asked for."""
    folders = {"small": small}

    def folder(family: str) -> Path:
        if family not in folders:
            folders[family] = save_tiny(family, tmp_path_factory.mktemp("models") / family)
        return folders[family]

    return folder


@pytest.fixture(scope="module")
def calibrated(folder_of: Callable[[str], Path], text: Path) -> Callable[[str], Calibration]:
    found: dict[str, Calibration] = {}

    def calibration(family: str) -> Calibration:
        if family not in found:
            found[family] = calibration_of(folder_of(family), text)
        return found[family]

    return calibration


@pytest.fixture(scope="module")
def upstream(
    folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Contents]:
    """What llama.cpp's own converter makes of a family's model."""
    found: dict[tuple[str, str], Contents] = {}

    def contents(family: str, outtype: str) -> Contents:
        if (family, outtype) not in found:
            outfile = tmp_path_factory.mktemp("upstream") / "model.gguf"
            gguf_file.convert_upstream(folder_of(family), outfile, outtype)
            found[family, outtype] = gguf_file.read(outfile)
        return found[family, outtype]

    return contents


@pytest.fixture(params=[SMALL, *PARAMS], ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


def chosen(calibration: Calibration, ratio: float, min_kept: int | None = None, **choices: Any) -> Plan:
    return plan(score(calibration, "mone"), ratio=ratio, min_kept=min_kept, allocation="even", **choices)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.by_day(1)
def test_nothing_pruned_is_upstreams_own_file(
    case: tuple[str, str],
    folder_of: Callable[[str], Path],
    calibrated: Callable[[str], Calibration],
    upstream: Callable[[str, str], Contents],
    tmp_path: Path,
) -> None:
    family, outtype = case
    calibration = calibrated(family)
    outfile = tmp_path / "model.gguf"
    write(folder_of(family), calibration, chosen(calibration, 0), outfile, outtype=outtype)
    ours, stock = gguf_file.read(outfile), upstream(family, outtype)
    assert list(ours.tensors) == list(stock.tensors), "the same tensors in the same order"
    for name, tensor in stock.tensors.items():
        assert ours.tensors[name][:2] == tensor[:2], name
        assert same_bits(ours.tensors[name].data, tensor.data), name
    own_keys = {name: value for name, value in ours.keys.items() if not name.startswith("mone.")}
    assert own_keys == stock.keys and list(own_keys) == list(stock.keys)
    assert ours.keys["mone.ratio"] == (("FLOAT32",), 0.0)


@pytest.mark.by_day(2)
def test_pruned_file_is_upstreams_in_the_order_of_the_format(
    case: tuple[str, str],
    folder_of: Callable[[str], Path],
    calibrated: Callable[[str], Calibration],
    upstream: Callable[[str, str], Contents],
    tmp_path: Path,
) -> None:
    family, outtype = case
    calibration = calibrated(family)
    outfile = tmp_path / "model.gguf"
    decision = chosen(calibration, 0.5)
    write(folder_of(family), calibration, decision, outfile, outtype=outtype)
    ours, stock = gguf_file.read(outfile), upstream(family, outtype)
    orders = orders_of(ours)
    assert orders == {layer.layer: list(layer.order) for layer in decision.layers}
    wanted = {name: tensor.data for name, tensor in stock.tensors.items()}
    for layer, order in orders.items():
        kept, pruned = order[:8], order[8:]
        assert kept == sorted(kept) and pruned == sorted(pruned)
        stand_ins = novices(calibration.layers[layer], "least-squares").float().numpy()
        put_in_order(wanted, f"blk.{layer}.", kept, pruned, stand_ins)
    assert ours.tensors.keys() == wanted.keys()
    for name, data in wanted.items():
        tensor = ours.tensors[name]
        assert same_bits(tensor.data, data), name
        added = name not in stock.tensors
        assert tensor.kind == ("F32" if added else stock.tensors[name].kind), name
        if not added:
            assert tensor.shape[:-1] == stock.tensors[name].shape[:-1], name


def put_in_order(
    wanted: dict[str, np.ndarray], prefix: str, kept: list[int], pruned: list[int], stand_ins: np.ndarray
) -> None:
    """Edit a layer of upstream's tensors as section 2 of the format says."""
    n_kept = len(kept)
    for name in [name for name in wanted if name.startswith(prefix)]:
        tensor = name.removeprefix(prefix)
        if tensor in ("ffn_gate_inp.weight", "ffn_gate_inp.bias", "exp_probs_b.bias"):
            wanted[name] = wanted[name][kept + pruned]
        elif "_exps." in tensor and tensor.endswith(".weight"):
            wanted[name] = wanted[name][kept]
        elif "_exps." in tensor:
            assert tensor.endswith(".bias")
            wanted[name] = wanted[name][kept + pruned]
            wanted[name][n_kept:] = 0
    bias = wanted.setdefault(f"{prefix}ffn_down_exps.bias", np.zeros_like(stand_ins))
    bias[n_kept:] = stand_ins[pruned]


def orders_of(contents: Contents) -> dict[int, list[int]]:
    """The file's own account of its pruned layers."""
    arch = contents.keys["general.architecture"][1]
    n_expert = contents.keys[f"{arch}.expert_count"][1]
    pruned = [il for il, n in enumerate(contents.keys[f"{arch}.expert_kept_count"][1]) if 0 < n < n_expert]
    order = contents.keys["mone.expert_order"][1]
    assert len(order) == len(pruned) * n_expert
    return {il: order[i * n_expert : (i + 1) * n_expert] for i, il in enumerate(pruned)}


@pytest.mark.parametrize(
    "family", ["small", *(pytest.param(family, marks=pytest.mark.slow) for family in TINY)]
)
@pytest.mark.by_day(2)
def test_drop_leaves_an_ordinary_file_of_the_kept_experts(
    family: str,
    folder_of: Callable[[str], Path],
    calibrated: Callable[[str], Calibration],
    upstream: Callable[[str, str], Contents],
    tmp_path: Path,
) -> None:
    calibration, outfile = calibrated(family), tmp_path / "model.gguf"
    decision = plan(score(calibration, "reap"), ratio=0.25, method="drop")
    size = write(folder_of(family), calibration, decision, outfile, outtype="f32")
    blank = plan_without_scores(calibration.spec, Recipe.of(0.25, score="reap", method="drop"))
    assert measure(folder_of(family), blank, outtype="f32") == size
    ours, stock = gguf_file.read(outfile), upstream(family, "f32")
    kept = {layer.layer: list(layer.kept) for layer in decision.layers}
    assert list(ours.tensors) == list(stock.tensors)
    for name, tensor in stock.tensors.items():
        layer = int(name.split(".")[1]) if name.startswith("blk.") else -1
        has_experts = "_exps." in name or "ffn_gate_inp." in name or "exp_probs_b" in name
        wanted = tensor.data[kept[layer]] if has_experts else tensor.data
        assert same_bits(ours.tensors[name].data, wanted), name
    arch = stock.keys["general.architecture"][1]
    other = {name for name, value in ours.keys.items() if stock.keys.get(name) != value}
    own = {name for name in other if not name.startswith("mone.")}
    assert own - {"general.size_label"} == {f"{arch}.expert_count"}
    assert ours.keys[f"{arch}.expert_count"] == (("UINT32",), 12)
    assert ours.keys["mone.method"] == (("STRING",), "drop")


@pytest.mark.parametrize(
    "family",
    ["small", *(pytest.param(family, marks=pytest.mark.slow) for family in TINY if "Gpt" not in family)],
)
@pytest.mark.by_day(2)
def test_dern_writes_the_recombined_experts(
    family: str, folder_of: Callable[[str], Path], calibrated: Callable[[str], Calibration], tmp_path: Path
) -> None:
    calibration, outfile = calibrated(family), tmp_path / "model.gguf"
    decision = plan(score(calibration, "gate"), ratio=0.5, method="dern")
    size = write(folder_of(family), calibration, decision, outfile, outtype="f32")
    blank = plan_without_scores(calibration.spec, Recipe.of(0.5, score="gate", method="dern"))
    assert measure(folder_of(family), blank, outtype="f32") == size
    ours = gguf_file.read(outfile)
    modules = dict(expert_modules(load(folder_of(family), device="cpu").module))
    for layer in decision.layers:
        experts, stats = modules[layer.layer], calibration.layers[layer.layer]
        wanted = recombine(
            lambda e, experts=experts: segments(experts, e),
            layer.kept,
            layer.pruned,
            stats.gate_sum / stats.n_token,
        )
        matrices = [
            ours.tensors[f"blk.{layer.layer}.ffn_{name}_exps.weight"] for name in ("gate", "up", "down")
        ]
        gate, up, down = (torch.from_numpy(matrix.data) for matrix in matrices)
        found = torch.stack([gate, up, down.mT], dim=2)  # [n_kept, n_segment, 3, d]
        torch.testing.assert_close(found, torch.stack(list(wanted)), rtol=0, atol=0)
        assert ours.tensors[f"blk.{layer.layer}.ffn_gate_inp.weight"].shape[-1] == 8


def segments(experts: Any, e: int) -> torch.Tensor:
    gate, up = experts.gate_up_proj[e].detach().chunk(2)
    return torch.stack([gate, up, experts.down_proj[e].detach().T], dim=1)


@pytest.mark.slow
def test_dern_refuses_biases(
    folder_of: Callable[[str], Path], calibrated: Callable[[str], Calibration], tmp_path: Path
) -> None:
    calibration = calibrated("GptOssForCausalLM")
    decision = plan(score(calibration, "gate"), ratio=0.5, method="dern")
    with pytest.raises(
        MoneError, match=r"ffn_\w+_exps.bias: --method dern cannot merge .*: use --method drop"
    ):
        write(folder_of("GptOssForCausalLM"), calibration, decision, tmp_path / "model.gguf")


@pytest.mark.parametrize("family", ["small", pytest.param("DeepseekV2ForCausalLM", marks=pytest.mark.slow)])
def test_keys_are_the_formats(
    family: str,
    folder_of: Callable[[str], Path],
    calibrated: Callable[[str], Calibration],
    tmp_path: Path,
) -> None:
    calibration, outfile = calibrated(family), tmp_path / "model.gguf"
    write(folder_of(family), calibration, chosen(calibration, 0.3, novice="zero"), outfile)
    keys = gguf_file.read(outfile).keys
    arch = keys["general.architecture"][1]
    dense = 1 if family.startswith("Deepseek") else 0
    assert keys[f"{arch}.expert_kept_count"] == (("ARRAY", "UINT32"), [0] * dense + [11] * (3 - dense))
    assert keys[f"{arch}.expert_count"][1] == 16, "the router's width stays"
    assert keys["mone.expert_order"][0] == ("ARRAY", "INT32")
    assert keys["mone.format_version"] == (("UINT32",), 1)
    assert keys["mone.ratio"] == (("FLOAT32",), np.float32(5 / 16))
    assert keys["mone.calibration.tokens"] == (("UINT64",), 128)
    for name, value in {
        "mone.method": "mone",
        "mone.score": "mone",
        "mone.novice": "zero",
        "mone.scope": "layer",
        "mone.source.name": folder_of(family).name,
        "mone.source.sha256": calibration.model_sha256,
        "mone.calibration.sha256": calibration.corpus_sha256,
    }.items():
        assert keys[name] == (("STRING",), value), name
    assert keys["mone.tool_version"][0] == ("STRING",)


def test_ordinary_file_has_no_key_that_changes_loading(
    small: Path, calibrated: Callable[[str], Calibration], tmp_path: Path
) -> None:
    write(small, calibrated("small"), chosen(calibrated("small"), 0), tmp_path / "model.gguf")
    keys = gguf_file.read(tmp_path / "model.gguf").keys
    assert not [name for name in keys if "expert_kept_count" in name or "expert_order" in name]


@pytest.mark.parametrize("novice", NOVICES)
def test_rows_of_the_down_bias_are_the_novices(
    small: Path, calibrated: Callable[[str], Calibration], tmp_path: Path, novice: str
) -> None:
    calibration = calibrated("small")
    decision = chosen(calibration, 0.25, novice=novice)
    write(small, calibration, decision, tmp_path / "model.gguf", outtype="q8_0")
    tensors = gguf_file.read(tmp_path / "model.gguf").tensors
    for layer in decision.layers:
        bias = tensors[f"blk.{layer.layer}.ffn_down_exps.bias"]
        vectors = novices(calibration.layers[layer.layer], novice).float()[list(layer.pruned)]
        assert bias.kind == "F32" and bias.shape == (64, 16)
        assert not bias.data[:12].any() and np.array_equal(bias.data[12:], vectors.numpy())


@pytest.mark.parametrize("novice", NOVICES)
@pytest.mark.parametrize("score_name", ["mone", "mone-paper", "frequency"])
def test_measured_size_knows_the_names_in_the_header(
    small: Path, calibrated: Callable[[str], Calibration], tmp_path: Path, score_name: str, novice: str
) -> None:
    calibration = calibrated("small")
    decision = plan(score(calibration, score_name), ratio=0.5, novice=novice, allocation="even")
    size = write(small, calibration, decision, tmp_path / "model.gguf")
    blank = plan_without_scores(calibration.spec, decision.recipe)
    assert measure(small, blank) == size


@pytest.mark.parametrize("ratio", [0, 0.5])
@pytest.mark.parametrize("outtype", CONVERTER_TYPES)
def test_measured_size_is_the_real_one(
    small: Path, calibrated: Callable[[str], Calibration], tmp_path: Path, outtype: str, ratio: float
) -> None:
    calibration, outfile = calibrated("small"), tmp_path / "model.gguf"
    decision = chosen(calibration, ratio)
    size = write(small, calibration, decision, outfile, outtype=outtype)
    assert size == outfile.stat().st_size
    blank = plan_without_scores(calibration.spec, decision.recipe)
    assert measure(small, blank, outtype=outtype) == size


@pytest.mark.upstream
@pytest.mark.parametrize("ratio", [0, 0.5])
@pytest.mark.parametrize("outtype", QUANTIZE_TYPES)
@pytest.mark.by_day(12)
def test_measured_size_is_the_real_one_of_what_is_rounded(
    small: Path, calibrated: Callable[[str], Calibration], tmp_path: Path, outtype: str, ratio: float
) -> None:
    calibration, outfile = calibrated("small"), tmp_path / "model.gguf"
    decision = chosen(calibration, ratio)
    size = write(small, calibration, decision, outfile, outtype=outtype)
    blank = plan_without_scores(calibration.spec, decision.recipe)
    assert measure(small, blank, outtype=outtype) == size


@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
def test_same_input_gives_the_same_bytes(
    small: Path, calibrated: Callable[[str], Calibration], text: Path, tmp_path: Path, outtype: str
) -> None:
    for number, calibration in enumerate([calibrated("small"), calibration_of(small, text)]):
        write(small, calibration, chosen(calibration, 0.5), tmp_path / f"{number}.gguf", outtype=outtype)
    assert (tmp_path / "0.gguf").read_bytes() == (tmp_path / "1.gguf").read_bytes()


@pytest.mark.parametrize("before", [None, b"an older file"])
@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), MoneError("no"), KeyboardInterrupt()]
)
def test_failure_midway_leaves_nothing(
    small: Path,
    calibrated: Callable[[str], Calibration],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    before: bytes | None,
) -> None:
    def fail(self: Conversion, progress: object = None) -> None:
        (part,) = tmp_path.glob("model.gguf.*.part/model.gguf")
        assert part.stat().st_size > 0, "the head is written"
        raise failure

    monkeypatch.setattr(Conversion, "write_tensors", fail)
    outfile = tmp_path / "model.gguf"
    if before:
        outfile.write_bytes(before)
    expected = MoneError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected) as error:
        write(small, calibrated("small"), chosen(calibrated("small"), 0.5), outfile)
    if isinstance(failure, OSError):
        assert "No space left on device; free some space or choose another -o" in str(error.value)
    if before:
        assert outfile.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == (["model.gguf"] if before else [])


def test_progress_ends_at_the_whole(
    small: Path, calibrated: Callable[[str], Calibration], tmp_path: Path
) -> None:
    seen: list[tuple[int, int, str]] = []
    write(
        small,
        calibrated("small"),
        chosen(calibrated("small"), 0.5),
        tmp_path / "model.gguf",
        progress=lambda *step: seen.append(step),
    )
    done, total, _ = seen[-1]
    assert done == total and [step[0] for step in seen] == sorted(step[0] for step in seen)


def test_plan_of_one_expert_per_layer_can_be_written(
    small: Path, calibrated: Callable[[str], Calibration], tmp_path: Path
) -> None:
    decision = chosen(calibrated("small"), 0.9, min_kept=1)
    write(small, calibrated("small"), decision, tmp_path / "model.gguf")
    contents = gguf_file.read(tmp_path / "model.gguf")
    assert contents.keys["llama.expert_kept_count"][1] == [2, 2, 2]
    assert contents.tensors["blk.0.ffn_up_exps.weight"].shape[-1] == 2


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 1e39])
def test_novices_that_are_not_finite_are_never_written(
    small: Path, calibrated: Callable[[str], Calibration], tmp_path: Path, value: float
) -> None:
    calibration = calibrated("small")
    decision = chosen(calibration, 0.5, novice="mean")
    out_mean = calibration.layers[1].out_mean.clone()
    seen = next(expert for expert in decision.layers[1].pruned if calibration.layers[1].count[expert])
    out_mean[seen, 3] = value
    broken = dict(calibration.layers) | {1: replace(calibration.layers[1], out_mean=out_mean)}
    with pytest.raises(MoneError, match=r"layer 1: .* not finite"):
        write(small, replace(calibration, layers=broken), decision, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())
