"""A size spent expert by expert: bytes, types, the numbers that llama.cpp computes, what is worth what."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import SMALL_TEXT, Command
from family_models import without_vocabulary
from gguf import GGMLQuantizationType, GGUFReader
from gguf_families import save_wide
from gguf_file import without_command
from gguf_parts import Parts, Stored, key, put_together, taken_apart
from gguf_reference import dequantised, keys_of, values_of
from llama_logits import logits

import mone_export as mone
from mone_export import cli
from mone_export.artifacts import Corpus, LayerPlan, Plan, Tier
from mone_export.calibration.engines import engine_of
from mone_export.deciding import fitted
from mone_export.fitting import candidates
from mone_export.output.writing import measure
from mone_export.pruning.planning import plan_without_scores
from mone_export.pruning.thinning import widths_of
from mone_export.recipe import Recipe
from mone_export.source import llamacpp
from mone_export.spending import Spending, missing_without_channels

pytestmark = [pytest.mark.slow, pytest.mark.upstream]

FAMILIES = (
    *("OlmoeForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "MixtralForCausalLM"),
    *("GptOssForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM with groups"),
    "Dots1ForCausalLM",
)


def in_one_tier(file: Path, outfile: Path) -> Path:
    """Write an F32 file of tiers as one of version 1: all kept, missing channels filled with zeros."""
    parts = taken_apart(file)
    keys = keys_of(file)
    arch = keys["general.architecture"]
    n_tier = keys[f"{arch}.expert_tier_count"]
    tensors: dict[str, Stored] = {}
    for name, tensor in parts.tensors.items():
        if ".t1." in name or ".t2." in name:
            continue
        tiers = [f"{name.removesuffix('.weight')}.t{number}.weight" for number in range(1, n_tier + 1)]
        stacks = [values_of(parts.tensors[each]) for each in (name, *tiers) if each in parts.tensors]
        if len(stacks) > 1:
            size = stacks[0].shape[1:]
            whole = np.concatenate([_filled(stack, size, "gate_up" in name) for stack in stacks])
            tensor = Stored(GGMLQuantizationType.F32, whole.shape[::-1], whole.astype(np.float32).tobytes())
        tensors[name] = tensor
    sizes = np.array(keys[f"{arch}.expert_tier_sizes"]).reshape(-1, n_tier).sum(1)
    counts = [n + int(more) for n, more in zip(keys[f"{arch}.expert_kept_count"], sizes, strict=True)]
    gone = {f"{arch}.expert_tier_count", f"{arch}.expert_tier_sizes"}
    own = {name: value for name, value in parts.keys.items() if name not in gone}
    own["mone.format_version"] = key("mone.format_version", 1)
    own[f"{arch}.expert_kept_count"] = key(f"{arch}.expert_kept_count", counts)
    outfile.write_bytes(put_together(Parts(own, tensors)))
    return outfile


def _filled(stack: np.ndarray, size: tuple[int, ...], merged: bool) -> np.ndarray:
    halves = np.split(stack, 2, axis=1) if merged else [stack]
    rows, columns = size[0] // len(halves), size[1]
    wide = [
        np.pad(half, ((0, 0), (0, rows - half.shape[1]), (0, columns - half.shape[2]))) for half in halves
    ]
    return np.concatenate(wide, axis=1)


def spending_of(model: Any, *, thin: bool, n_row: int = 8) -> tuple[Spending, Any]:
    """What a decision about a model follows from, measured on random tokens, and what makes thin experts."""
    generator = torch.Generator().manual_seed(0)
    corpus = Corpus(torch.randint(3, 120, (n_row, 64), generator=generator), "random", "0" * 64)
    scores = mone.score(mone.calibrate(model, corpus))
    size = scores.spec.expert_size
    if not thin:
        recipe = Recipe.of(0.5, allocation="budget", min_kept=2)
        return Spending(model.source, scores, recipe, (0, size), missing_without_channels(scores)), None
    widths = widths_of(scores.spec, 32)
    thinner = fitted(engine_of(model), corpus, widths)
    recipe = Recipe.of(0.5, novice="thin", min_kept=2)
    return Spending(model.source, scores, recipe, widths, thinner.errors), thinner


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.by_day(3)
def test_types_of_their_own_compute_what_they_say(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiers against one tier with the same numbers, which `test_gguf_types` holds against the definition."""
    checkpoint, original = save_wide(name, tmp_path)
    monkeypatch.setattr(llamacpp, "converter_class", without_vocabulary(llamacpp.converter_class))
    model = mone.load(checkpoint, device="cpu", dtype="float32")
    spending, thinner = spending_of(model, thin=True)
    chosen = of_every_kind(spending)
    calibration, outfile = spending.scores.calibration, tmp_path / "mixed.gguf"
    mone.write(model.source, calibration, chosen, outfile, novices=thinner, outtype="q4_k_m")
    assert measure(model.source, chosen, outtype="q4_k_m") == outfile.stat().st_size
    wanted = expected_kinds(chosen)
    kinds = {tensor.name: tensor.tensor_type.name.lower() for tensor in GGUFReader(outfile).tensors}
    there = [name for name in wanted if name in kinds]
    assert len(there) >= 3 * len(chosen.layers)
    assert {name: kinds[name] for name in there} == {name: wanted[name] for name in there}
    exact = dequantised(outfile, tmp_path / "f32.gguf")
    assert_own_numbers(exact, original, chosen)
    tokens = list(range(3, 51))
    found = logits(exact, tokens, n_batch=len(tokens))
    merged = logits(in_one_tier(exact, tmp_path / "merged.gguf"), tokens, n_batch=len(tokens))
    error = float(np.square(found - merged).sum() / np.square(merged).sum())
    print(f"{name}: {chosen.fates}, NMSE {error:.1e}")
    assert error < 1e-9
    assert np.isfinite(logits(outfile, tokens, n_batch=1)).all()


