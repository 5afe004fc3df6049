"""Every family of `families.py`: the file in llama.cpp against the definition in PyTorch.

`--families-json=FILE` keeps the measurements; `tools/families_table.py` makes docs/families.md of them.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import COMMON, N_EXPERT, N_LAYER, ROWS, Row
from family_models import calibrated, random_tokens, save_config, save_family, without_vocabulary
from gguf import GGUFReader
from llama_logits import logits
from reference import install, read_novices
from torch import Tensor, nn
from transformers import PreTrainedModel

import mone_export
from mone_export import llamacpp
from mone_export.architectures import family_of
from mone_export.artifacts import Calibration
from mone_export.errors import MoneError
from mone_export.model import expert_modules, inspect
from mone_export.planning import plan, plan_without_scores
from mone_export.scoring import score
from mone_export.writing import measure, write

pytestmark = [pytest.mark.slow, pytest.mark.upstream, pytest.mark.families]

N_TOKEN = 100
FLOOR = 1e-6
EXPORTED = [row for row in ROWS if row.refused is None]
REFUSING = [row for row in ROWS if row.refused is not None]


@pytest.fixture(autouse=True)
def token_ids_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "_converter_class", without_vocabulary(llamacpp._converter_class))


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
            "note": row.note,
            **found[row.name],
        }
        for row in ROWS
        if row.name in found
    ]
    for row in rows:
        print(f"\n{row['name']:36} {row.get('unpruned', '')} {row.get('novice', '')}", end="")
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
    tokens = random_tokens(1, N_TOKEN)[0]
    arch, unpruned, own = compare(model, folder, calibration, 0, tokens)
    _, novice, pruned = compare(model, folder, calibration, 0.5, tokens)
    assert nmse(pruned, own) > 1e-3, "pruning must be visible for this test to mean much"
    record[row.name] = {"arch": arch, "unpruned": unpruned, "novice": novice}
    family = family_of(spec.arch)
    assert family is not None and family.gguf_arch == arch
    assert unpruned < row.limit
    assert novice <= max(2 * unpruned, FLOOR)


def compare(
    model: PreTrainedModel, folder: Path, calibration: Calibration, ratio: float, tokens: Tensor
) -> tuple[str, float, Tensor]:
    """Export at a ratio; return llama.cpp's architecture, the NMSE, and the logits of the definition."""
    outfile = folder.with_suffix(".gguf")
    chosen = plan(score(calibration), ratio=ratio)
    assert ratio == 0 or len({layer.kept for layer in chosen.layers}) == len(chosen.layers), (
        "layers should differ"
    )
    write(folder, calibration, chosen, outfile, outtype="f32")
    install(model, unscaled(model, read_novices(outfile)))
    with torch.inference_mode():
        wanted = model(tokens[None]).logits[0].float()
    found = torch.from_numpy(logits(outfile, tokens.tolist(), n_batch=N_TOKEN))
    arch = GGUFReader(outfile).fields["general.architecture"].contents()
    return arch, nmse(found, wanted), wanted


def unscaled(model: PreTrainedModel, novices: dict[int, dict[int, Tensor]]) -> dict[int, dict[int, Tensor]]:
    """Take out of a file's novices what transformers has in the routing weight: a factor for each expert."""
    layers = {
        int(name.split("layers.")[1].split(".")[0]): value
        for name, value in model.named_parameters()
        if name.endswith("per_expert_scale")
    }
    return {
        layer: {
            expert: row / layers[layer][expert].detach() if layer in layers else row
            for expert, row in rows.items()
        }
        for layer, rows in novices.items()
    }


@pytest.mark.parametrize("row", EXPORTED, ids=name)
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


@pytest.mark.parametrize("row", [row for row in EXPORTED if row.mtp], ids=name)
def test_blocks_behind_the_last_layer_stay_whole(row: Row, tmp_path: Path) -> None:
    folder = save_family(row, tmp_path / "model")
    spec = inspect(folder)
    calibration = calibrated(folder, spec)[1]
    write(folder, calibration, plan(score(calibration), ratio=0.5), tmp_path / "model.gguf", outtype="f32")
    reader = GGUFReader(tmp_path / "model.gguf")
    arch = reader.fields["general.architecture"].contents()
    kept = reader.fields[f"{arch}.expert_kept_count"].contents()
    assert kept == [*(N_EXPERT // 2 if layer in spec.moe_layers else 0 for layer in range(N_LAYER)), 0]
    shapes = {tensor.name: tensor.data.shape for tensor in reader.tensors}
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
    other = not value if isinstance(value, bool) else 0.5
    config = COMMON | row.config | {key: other}
    with pytest.raises(MoneError, match=f"config has {key} = {other}"):
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
        measure(folder, plan_without_scores(inspect(folder), ratio=0.25))
    assert "\n" not in str(error.value)
    record[row.name] = {"refused": str(error.value).replace(str(tmp_path), "the model")}


def test_only_the_table_of_families_names_one() -> None:
    names = re.compile("|".join({row.hf_class for row in ROWS} | {f'"{row.model_type}"' for row in ROWS}))
    package = Path(mone_export.__file__).parent
    found = {
        file.name: match[0]
        for file in package.rglob("*.py")
        if file.name != "architectures.py" and (match := names.search(file.read_text(encoding="utf-8")))
    }
    assert not found
