"""Every family of `families.py`: the file in llama.cpp against the definition in PyTorch.

`--families-json=FILE` keeps the measurements; `tools/pages/families_table.py` makes docs/families.md of them.
"""

import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import transformers
from families import COMMON, N_EXPERT, N_LAYER, ROWS, Row
from family_models import calibrated, random_tokens, save_config, save_family, without_vocabulary
from gguf import GGUFReader
from llama_logits import logits
from programs import run
from reference import Thin, install, read_novices, read_thin
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel

import mone_export
from mone_export import runtime
from mone_export.architectures import family_of
from mone_export.artifacts import Calibration, Corpus, ExpertStats, InputSums, Plan
from mone_export.calibration.engines import InTorch
from mone_export.calibration.llama_model import LlamaOptions
from mone_export.calibration.loading import Model, open_streamed
from mone_export.calibration.masking import masked
from mone_export.calibration.observer import observe
from mone_export.calibration.passes import calibrate
from mone_export.calibration.sensitivity import damage_by_layer
from mone_export.calibration.streaming import LayerFiles
from mone_export.calibration.through_llamacpp import LlamaEngine
from mone_export.calibration.work_folder import WorkFolder
from mone_export.deciding import plan_thin
from mone_export.errors import MoneError
from mone_export.output.writing import measure, write
from mone_export.pruning.novices import novices
from mone_export.pruning.planning import plan, plan_without_scores
from mone_export.pruning.scoring import score
from mone_export.recipe import Recipe
from mone_export.request import Request, prepare
from mone_export.source import inspect, llamacpp, open_source
from mone_export.source.llamacpp import Conversion, projector_command
from mone_export.source.shape import expert_modules

pytestmark = [pytest.mark.slow, pytest.mark.upstream, pytest.mark.families]

N_TOKEN = 100
FLOOR = 1e-6
SUMS = [field.name for field in fields(ExpertStats) if field.name != "n_token"]
EXPORTED = [row for row in ROWS if row.refused is None]
GROUPED = [row for row in EXPORTED if row.config.get("n_group", 1) > 1]
# matrices that are never rounded, and what no linear module of transformers takes in
NEVER_SEEN = re.compile(r"blk\.\d+\.(ffn_gate_inp|attn_k_b|ssm_dt)\.weight")
REFUSING = [row for row in ROWS if row.refused is not None]


@pytest.fixture(autouse=True)
def token_ids_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "converter_class", without_vocabulary(llamacpp.converter_class))