def of_every_kind(spending: Spending) -> Plan:
    """A plan with whole experts of several types, thin ones and constants, in layers that all differ."""
    spec, dice = spending.spec, np.random.default_rng(1)
    size, half = spec.expert_size, spec.expert_size // 2
    choices = (
        ("q6_k", ((size, "q4_k"), (half, "q6_k")), True),
        ("q8_0", ((size, "iq4_xs"), (size, "q2_k")), False),
        ("q5_k", ((half, "q5_k"), (size, "q3_k")), True),
    )
    layers = []
    for number, layer in enumerate(spec.moe_layers):
        kind, tiers, constants = choices[number % len(choices)]
        constants = constants or spec.n_group > 1  # a table of slots is read in version 1 where some are
        ids = np.array_split(dice.permutation(spec.n_expert), 4 if constants else 3)
        kept, first, second, *rest = [tuple(sorted(part.tolist())) for part in ids]
        made = (Tier(*tiers[0][:1], first, tiers[0][1]), Tier(*tiers[1][:1], second, tiers[1][1]))
        layers.append(LayerPlan(layer, kept, rest[0] if rest else (), made, kind))
    return Plan(spec, spending.recipe, tuple(layers))


def expected_kinds(chosen: Plan) -> dict[str, str]:
    """The types of input matrices, whose rows fit every type, by the names there may be."""
    found = {}
    for layer in chosen.layers:
        for part in ("gate", "up", "gate_up"):
            name = f"blk.{layer.layer}.ffn_{part}_exps"
            found[f"{name}.weight"] = layer.kind
            found |= {
                f"{name}.t{number}.weight": tier.kind for number, tier in enumerate(layer.tiers, start=1)
            }
    return found


def assert_own_numbers(exact: Path, original: Path, chosen: Plan) -> None:
    """Assert that each whole expert's numbers are about its own, to what its type rounds."""
    mine, own = taken_apart(exact).tensors, taken_apart(original).tensors
    size, n_seen = chosen.spec.expert_size, 0
    for layer in chosen.layers:
        name = f"blk.{layer.layer}.ffn_down_exps"
        tiers = [(f"{name}.weight", layer.kept)]
        tiers += [
            (f"{name}.t{number}.weight", tier.experts)
            for number, tier in enumerate(layer.tiers, start=1)
            if tier.width == size
        ]
        for tensor, experts in tiers:
            rounded, wanted = values_of(mine[tensor]), values_of(own[f"{name}.weight"])[list(experts)]
            error = np.square(rounded - wanted).sum((1, 2)) / np.square(wanted).sum((1, 2))
            assert error.max() < 0.3, "another expert's would be about 2"
            n_seen += len(experts)
    assert n_seen


@pytest.mark.parametrize("thin", [False, True])
def test_the_bytes_are_spent(small: Path, thin: bool) -> None:
    spending, _ = spending_of(mone.load(small, device="cpu", dtype="float32"), thin=thin)
    source = spending.source
    whole = measure(source, plan_without_scores(spending.spec, Recipe.of(0)), outtype="q8_0")
    for share in (0.6, 0.8):
        items = candidates(source, spending.recipe, int(share * whole), outtype="q8_0")
        chosen, error = spending.plan(items[0], int(share * whole), mixed=True)
        size = measure(source, chosen, outtype="q8_0")
        assert 0.97 * share * whole < size < 1.01 * share * whole
        assert np.isfinite(error) and error > 0


def test_more_bytes_never_cost_more(small: Path) -> None:
    spending, _ = spending_of(mone.load(small, device="cpu", dtype="float32"), thin=False)
    whole = measure(spending.source, plan_without_scores(spending.spec, Recipe.of(0)), outtype="q8_0")
    (item,) = candidates(spending.source, spending.recipe, int(0.6 * whole), outtype="q8_0")
    errors = [spending.plan(item, int(share * whole), mixed=True)[1] for share in (0.5, 0.6, 0.7, 0.8)]
    assert errors == sorted(errors, reverse=True)
    assert spending.plan(item, int(0.6 * whole), mixed=False)[1] >= errors[1], "one type is a special case"


def test_size_is_met_from_the_command(command: Command, tmp_path: Path) -> None:
    plan, first, again = (tmp_path / name for name in ("plan.json", "first.gguf", "again.gguf"))
    command("--ratio", "0", "--outtype", "q4_k_m", "-o", tmp_path / "whole.gguf").is_fine()
    limit = int(0.95 * (tmp_path / "whole.gguf").stat().st_size)
    done = command("--fit", f"{limit}B", "--plan-out", plan, "-o", first, quiet=False)
    done.is_fine()
    assert 0.9 * limit < first.stat().st_size <= limit
    assert " whole q" in done.out and "spread " in done.out
    best = done.out.split("fits     --outtype ")[1].split(",")[0]
    status = cli.main(
        [
            *(str(command.model), "--plan", str(plan), "--outtype", best, "-o", str(again)),
            *("-f", str(command.text), *SMALL_TEXT, "-q"),
        ]
    )
    assert status == 0
    (made, tensors), (from_plan, same) = (without_command(file) for file in (first, again))
    assert tensors == same
    # a plan brings no second pass of its own
    assert {name for name in made if made[name] != from_plan[name]} == {"mone.calibration.measured"}