@pytest.fixture(scope="module")
def record(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """What was found, by name of the row; printed at the end, and kept where `--families-json` says."""
    found: dict[str, Any] = {}
    yield found
    rows = [
        {
            "name": row.name,
            "routing": row.routing,
            "bias": row.bias,
            "shared": row.shared,
            "groups": f"{row.config['topk_group']} of {row.config['n_group']}" if row in GROUPED else "",
            "mtp": ("kept whole" if row.mtp_kept else "left out by llama.cpp") if row.mtp else "",
            "note": row.note,
            **found[row.name],
        }
        for row in ROWS
        if row.name in found
    ]
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        for row in rows:
            measured = [f"{row[key]:.0e}" for key in ("unpruned", "novice") if key in row]
            print(f"\n{row['name']:50} {row.get('arch', ''):16}", *(measured or ["refused"]), end="")
        print()
    if target := request.config.getoption("--families-json"):
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        data = {"kind": "families", "versions": versions, "rows": rows}
        Path(target).write_text(json.dumps(data, indent=1) + "\n")


def nmse(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().sum() / wanted.square().sum())


def name(row: Row) -> str:
    return row.name


@pytest.mark.parametrize("row", EXPORTED, ids=name)
def test_logits_equal_the_definition(row: Row, tmp_path: Path, record: dict[str, Any]) -> None:
    folder = save_family(row, tmp_path / "model")
    spec = inspect(folder)
    model, calibration = calibrated(folder, spec)
    texts = random_tokens(1, N_TOKEN)
    if row.packed == "mxfp4":  # activations are rounded, which decides a tie of the router otherwise in a few
        texts = random_tokens(15, 20)
    arch, unpruned, own = compare(model, folder, calibration, 0, texts)
    _, novice, pruned = compare(model, folder, calibration, 0.5, texts)
    assert nmse(pruned, own) > 1e-3, "pruning must be visible for this test to mean much"
    record[row.name] = {"arch": arch, "unpruned": unpruned, "novice": novice}
    family = family_of(spec.arch)
    assert family is not None and family.gguf_arch == arch
    assert unpruned < row.limit
    assert novice <= max(2 * unpruned, FLOOR)
    if row.as_llama_cpp:
        row.as_llama_cpp(model)
        for ratio in (0, 0.5):
            assert compare(model, folder, calibration, ratio, texts)[1] < FLOOR


def compare(
    model: PreTrainedModel,
    folder: Path,
    calibration: Calibration,
    ratio: float,
    texts: Tensor,
) -> tuple[str, float, Tensor]:
    """Export at a ratio; return llama.cpp's architecture, the texts' median NMSE, the definition's logits.

    `texts` are tokens [n_text, n_token], logits [n_text, n_token, n_vocab].
    """
    outfile = folder.with_suffix(".gguf")
    chosen = plan(score(calibration), ratio=ratio)
    assert ratio == 0 or len({layer.kept for layer in chosen.layers}) == len(chosen.layers), (
        "layers should differ"
    )
    write(folder, calibration, chosen, outfile, outtype="f32")
    install(model, unscaled(model, read_novices(outfile)))
    with torch.inference_mode():
        wanted = torch.cat([model(tokens[None]).logits.float() for tokens in texts])
    found = [torch.from_numpy(logits(outfile, tokens, n_batch=len(tokens))) for tokens in texts.tolist()]
    arch = GGUFReader(outfile).fields["general.architecture"].contents()
    return arch, median(map(nmse, found, wanted)), wanted


def scales_of(model: PreTrainedModel) -> dict[int, Tensor]:
    """Return a factor for each expert, [n_expert] by layer, that transformers has in the routing weight."""
    return {
        int(name.split("layers.")[1].split(".")[0]): value.detach()
        for name, value in model.named_parameters()
        if name.endswith("per_expert_scale")
    }


def unscaled_thin(model: PreTrainedModel, thin: dict[int, dict[int, Thin]]) -> dict[int, dict[int, Thin]]:
    """Take such factors out of a file's thin experts."""
    layers = scales_of(model)
    return {
        layer: {
            expert: one._replace(
                down=one.down / layers[layer][expert], constant=one.constant / layers[layer][expert]
            )
            if layer in layers
            else one
            for expert, one in experts.items()
        }
        for layer, experts in thin.items()
    }


def unscaled(model: PreTrainedModel, novices: dict[int, dict[int, Tensor]]) -> dict[int, dict[int, Tensor]]:
    """Take out of a file's novices what transformers has in the routing weight: a factor for each expert."""
    layers = scales_of(model)
    return {
        layer: {
            expert: row / layers[layer][expert] if layer in layers else row for expert, row in rows.items()
        }
        for layer, rows in novices.items()
    }


@pytest.mark.parametrize("row", EXPORTED, ids=name)
@pytest.mark.by_day(16)
def test_thin_experts_equal_the_definition(row: Row, tmp_path: Path) -> None:
    """In one batch and token by token; rows of thin experts are the whole ones'."""
    folder = save_family(row, tmp_path / "model")
    source = open_source(folder)
    if source.not_thin or row.packed:
        pytest.skip(source.not_thin or "its weights are packed")
    module, calibration = calibrated(folder, source.spec)
    corpus, scores = Corpus(random_tokens(16, 64), "random", ""), score(calibration)
    engine = InTorch(Model(source=source, module=module))
    chosen, thinner = plan_thin(engine, corpus, scores, ratio=0.5, outtype="f32")
    whole, outfile = tmp_path / "whole.gguf", tmp_path / "thin.gguf"
    write(source, calibration, plan(scores, ratio=0), whole, outtype="f32")
    write(source, calibration, chosen, outfile, novices=thinner, outtype="f32")
    # where llama.cpp computes less exactly, that decides a tie of the router otherwise in a few
    texts = random_tokens(15, 20) if row.limit >= 1e-3 else random_tokens(1, N_TOKEN)
    _, unpruned, own = compare(module, folder, calibration, 0, texts)
    if row.as_llama_cpp:
        row.as_llama_cpp(module)
    novices, thin = read_novices(outfile), read_thin(outfile, whole)
    n_thin = {layer.layer: sum(len(tier.experts) for tier in layer.tiers) for layer in chosen.layers}
    assert {layer: len(experts) for layer, experts in thin.items()} == n_thin
    assert sum(n_thin.values()) > 3
    install(module, unscaled(module, novices), unscaled_thin(module, thin))
    with torch.inference_mode():
        wanted = torch.cat([module(tokens[None]).logits.float() for tokens in texts])
    assert nmse(wanted, own) > 1e-5, "thin experts must be visible for this test to mean much"
    for n_batch in (N_TOKEN, 1):
        found = [torch.from_numpy(logits(outfile, tokens, n_batch=n_batch)) for tokens in texts.tolist()]
        error = median(map(nmse, found, wanted))
        print(f"{row.name} in batches of {n_batch}: {error:.1e}, unpruned {unpruned:.1e}")
        assert error <= max(2 * unpruned, FLOOR)


@pytest.mark.parametrize("row", EXPORTED, ids=name)
@pytest.mark.by_day(20)
def test_llama_cpp_shows_what_the_experts_do(row: Row, tmp_path: Path, record: dict[str, Any]) -> None:
    """The statistics, and how novices in a layer change the last hidden states, as in PyTorch."""
    folder = save_family(row, tmp_path / "model")
    spec, outfile = inspect(folder), tmp_path / "model.gguf"
    module, wanted = calibrated(folder, spec)
    write(folder, wanted, plan(score(wanted), ratio=0), outfile, outtype="f32")
    tokens = random_tokens(16, 64)
    pruned = {layer: range(0, spec.n_expert, 2) for layer in spec.moe_layers}
    means = {layer: novices(wanted.layers[layer], "mean") for layer in spec.moe_layers}
    with LlamaEngine(outfile, spec, options=LlamaOptions(n_threads=1, exact=True)) as engine:
        found = engine.observe(Corpus(tokens, "random", ""), model_sha256="", config={})
        damage = engine.damage_by_layer(tokens, pruned, means)
    same = damage_by_layer(Model(source=open_source(folder), module=module), tokens, pruned, means)
    off = max(abs(damage[layer] / same[layer] - 1) for layer in same)
    keys = [
        "gated_out_sum",
        "gated2_norm_sq_sum",
    ]  # a factor for each expert may be in the weight or the output
    keys += [] if "scale per expert" in row.routing else ["out_mean", "out_m2", "gate_sum", "max_abs"]
    n_other, largest = 0, 0.0
    for layer, stats in wanted.layers.items():
        other = found.layers[layer].weighted(0.5 if row.hf_class == "Cohere2MoeForCausalLM" else 1)
        assert other.n_token == stats.n_token
        n_other += int((other.count - stats.count).abs().sum()) // 2
        for key in keys:
            a, b = getattr(other, key), getattr(stats, key)
            largest = max(largest, float((a - b).abs().max() / b.abs().max()))
    record.setdefault(row.name, {})["gguf"] = largest
    print(f"{row.name}: {n_other} tokens at other experts, sums within {largest:.1e}, damage {off:.1e}")
    named = open_source(folder).named_inputs(wanted.inputs)
    assert not named.keys() - found.inputs.keys()
    unseen = {name for name in found.inputs.keys() - named.keys() if not NEVER_SEEN.fullmatch(name)}
    assert not unseen
    inputs = max(apart(named, found.inputs).values())
    print(f"{row.name}: inputs of {len(named)} of {len(found.inputs)} matrices within {inputs:.1e}")
    if not row.as_llama_cpp:
        roughly = row.packed == "mxfp4" or row.limit >= 1e-3
        assert largest < (0.2 if roughly else 1e-3)
        assert inputs < (0.2 if roughly else 1e-3)
        # where the body is not apart from the head, PyTorch compares logits
        assert off < (0.05 if roughly else 1e-3) or module.base_model is module


@pytest.mark.parametrize("row", EXPORTED, ids=name)
@pytest.mark.by_day(12)
def test_streamed_layers_give_the_same_sums(
    row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit; and so does another process that finds the work of the first half of the layers."""
    folder = save_family(row, tmp_path / "model")
    wanted = calibrated(folder, inspect(folder))[1]
    monkeypatch.setattr(LayerFiles, "each", half_way(LayerFiles.each))
    with pytest.raises(InterruptedError):
        streamed(folder, tmp_path / "work")
    monkeypatch.undo()
    found = streamed(folder, tmp_path / "work")
    assert found.layers.keys() == wanted.layers.keys()
    for layer, stats in wanted.layers.items():
        assert all(torch.equal(getattr(found.layers[layer], sums), getattr(stats, sums)) for sums in SUMS)
    assert found.inputs.keys() == wanted.inputs.keys()
    for name, inputs in wanted.inputs.items():
        assert torch.equal(found.inputs[name].squares, inputs.squares)


def apart(found: Mapping[str, InputSums], wanted: Mapping[str, InputSums]) -> dict[str, float]:
    """Return how far the inputs of matrices are from others, of the largest: by name.

    With latent attention, llama.cpp's are of what attention has averaged.
    """
    return {
        name: float((found[name].squares - sums.squares).abs().max() / sums.squares.max())
        for name, sums in wanted.items()
        if name in found and "attn_v_b" not in name
    }


def half_way(each: Callable[..., Iterator[int]]) -> Callable[..., Iterator[int]]:
    """Interrupt a pass over the layers."""

    def interrupted(self: LayerFiles, first: int) -> Iterator[int]:
        for number in each(self, first):
            if number == N_LAYER // 2:
                raise InterruptedError
            yield number

    return interrupted


def streamed(folder: Path, workdir: Path) -> Calibration:
    """Calibrate as `calibrated` does, layer by layer."""
    torch.manual_seed(0)
    module, files = open_streamed(folder, device="cpu", dtype=torch.float32)
    corpus = Corpus(tokens=random_tokens(16, 64), name="random", sha256="")
    model = Model(open_source(folder), module, files=files)
    return calibrate(model, corpus, model_sha256="", work=WorkFolder(workdir, {}))


@pytest.mark.parametrize("row", EXPORTED, ids=name)
@pytest.mark.by_day(12)
def test_how_much_a_layer_matters_is_what_pruning_it_alone_does(row: Row, tmp_path: Path) -> None:
    """Layer after layer for all of them together, in memory and streamed, as in whole passes of the model."""
    folder = save_family(row, tmp_path / "model")
    spec = inspect(folder)
    module, calibration = calibrated(folder, spec)
    pruned = {layer.layer: layer.pruned for layer in plan(score(calibration), ratio=0.5).layers}
    vectors = {layer: novices(calibration.layers[layer], "mean") for layer in pruned}
    tokens = random_tokens(3, 16)

    def last_hidden() -> Tensor:
        with torch.inference_mode():
            hidden: Tensor = module.base_model(input_ids=tokens, use_cache=False)[0]
            return hidden.float()

    before, wanted = last_hidden(), {}
    for layer in pruned:
        with observe(module), masked(module, {layer: pruned[layer]}, vectors):
            after = last_hidden()
        change = (after - before).square().sum(-1) / before.square().sum(-1)
        wanted[layer] = pytest.approx(float(change.mean()), rel=1e-3)
        assert change.mean() > 1e-9
    whole = Model(open_source(folder), module)
    assert damage_by_layer(whole, tokens, pruned, vectors) == wanted
    streaming, files = open_streamed(folder, device="cpu", dtype=torch.float32)
    parts = Model(open_source(folder), streaming, files=files)
    assert damage_by_layer(parts, tokens, pruned, vectors) == wanted


@pytest.mark.parametrize("row", EXPORTED, ids=name)
@pytest.mark.by_day(16)
def test_recorded_weights_are_those_that_multiply(row: Row, tmp_path: Path) -> None:
    """The sum of g f over tokens and experts is what the routed experts add to the block they belong to."""
    folder = save_family(row, tmp_path / "model")
    model, calibration = calibrated(folder, inspect(folder))
    added: dict[int, Tensor] = {}
    for layer, experts in expert_modules(model):
        watch(block_of(model, experts), experts, layer, added)
    with torch.inference_mode():
        model.base_model(input_ids=random_tokens(16, 64), use_cache=False)
    for layer, stats in calibration.layers.items():
        recorded = stats.gated_out_sum.sum(0)
        assert torch.linalg.vector_norm(recorded - added[layer]) < 1e-4 * torch.linalg.vector_norm(recorded)


def block_of(model: nn.Module, experts: nn.Module) -> nn.Module:
    """Return the module around the experts, or the experts where more than a sum follows inside it."""
    around = next(module for module in model.modules() if experts in list(module.children()))
    more = [
        child
        for child, module in around.named_children()
        if "attn" in child or "norm" in child or ("latent" in child and isinstance(module, nn.Linear))
    ]
    return experts if more else around


def watch(block: Any, experts: Any, layer: int, added: dict[int, Tensor]) -> None:
    """Sum what the experts change in the output of their block: with them, less without them."""

    def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if block is experts:
            without: Any = 0
        else:
            experts.forward = lambda hidden, *_args, **_kwargs: torch.zeros_like(hidden)
            without = first(type(block).forward(block, *args, **kwargs))
            del experts.forward
        added[layer] = (first(output).double() - without).flatten(0, -2).sum(0)

    block.register_forward_hook(hook, with_kwargs=True)


def first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def exported_half(row: Row, folder: Path) -> tuple[Plan, Path, Path]:
    """Write the file with all experts and the one with half of them; return the plan and both."""
    model = save_family(row, folder / "model")
    calibration = calibrated(model, inspect(model))[1]
    chosen = plan(score(calibration), ratio=0.5)
    whole, half = folder / "whole.gguf", folder / "half.gguf"
    write(model, calibration, plan(score(calibration), ratio=0), whole)
    write(model, calibration, chosen, half)
    return chosen, whole, half


@pytest.mark.parametrize("row", GROUPED, ids=name)
def test_groups_keep_their_routers(row: Row, tmp_path: Path) -> None:
    chosen, whole, half = exported_half(row, tmp_path)
    before, after = (
        {tensor.name: tensor.data for tensor in GGUFReader(file).tensors} for file in (whole, half)
    )
    for layer in chosen.layers:
        prefix = f"blk.{layer.layer}."
        slots = after[f"{prefix}ffn_exps_slot"]
        assert slots.dtype == "int32" and slots.shape == (N_EXPERT, 1)
        assert [layer.order[slot] for slot in slots[:, 0]] == list(range(N_EXPERT))
        for router in ("ffn_gate_inp.weight", "exp_probs_b.bias"):
            assert (after[prefix + router] == before[prefix + router]).all()
        for matrix in ("up", "down"):
            name = f"{prefix}ffn_{matrix}_exps.weight"
            assert (after[name] == before[name][list(layer.kept)]).all()


def test_runtime_refuses_wrong_slots(tmp_path: Path) -> None:
    _, _, half = exported_half(GROUPED[0], tmp_path)
    slots = next(tensor for tensor in GGUFReader(half).tensors if "slot" in tensor.name)
    good = half.read_bytes()
    for spoilt, message in (
        (good.replace(b"ffn_exps_slot", b"ffn_exps_sl0t"), f"tensor '{slots.name}' not found"),
        (
            good[: slots.data_offset] + bytes(4) * N_EXPERT + good[slots.data_offset + 4 * N_EXPERT :],
            "number all",
        ),
    ):
        half.write_bytes(spoilt)
        with pytest.raises(RuntimeError, match=message):
            logits(half, [3], n_batch=1)


@pytest.mark.parametrize("outtype", ["q8_0", "q4_0"])
def test_slots_survive_quantising(outtype: str, tmp_path: Path) -> None:
    _, _, half = exported_half(GROUPED[0], tmp_path)
    quantised = tmp_path / "quantised.gguf"
    run(runtime.path() / "llama-quantize", half, quantised, outtype)
    before, after = (
        {tensor.name: tensor for tensor in GGUFReader(file).tensors} for file in (half, quantised)
    )
    slots = [name for name in before if "slot" in name]
    assert slots and all((before[name].data == after[name].data).all() for name in slots)
    assert after["blk.1.ffn_up_exps.weight"].tensor_type.name == outtype.upper()


def test_incomplete_fp8_blocks_are_refused(tmp_path: Path) -> None:
    row = next(row for row in EXPORTED if row.packed == "fp8")
    folder = save_family(row, tmp_path)
    open_source(folder).check()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [16, 15]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoneError, match="does not consist of whole blocks"):
        open_source(folder).check()


@pytest.mark.parametrize("row", [row for row in EXPORTED if row.packed == "mxfp4"], ids=name)
def test_packed_experts_stay_as_they_are(row: Row, tmp_path: Path) -> None:
    chosen, whole, half = exported_half(row, tmp_path)
    before = {tensor.name: tensor for tensor in GGUFReader(whole).tensors}
    kept = {layer.layer: list(layer.kept) for layer in chosen.layers}
    packed = [tensor for tensor in GGUFReader(half).tensors if tensor.tensor_type.name == "MXFP4"]
    assert len(packed) == 3 * len(kept)
    for tensor in packed:
        experts = kept[int(tensor.name.split(".")[1])]
        assert (tensor.data == before[tensor.name].data[experts]).all()


@pytest.mark.parametrize(
    "row", [row for row in EXPORTED if row.outer.get("vision_config") and row.projector], ids=name
)
def test_command_for_the_projector_makes_one(row: Row, tmp_path: Path) -> None:
    folder = save_family(row, tmp_path / "model")
    images = {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"shortest_edge": 56, "longest_edge": 560},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    command = projector_command(folder, tmp_path / "model.gguf")
    assert command is not None
    result = subprocess.run(shlex.split(command), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    reader = GGUFReader(tmp_path / "mmproj-model.gguf")
    assert reader.fields["general.architecture"].contents() == "clip"
    assert any(tensor.name.startswith("v.blk.0.") for tensor in reader.tensors)


def test_text_model_needs_no_projector(tmp_path: Path) -> None:
    assert projector_command(save_config(ROWS[0], tmp_path), tmp_path / "model.gguf") is None


@pytest.mark.parametrize("row", [row for row in EXPORTED if row.mtp], ids=name)
def test_blocks_after_the_last_layer_stay_whole(
    row: Row, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_family(row, tmp_path / "model")
    spec = inspect(folder)
    calibration = calibrated(folder, spec)[1]
    write(folder, calibration, plan(score(calibration), ratio=0.5), tmp_path / "model.gguf", outtype="f32")
    reader = GGUFReader(tmp_path / "model.gguf")
    arch = reader.fields["general.architecture"].contents()
    kept = reader.fields[f"{arch}.expert_kept_count"].contents()
    blocks = [0] if row.mtp_kept else []
    assert kept == [
        *(N_EXPERT // 2 if layer in spec.moe_layers else 0 for layer in range(N_LAYER)),
        *blocks,
    ]
    shapes = {tensor.name: tensor.data.shape for tensor in reader.tensors}
    assert ("leaves out the blocks for multi-token prediction" in caplog.text) == (not row.mtp_kept)
    assert (f"blk.{N_LAYER}.nextn.eh_proj.weight" in shapes) == row.mtp_kept
    if row.mtp_kept:
        assert shapes[f"blk.{N_LAYER}.ffn_down_exps.weight"][0] == N_EXPERT
        assert f"blk.{N_LAYER}.ffn_down_exps.bias" not in shapes


RELIED_UPON = [
    (row, key, value)
    for row in EXPORTED
    if (family := family_of(row.hf_class))
    for key, value in family.requires.items()
]


@pytest.mark.parametrize(("row", "key", "value"), RELIED_UPON, ids=lambda part: getattr(part, "name", None))
def test_another_routing_than_the_runtimes_is_refused(
    row: Row, key: str, value: object, tmp_path: Path
) -> None:
    other = not value if isinstance(value, bool) else "other" if isinstance(value, str) else type(value)(2)
    config = COMMON | row.config | {key: other}
    with pytest.raises(
        MoneError, match=f"config.json (has {key} = {other}|has no {key}, which means {other})"
    ):
        inspect(save_config(replace(row, config=config), tmp_path))


@pytest.mark.parametrize(
    "row", [row for row in EXPORTED if (family := family_of(row.hf_class)) and family.states], ids=name
)
def test_what_only_the_published_config_states_is_asked_for(row: Row, tmp_path: Path) -> None:
    with pytest.raises(MoneError, match="looks for .* in config.json, without success"):
        inspect(save_config(replace(row, config=COMMON | row.config, hub={}), tmp_path))


@pytest.mark.parametrize("row", REFUSING, ids=name)
def test_refusal_comes_before_the_weights(row: Row, tmp_path: Path, record: dict[str, Any]) -> None:
    folder = save_family(row, tmp_path) if row.saved else save_config(row, tmp_path)
    assert row.refused is not None
    with pytest.raises(MoneError, match=re.escape(row.refused)) as error:
        measure(folder, plan_without_scores(inspect(folder), Recipe.of(0.25)))
    assert "\n" not in str(error.value)
    record[row.name] = {"refused": str(error.value).replace(str(tmp_path), "the model")}


def test_documented_addition_is_what_the_files_hold() -> None:
    root = Path(__file__).parents[1]
    diff = (
        (root / "docs" / "development.md").read_text(encoding="utf-8").split("```diff\n")[1].split("```")[0]
    )
    for part in diff.split("--- ")[1:]:
        file, *lines = part.splitlines()
        added = "\n".join(line.removeprefix("+") for line in lines)
        assert added in (root / file).read_text(encoding="utf-8")


def test_only_the_table_of_families_names_one() -> None:
    names = re.compile("|".join({row.hf_class for row in ROWS} | {f'"{row.model_type}"' for row in ROWS}))
    package = Path(mone_export.__file__).parent
    found = {
        file.name: match[0]
        for file in package.rglob("*.py")
        if file.name != "architectures.py" and (match := names.search(file.read_text(encoding="utf-8")))
    }
    assert not found


def test_joint_novices_need_weighted_outputs(tmp_path: Path) -> None:
    row = next(row for row in ROWS if row.routing.endswith("on the input"))
    folder = save_family(row, tmp_path / "model")
    request = Request(model=folder, ratio=0.5, novice="joint", outfile=tmp_path / "model.gguf")
    with pytest.raises(MoneError, match="weights their inputs: use --novice mean"):
        prepare(request)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("bert", "only models with routed experts"), ("llama", "only models with routed experts")]
    + [(kind, "as a language model") for kind in ("t5", "vit")],
)
def test_models_without_experts_are_refused(model_type: str, reason: str, tmp_path: Path) -> None:
    config = CONFIG_MAPPING[model_type]()
    config.save_pretrained(tmp_path)
    with pytest.raises(MoneError, match=reason) as error:
        inspect(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tensor", ["ffn_gate_tid2eid.weight", "ffn_up_chexps.weight"])
def test_tensors_that_name_experts_are_refused(
    tensor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer with a table of experts' numbers, or with experts for groups of experts, is not renumbered."""
    folder = save_family(ROWS[0], tmp_path)
    shapes = Conversion.shapes.fget
    assert shapes is not None
    with_table = property(lambda self: {**shapes(self), f"blk.1.{tensor}": (8, 2)})
    monkeypatch.setattr(Conversion, "shapes", with_table)
    with pytest.raises(MoneError, match=f"blk.1.{tensor} refers to experts by their number"):
        measure(folder, plan_without_scores(inspect(folder), Recipe.of(0.5)))


def test_no_family_of_transformers_is_forgotten() -> None:
    """Every model of transformers whose file has a class of experts has a row."""
    models = Path(transformers.__file__).parent / "models"
    routed = {
        file.parent.name
        for file in models.glob("*/modeling_*.py")
        if re.search(r"^class \w*Experts\(", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    with_rows = {CONFIG_MAPPING[row.model_type].__module__.split(".")[-2] for row in ROWS}
    assert len(routed) > 60 and not routed - with_rows