@pytest.mark.nightly
def test_a_plan_of_whole_experts_is_applied_without_a_calibration(command: Command, tmp_path: Path) -> None:
    plan, first, again = (tmp_path / name for name in ("plan.json", "first.gguf", "again.gguf"))
    command("--ratio", "0", "--outtype", "q8_0", "-o", tmp_path / "whole.gguf").is_fine()
    limit = int(0.97 * (tmp_path / "whole.gguf").stat().st_size)
    command("--fit", f"{limit}B", "--outtype", "q8_0", "--plan-out", plan, "-o", first).is_fine()
    value = json.loads(plan.read_text())
    for layer in value["layers"].values():
        tier = {"width": mone.inspect(command.model).expert_size, "kind": "q4_0", "experts": [*range(8, 16)]}
        layer |= {"kept": [*range(8)], "kind": "q8_0", "tiers": [tier], "pruned": []}
    value["recipe"] |= {"ratio": 0, "novice": "least-squares"}
    plan.write_text(json.dumps(value))
    options = [str(command.model), "--plan", str(plan), "-o", str(again), "-q"]
    assert cli.main([*options, "--outtype", "f16"]) == 1, "types would be lost"
    assert cli.main([*options, "--outtype", "q8_0"]) == 0
    assert keys_of(again)["mone.ratio"] == 0 and keys_of(again)["mone.format_version"] == 2
    assert not [name for name in taken_apart(again).tensors if name.endswith("ffn_down_exps.bias")]
    assert np.isfinite(logits(again, list(range(3, 40)), n_batch=37)).all()


@pytest.mark.nightly
def test_small_steps_over_a_size_are_taken_back(small: Path, text: Path, tmp_path: Path) -> None:
    whole = measure(small, plan_without_scores(mone.inspect(small), Recipe.of(0)), outtype="q4_k_m")
    stats, outfile = tmp_path / "stats", tmp_path / "x.gguf"
    for limit in range(int(0.8 * whole), int(0.8 * whole) + 8000, 1100):
        report = mone.export(
            small,
            fit=limit,
            outfile=outfile,
            stats=stats,
            files=[text],
            n_row=2,
            seq_len=32,
            with_imatrix=False,
        )
        assert report is not None and 0.95 * limit < outfile.stat().st_size == report.size <= limit


def test_a_name_that_says_what_was_chosen_replaces_no_strangers_file(
    command: Command, tmp_path: Path
) -> None:
    command("--ratio", "0", "--outtype", "q8_0", "-o", tmp_path / "whole.gguf").is_fine()
    limit = int(0.97 * (tmp_path / "whole.gguf").stat().st_size)
    folder = tmp_path / "out"
    folder.mkdir()
    command("--fit", f"{limit}B", "-o", folder).is_fine()
    (made,) = folder.iterdir()
    made.write_text("a stranger's")
    command("--fit", f"{limit}B", "-o", folder).is_one_line("exists and is no file of mone-export")
    assert made.read_text() == "a stranger's"


def test_a_score_that_is_named_decides(command: Command, tmp_path: Path) -> None:
    for score in ("reap", "mone"):
        command("--score", score, "-o", tmp_path / f"{score}.gguf").is_fine()
    assert keys_of(tmp_path / "reap.gguf")["mone.novice"] == "least-squares"
    orders = [keys_of(tmp_path / f"{score}.gguf")["mone.expert_order"] for score in ("reap", "mone")]
    assert orders[0] != orders[1]


def test_a_size_that_experts_cannot_have_is_refused(command: Command, tmp_path: Path) -> None:
    command("--fit", "20K", "-o", tmp_path / "x.gguf").is_one_line("nothing fits")


def test_statistics_alone_are_enough_for_types(command: Command, tmp_path: Path) -> None:
    stats = ("--stats", tmp_path / "stats")
    command("--ratio", "0.5", *stats, "-o", tmp_path / "half.gguf").is_fine()
    limit = int(0.7 * (tmp_path / "half.gguf").stat().st_size)
    options = ("--fit", f"{limit}B", *stats)
    dry = command(*options, "--dry-run", text="", quiet=False)
    dry.is_fine()
    assert "none is thin: they take the text of the statistics once more" in dry.err
    done = command(*options, "-o", tmp_path / "fits.gguf", text="", quiet=False)
    done.is_fine()
    assert "types by expert" in done.out and "mone-llama path" in done.out
    said = [re.findall(r"size .*\((\d+) bytes\)", each.out) for each in (dry, done)]
    assert said == [[str((tmp_path / "fits.gguf").stat().st_size)]] * 2
    assert re.search(r"layer +0  .*whole q", dry.out)
