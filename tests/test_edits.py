"""What becomes of each tensor, by its name: on a small GGUF that is copied, and on tensors alone.

Neither a converter nor llama.cpp runs here, so each test takes some hundredths of a second.
"""

import errno
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf_parts import Parts, Stored, key, put_together
from torch import Tensor

from mone_export.artifacts import Calibration, ExpertStats, LayerPlan, MoeSpec, Plan, Scores, Tier
from mone_export.calibration.sums import expert_stats
from mone_export.errors import MoneError
from mone_export.output import writing
from mone_export.output.importance import Rounding
from mone_export.output.packing import Rounded
from mone_export.output.thin_experts import Thinner
from mone_export.output.writing import (
    Edits,
    Layout,
    importances,
    layouts,
    measure,
    ordinary_widths,
    packed_together,
    stored_novices,
    temporary_folder,
    write,
)
from mone_export.pruning.novices import novices
from mone_export.pruning.planning import plan, plan_without_scores
from mone_export.recipe import Recipe
from mone_export.source import GgufFile, open_source
from mone_export.source.ggml import packed as pack
from mone_export.source.gguf_conversion import GgufConversion

ARCH, N_EXPERT, D, SIZE = "qwen3moe", 6, 32, 64
SPEC = MoeSpec(ARCH, 3, (1, 2), N_EXPERT, 2, 1, D, SIZE)
ORDER = {1: (1, 3, 5, 0, 2, 4), 2: (0, 2, 4, 1, 3, 5)}  # by the scores below, half of the experts pruned
SCORES = torch.tensor([[0, 5, 1, 6, 2, 7], [7, 2, 6, 1, 5, 0]], dtype=torch.float64)


def stored(name: str, *shape: int) -> Stored:
    """Random numbers of a shape in ggml's order, others for each name; experts resemble each other."""
    random = np.random.default_rng([*name.encode()])
    values = random.standard_normal(shape[::-1], np.float32)
    if len(shape) == 3:
        values = values[0] + values / 4
    return Stored(GGMLQuantizationType.F32, shape, values.tobytes())


def of_layer(layer: int, *more: str) -> dict[str, Stored]:
    shapes: dict[str, tuple[int, ...]] = {
        "attn_q.weight": (D, D),
        "ffn_gate_inp.weight": (D, N_EXPERT),
        "exp_probs_b.bias": (N_EXPERT,),
        "ffn_gate_exps.weight": (D, SIZE, N_EXPERT),
        "ffn_up_exps.weight": (D, SIZE, N_EXPERT),
        "ffn_down_exps.weight": (SIZE, D, N_EXPERT),
    }
    further: dict[str, tuple[int, ...]] = {
        "ffn_gate_exps.bias": (SIZE, N_EXPERT),
        "ffn_down_exps.bias": (D, N_EXPERT),
        "ffn_down_exps.scale": (N_EXPERT,),
        "ffn_up_shexp.weight": (D, SIZE),
        "ffn_up.weight": (D, SIZE),
        "ffn_gate_chexps.weight": (D, SIZE, N_EXPERT),
    }
    names = {f"blk.{layer}.{name}": shape for name, shape in (shapes | {n: further[n] for n in more}).items()}
    return {name: stored(name, *shape) for name, shape in names.items()}


def parts(*more: str, **keys: Any) -> Parts:
    """A model of a dense layer and two of experts; `more` names tensors that both of these have besides."""
    tensors = {"token_embd.weight": stored("token_embd.weight", D, 8)}
    tensors |= of_layer(1, *more) | of_layer(2, *more)
    tensors["output.weight"] = stored("output.weight", D, 8)
    numbers = {
        "block_count": 3,
        "expert_count": N_EXPERT,
        "expert_used_count": 2,
        "expert_feed_forward_length": SIZE,
    }
    values = {f"{ARCH}.{name}": value for name, value in (numbers | keys).items()}
    own = {"general.architecture": key("general.architecture", ARCH)}
    return Parts(own | {name: key(name, value) for name, value in values.items()}, tensors)


def saved(folder: Path, *more: str, **keys: Any) -> Path:
    file = folder / "tiny.gguf"
    file.write_bytes(put_together(parts(*more, **keys)))
    return file


def read(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a file, in numpy's order of dimensions, and its keys."""
    reader = GGUFReader(file)
    tensors = {each.name: np.array(each.data).reshape(each.shape[::-1]) for each in reader.tensors}
    return tensors, {name: each.contents() for name, each in reader.fields.items()}


def statistics(spec: MoeSpec = SPEC) -> Calibration:
    random = torch.Generator().manual_seed(0)
    count = torch.arange(2, 2 + N_EXPERT)
    n = int(count.sum())

    def one() -> ExpertStats:
        outputs, gates = torch.randn(n, D, generator=random), torch.rand(n, generator=random)
        return expert_stats(outputs, gates, count, n_token=20)

    return Calibration(spec, "m" * 64, "t" * 64, "text", 20, {layer: one() for layer in spec.moe_layers})


STATISTICS = statistics()


def half(spec: MoeSpec = SPEC, **choices: Any) -> Plan:
    scores = Scores(spec, "error", SCORES, STATISTICS)
    even = {} if choices.get("method", "mone") != "mone" else {"allocation": "even"}
    return plan(scores, ratio=0.5, **even, **choices)


def narrow(width: int = 16, kept: tuple[int, ...] = (1, 3, 5)) -> Plan:
    layers = tuple(
        LayerPlan(layer, kept, tuple(e for e in range(N_EXPERT) if e not in kept)) for layer in (1, 2)
    )
    return Plan(SPEC, Recipe.of(0.5, method="narrow"), layers, width=width)


def tiered(*tiers: Tier) -> Plan:
    """Layer 1: two whole, the tiers, the rest constants; layer 2 stays whole."""
    used = {expert for tier in tiers for expert in tier.experts}
    pruned = tuple(e for e in (0, 2, 4, 5) if e not in used)
    layers = LayerPlan(1, (1, 3), pruned, tiers), LayerPlan(2, tuple(range(N_EXPERT)), ())
    return Plan(SPEC, Recipe.of(0.5, novice="thin"), layers)


class Fixed(Thinner):
    """A thinner that keeps an expert's last channels, and doubles what its down projection has of them."""

    def __init__(self) -> None:
        super().__init__({}, Path())

    def constant(self, layer: int, expert: int, width: int) -> Tensor:
        return torch.full((D,), float(100 * layer + expert))

    def channels(self, layer: int, expert: int, width: int) -> Tensor:
        return torch.arange(SIZE - width, SIZE)

    def down(self, layer: int, expert: int, width: int, whole: Tensor) -> Tensor:
        return 2 * whole[:, -width:].double()


def test_a_pruned_file_is_the_format(tmp_path: Path) -> None:
    source = saved(tmp_path)
    chosen = half()
    size = write(source, STATISTICS, chosen, tmp_path / "out.gguf")
    assert size == (tmp_path / "out.gguf").stat().st_size
    before, now = read(source)[0], read(tmp_path / "out.gguf")[0]
    for layer, order in ORDER.items():
        prefix = f"blk.{layer}."
        kept, pruned = list(order[:3]), list(order[3:])
        wanted = dict(before)
        for name in ("gate", "up", "down"):
            wanted[f"{prefix}ffn_{name}_exps.weight"] = before[f"{prefix}ffn_{name}_exps.weight"][kept]
        for name in ("ffn_gate_inp.weight", "exp_probs_b.bias"):
            wanted[prefix + name] = before[prefix + name][kept + pruned]
        rows = np.zeros((N_EXPERT, D), np.float32)
        rows[3:] = novices(STATISTICS.layers[layer], "least-squares").float().numpy()[pruned]
        wanted[f"{prefix}ffn_down_exps.bias"] = rows
        own = [name for name in wanted if name.startswith(prefix)]
        assert {name for name in now if name.startswith(prefix)} == {*own}
        for name in own:
            assert np.array_equal(now[name], wanted[name]), name
    assert np.array_equal(now["output.weight"], before["output.weight"])


def test_its_keys_say_what_was_done(tmp_path: Path) -> None:
    source = saved(tmp_path)
    write(
        source,
        STATISTICS,
        half(),
        tmp_path / "out.gguf",
        outtype=Rounding("auto", stated={"mone.options": ("STRING", "x")}),
    )
    keys = read(tmp_path / "out.gguf")[1]
    assert keys[f"{ARCH}.expert_kept_count"] == [0, 3, 3]
    assert keys["mone.expert_order"] == [*ORDER[1], *ORDER[2]]
    assert keys[f"{ARCH}.expert_count"] == N_EXPERT
    assert keys["mone.source.name"] == "tiny" and keys["mone.source.sha256"] == GgufFile(source).fingerprint()
    assert (keys["mone.calibration.sha256"], keys["mone.calibration.tokens"]) == ("t" * 64, 20)
    assert len(keys["mone.calibration.measured"]) == 64 and keys["mone.options"] == "x"
    assert keys["mone.novice"] == "least-squares" and keys["mone.format_version"] == 1
    assert f"{ARCH}.expert_tier_count" not in keys
    write(source, None, replace(half(), recipe=Recipe.of(0.5)), tmp_path / "out.gguf")
    assert "mone.calibration.sha256" not in read(tmp_path / "out.gguf")[1]
    write(source, STATISTICS, half(method="drop", score="random"), tmp_path / "out.gguf")
    assert "mone.calibration.sha256" not in read(tmp_path / "out.gguf")[1], "nothing follows from it"


def test_nothing_pruned_changes_no_tensor_and_no_key_of_its_own(tmp_path: Path) -> None:
    source = saved(tmp_path)
    write(source, STATISTICS, plan_without_scores(SPEC, Recipe.of(0)), tmp_path / "out.gguf")
    before, now = read(source), read(tmp_path / "out.gguf")
    assert [*before[0]] == [*now[0]]
    assert all(np.array_equal(now[0][name], before[0][name]) for name in now[0])
    assert {name for name in now[1] if name not in before[1]} == {
        *("mone.format_version", "mone.ratio", "mone.tool_version", "mone.source.name", "mone.source.sha256")
    }


@pytest.mark.parametrize("method", ["drop", "dern"])
def test_ordinary_files_have_fewer_rows_in_the_router(tmp_path: Path, method: str) -> None:
    source = saved(tmp_path)
    write(source, STATISTICS, half(method=method, score="reap"), tmp_path / "out.gguf")
    before, now = read(source)[0], read(tmp_path / "out.gguf")
    assert [*now[0]] == [*before]
    assert now[1][f"{ARCH}.expert_count"] == 3 and now[1][f"{ARCH}.expert_feed_forward_length"] == SIZE
    assert f"{ARCH}.expert_kept_count" not in now[1] and "mone.expert_order" not in now[1]
    for layer, order in ORDER.items():
        kept = list(order[:3])
        name = f"blk.{layer}.ffn_gate_inp.weight"
        assert np.array_equal(now[0][name], before[name][kept])
        same = np.array_equal(
            now[0][f"blk.{layer}.ffn_up_exps.weight"], before[f"blk.{layer}.ffn_up_exps.weight"][kept]
        )
        assert same == (method == "drop")


def test_new_experts_are_made_by_what_experts_were_used(tmp_path: Path) -> None:
    assert importances(None) == {}
    found = importances(STATISTICS)
    assert (
        all(torch.equal(found[n], at.gate_sum / 20) for n, at in STATISTICS.layers.items())
        and len(found) == 2
    )
    source, files = saved(tmp_path), []
    skewed = {
        n: replace(at, gate_sum=at.gate_sum * torch.arange(1, 7) ** 3) for n, at in STATISTICS.layers.items()
    }
    for number, used in enumerate((STATISTICS, replace(STATISTICS, layers=skewed))):
        write(source, used, half(method="dern", score="reap"), tmp_path / f"{number}.gguf")
        files.append(read(tmp_path / f"{number}.gguf")[0]["blk.1.ffn_up_exps.weight"])
    assert not np.array_equal(*files)


def test_biases_stay_with_kept_experts(tmp_path: Path) -> None:
    source = saved(tmp_path, "ffn_gate_exps.bias", "ffn_down_exps.bias")
    write(source, STATISTICS, half(), tmp_path / "out.gguf")
    before, now = read(source)[0], read(tmp_path / "out.gguf")[0]
    for layer, order in ORDER.items():
        kept, pruned = list(order[:3]), list(order[3:])
        gate, down = (f"blk.{layer}.ffn_{name}_exps.bias" for name in ("gate", "down"))
        stand_ins = novices(STATISTICS.layers[layer], "least-squares").float().numpy()
        assert np.array_equal(now[gate], np.concatenate([before[gate][kept], np.zeros((3, SIZE))]))
        assert np.array_equal(now[down], np.concatenate([before[down][kept], stand_ins[pruned]]))


def test_scales_of_pruned_experts_are_one(tmp_path: Path) -> None:
    source = saved(tmp_path, "ffn_down_exps.scale")
    write(source, STATISTICS, half(), tmp_path / "out.gguf")
    before, now = read(source)[0], read(tmp_path / "out.gguf")[0]
    name = "blk.2.ffn_down_exps.scale"
    assert np.array_equal(now[name], np.concatenate([before[name][[0, 2, 4]], np.ones(3)]))


def test_routing_by_groups_keeps_its_numbers(tmp_path: Path) -> None:
    source = saved(tmp_path, expert_group_count=2, expert_group_used_count=2)
    spec = replace(SPEC, n_group=2, topk_group=2)
    assert GgufFile(source).spec == spec
    chosen = half(spec)
    write(source, STATISTICS, chosen, tmp_path / "out.gguf")
    before, now = read(source)[0], read(tmp_path / "out.gguf")[0]
    for layer in chosen.layers:
        prefix = f"blk.{layer.layer}."
        for name in ("ffn_gate_inp.weight", "exp_probs_b.bias"):
            assert np.array_equal(now[prefix + name], before[prefix + name]), (
                "an expert's number is its group"
            )
        slots = now[f"{prefix}ffn_exps_slot"]
        assert slots.dtype == np.int32 and slots.shape == (N_EXPERT, 1)
        assert [layer.order[slot] for slot in slots[:, 0]] == list(range(N_EXPERT))


def test_groups_that_the_file_would_not_have_are_refused(tmp_path: Path) -> None:
    class Other(GgufFile):
        spec = replace(SPEC, n_group=2, topk_group=2)

    with pytest.raises(MoneError) as error:
        write(Other(saved(tmp_path)), STATISTICS, half(Other.spec), tmp_path / "out.gguf")
    assert str(error.value) == (
        "qwen3moe chooses experts in 2 groups, the file would in 1: llama.cpp would route differently from "
        "the model"
    )


def test_a_file_is_pruned_once_more(tmp_path: Path) -> None:
    """What was a constant stays that one, with its number; the order is of the first model's ids."""
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    write(saved(tmp_path), STATISTICS, half(), first)
    source = GgufFile(first)
    assert source.spec.kept_before == (3, 3)
    again = Plan(
        source.spec,
        Recipe.of(1 / 3, allocation="even"),
        (LayerPlan(1, (0, 2), (1, 3, 4, 5)), LayerPlan(2, (0, 1), (2, 3, 4, 5))),
    )
    other = replace(
        statistics(source.spec), layers={n: at.reweighted(2.0) for n, at in STATISTICS.layers.items()}
    )
    write(source, other, again, second)
    before, now = read(first), read(second)
    assert now[1][f"{ARCH}.expert_kept_count"] == [0, 2, 2]
    # in layer 1 the file's 0, 1, 2 were 1, 3, 5; what is pruned now goes where its own number belongs
    assert now[1]["mone.expert_order"] == [1, 5, 0, 2, 3, 4, 0, 2, 1, 3, 4, 5]
    bias, then = now[0]["blk.1.ffn_down_exps.bias"], before[0]["blk.1.ffn_down_exps.bias"]
    new = novices(other.layers[1], "least-squares").float().numpy()[1]
    wanted = np.stack([np.zeros(D), np.zeros(D), then[3], then[4], new, then[5]]).astype(np.float32)
    assert np.array_equal(bias, wanted)
    assert np.array_equal(now[0]["blk.1.ffn_up_exps.weight"], before[0]["blk.1.ffn_up_exps.weight"][[0, 2]])


def test_slots_lead_from_the_first_numbers_after_two_prunings(tmp_path: Path) -> None:
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    spec = replace(SPEC, n_group=2, topk_group=2)
    write(saved(tmp_path, expert_group_count=2, expert_group_used_count=2), STATISTICS, half(spec), first)
    source = GgufFile(first)
    layers = (LayerPlan(1, (0, 2), (1, 3, 4, 5)), LayerPlan(2, (0, 1), (2, 3, 4, 5)))
    write(
        source, STATISTICS, Plan(source.spec, Recipe.of(1 / 3, allocation="even", min_kept=1), layers), second
    )
    tensors, keys = read(second)
    order = keys["mone.expert_order"][:N_EXPERT]
    assert [order[slot] for slot in tensors["blk.1.ffn_exps_slot"][:, 0]] == list(range(N_EXPERT))


@pytest.mark.parametrize("outtype", ["auto"])
@pytest.mark.parametrize("choices", [{}, {"method": "drop"}, {"method": "dern"}, {"novice": "mean"}])
def test_the_size_is_known_before(tmp_path: Path, choices: dict[str, Any], outtype: str) -> None:
    source, stated = saved(tmp_path), {"mone.options": ("STRING", "a command")}
    rounding = Rounding(outtype, stated=stated)
    size = write(source, STATISTICS, half(**choices), tmp_path / "out.gguf", outtype=rounding)
    assert measure(source, half(**choices), outtype=rounding) == size
    assert measure(source, half(**choices), outtype=outtype) != size, "the command takes some bytes"
    assert measure(source, half(**choices)) == measure(source, half(**choices), outtype=outtype)


def test_a_layout_is_the_file_before_it_is_written(tmp_path: Path) -> None:
    source = open_source(saved(tmp_path))
    found = layouts(source, half(), ("auto",))["auto"]
    size = write(source, STATISTICS, half(), tmp_path / "out.gguf")
    tensors = read(tmp_path / "out.gguf")[0]
    assert found.shapes == {name: values.shape for name, values in tensors.items()}
    assert {*found.types.values()} == {"f32"} and found.types.keys() == tensors.keys()
    assert found.added == {"blk.1.ffn_down_exps.bias", "blk.2.ffn_down_exps.bias"}
    assert found.size == size
    other = {1: (0, 1, 3, 5), 2: (2,)}
    fewer = tuple(LayerPlan(n, kept, tuple({*range(N_EXPERT)} - {*kept})) for n, kept in other.items())
    changed = write(source, STATISTICS, replace(half(), layers=fewer), tmp_path / "fewer.gguf")
    assert abs(found.with_kept({1: 4, 2: 1}).size - changed) == 0
    assert found.with_kept({2: 3}) == found and found.with_kept({}).shapes == found.shapes
    whole = layouts(source, plan_without_scores(SPEC, Recipe.of(0)), ("auto",))["auto"]
    assert found.size_with_all(SPEC) - found.head_size == whole.size - whole.head_size
    assert whole.size_with_all(SPEC) == whole.size
    before = replace(SPEC, kept_before=(4, 5))
    less = 2 * 3 * D * SIZE * 4 + 1 * 3 * D * SIZE * 4
    assert found.size_with_all(SPEC) - found.size_with_all(before) == less, "the router is as wide as ever"


def test_a_router_of_one_row_is_widened_where_its_experts_are() -> None:
    """An ordinary file has as many as it has experts, along the other axis where the router is one row."""
    shapes = {
        "blk.1.ffn_gate_inp.weight": (1, 3),
        "blk.1.exp_probs_b.bias": (3,),
        "blk.0.ffn_up.weight": (5, 8),
    }
    layout = Layout(1000, shapes, dict.fromkeys(shapes, "f32"))
    # each of 6 numbers of 4 bytes, and 40, padded to 32 bytes
    assert layout.size == 1000 + 32 + 32 + 160
    wide = replace(SPEC, n_expert=20)
    assert layout.size_with_all(wide) == 1000 + 96 + 96 + 160
    away = replace(SPEC, n_expert=20, moe_layers=(2,))
    assert layout.size_with_all(away) == layout.size, "a layer that is none of the model's own stays"


WEIGHED = "blk.1.ffn_up_exps.weight"


class Quantizer:
    """In the place of llama-quantize: notes what it is asked, and gives matrices a type."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, Mapping[str, str], bool]] = []
        monkeypatch.setattr(writing, "quantized_types", self.types)
        monkeypatch.setattr(writing, "importance_matrix", self.matrix)

    def types(
        self, head: Path, outtype: str, *, kinds: Mapping[str, str], imatrix: Path | None
    ) -> dict[str, str]:
        tensors = GgufFile(head).header.tensors  # insists that the file is as long as it says
        assert imatrix is None or imatrix.exists()
        self.asked.append((outtype, kinds, imatrix is not None))
        return {name: kinds.get(name, self.kind(name, info.shape)) for name, info in tensors.items()}

    @staticmethod
    def kind(name: str, shape: Sequence[int]) -> str:
        return "q8_0" if name.endswith(".weight") and shape[1:] and shape[0] % 32 == 0 else "f32"

    def matrix(self, shapes: Mapping[str, Any], *given: Any, thinner: Any) -> dict[str, np.ndarray]:
        self.given = given
        if not given[-1].with_imatrix:
            return {}
        n_matrix, _, n_column = shapes[WEIGHED]
        return {WEIGHED: np.geomspace(1, 9, n_matrix * n_column, dtype=np.float32).reshape(n_matrix, -1)}


def show(*_: Any) -> None:
    """Stand in for what shows progress."""


@pytest.mark.upstream
@pytest.mark.parametrize("n_thread", [1, 3])
def test_other_types_are_made_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, n_thread: int
) -> None:
    there = Quantizer(monkeypatch)
    monkeypatch.setattr(writing, "Rounded", partial(Rounded, n_thread=n_thread))
    source, rounding = saved(tmp_path), Rounding("q4_0", with_imatrix=True)
    shown: list[tuple[int, int, str]] = []
    out, whole = tmp_path / "out.gguf", tmp_path / "whole.gguf"
    write(source, STATISTICS, half(), out, outtype=rounding, progress=lambda *step: shown.append(step))
    assert there.given[1:] == (STATISTICS, half(), rounding) and there.given[0].path == source
    assert {what for _, _, what in shown} == {"reading the model (MiB)", "writing (MiB)"}
    write(source, STATISTICS, half(), whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "tiny.gguf", "whole.gguf"]
    made, plain = (GgufFile(path).header.tensors for path in (out, whole))
    assert [*made] == [*plain]
    weights = there.matrix({name: info.shape[::-1] for name, info in plain.items()}, rounding, thinner=None)
    for name, info in plain.items():
        data = info.read(info.size)
        if made[name].kind == "q8_0":
            stack = np.frombuffer(data, np.float32).reshape(-1, *info.shape[1::-1])
            each = weights.get(name, [None] * len(stack))
            pairs = zip(stack, each, strict=True)
            data = b"".join(pack(part, "q8_0", weight).tobytes() for part, weight in pairs)
        assert made[name].read(made[name].size) == data, name
    keys = {key: GgufFile(out).header.value(key) for key in GgufFile(out).header.keys}
    assert (keys["general.file_type"], keys["general.quantization_version"]) == (2, 2)
    assert keys["quantize.imatrix.entries_count"] == 1 and keys["quantize.imatrix.chunks_count"] == 1
    assert keys["quantize.imatrix.file"] == "imatrix.gguf"
    assert not caplog.records
    monkeypatch.setattr(GgufFile, "packed", "q4_k")
    write(source, STATISTICS, half(), out, outtype="q6_k")
    assert caplog.messages == [
        "tiny is rounded to q4_k already, and --outtype q6_k rounds it once more: a copy in F16 or BF16 "
        "would lose less"
    ]


@pytest.mark.upstream
def test_a_plan_may_give_experts_types_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Quantizer(monkeypatch)
    tiers = Tier(SIZE, (0, 2), "q4_0"), Tier(SIZE, (4,))
    chosen = tiered(*tiers)
    layers = (replace(chosen.layers[0], kind="q5_0"), chosen.layers[1])
    chosen = replace(chosen, layers=layers)
    kinds = {}
    for name in ("gate", "up", "down"):
        kinds[f"blk.1.ffn_{name}_exps.weight"] = "q5_0"
        kinds[f"blk.1.ffn_{name}_exps.t1.weight"] = "q4_0"
    write(saved(tmp_path), STATISTICS, chosen, tmp_path / "out.gguf", outtype="q8_0", novices=Fixed())
    made = GgufFile(tmp_path / "out.gguf").header.tensors
    assert {name: made[name].kind for name in kinds} == kinds
    assert there.asked == [("q8_0", kinds, False)]


@pytest.mark.parametrize("imatrix", [False, True])
def test_types_are_asked_for_once_and_sizes_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, imatrix: bool
) -> None:
    there = Quantizer(monkeypatch)
    source = open_source(saved(tmp_path))
    found = layouts(source, half(), ("q8_0", "auto", "q4_0"), imatrix=imatrix)
    assert sorted(there.asked) == [("q4_0", {}, imatrix), ("q8_0", {}, imatrix)]
    plain, packed = found["auto"], found["q8_0"]
    assert found.keys() == {"auto", "q8_0", "q4_0"}
    assert packed.shapes == plain.shapes and packed.added == plain.added
    assert (
        packed.types["blk.1.ffn_up_exps.weight"] == "q8_0" and packed.types["blk.1.exp_probs_b.bias"] == "f32"
    )
    data = {
        name: np.prod(shape) // 32 * 34 if packed.types[name] == "q8_0" else np.prod(shape) * 4
        for name, shape in packed.shapes.items()
    }
    assert packed.size - packed.head_size == sum(-(-int(size) // 32) * 32 for size in data.values())
    # the keys that llama-quantize states, and those of an importance matrix
    numbers = {"general.quantization_version": 4, "general.file_type": 4}
    texts = {"quantize.imatrix.file": 8 + 12, "quantize.imatrix.dataset": 8 + 11}
    texts |= {"quantize.imatrix.entries_count": 4, "quantize.imatrix.chunks_count": 4}
    stated = numbers | (texts if imatrix else {})
    more = sum(12 + len(name) + size for name, size in stated.items())
    assert packed.head_size - plain.head_size in {more // 32 * 32, -(-more // 32) * 32}
    fewer = {1: 1, 2: 2}
    assert packed.with_kept(fewer).size < packed.size
    with_matrix = layouts(source, half(), ("q8_0",), imatrix=True)["q8_0"]
    assert measure(source, half(), outtype=Rounding("q8_0", with_imatrix=True)) == with_matrix.size


def test_types_of_another_plan_are_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Quantizer(monkeypatch)
    source = open_source(saved(tmp_path))
    more = layouts(source, half(), ("q8_0",))["q8_0"]
    there.asked.clear()
    less = plan_without_scores(SPEC, Recipe.of(0))
    found = layouts(source, less, ("q8_0",), types={"q8_0": more.types})["q8_0"]
    assert not there.asked
    assert found.types == {name: kind for name, kind in more.types.items() if name not in more.added}


def head_sizes(source: Any, chosen: Plan, outtype: str, *, imatrix: bool = False) -> list[int]:
    """The padded heads of files that differ in the length of a key: where they jump says how long each is."""
    keys = [{"mone.options": ("STRING", "x" * n)} for n in range(33)]
    found = [layouts(source, chosen, (outtype,), imatrix=imatrix, stated=stated) for stated in keys]
    return [each[outtype].head_size for each in found]


def length(sizes: list[int]) -> int:
    """How long the first of the heads is before it is padded."""
    n = next(n for n in range(1, 33) if sizes[n] > sizes[n - 1])
    return sizes[0] - (n - 1)


@pytest.mark.parametrize("own", [{}, {"file": "a file of a longer name.gguf", "entries_count": 7}])
def test_the_head_says_which_importance_matrix_there_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: dict[str, Any]
) -> None:
    """Four keys of llama-quantize's own, in place of those that the model has of an earlier matrix."""
    Quantizer(monkeypatch)
    file, model = saved(tmp_path), parts()
    added = {f"quantize.imatrix.{name}": value for name, value in own.items()}
    stored_keys = {name: key(name, value, integer=5) for name, value in added.items()}
    file.write_bytes(put_together(replace(model, keys=model.keys | stored_keys)))
    texts = {"file": 8 + len("imatrix.gguf"), "dataset": 8 + len("calibration"), "entries_count": 4}
    more = sum(12 + len(f"quantize.imatrix.{name}") + n for name, n in (texts | {"chunks_count": 4}).items())
    more -= sum(len(each) for each in stored_keys.values())
    sizes = head_sizes(open_source(file), half(), "q8_0", imatrix=True)
    assert length(sizes) - length(head_sizes(open_source(file), half(), "q8_0")) == more


def test_narrow_experts_make_an_ordinary_file(tmp_path: Path) -> None:
    source = saved(tmp_path)
    write(source, STATISTICS, narrow(), tmp_path / "out.gguf", novices=Fixed())
    before, (now, keys) = read(source)[0], read(tmp_path / "out.gguf")
    assert [*now] == [*before], "no tensor is added"
    kept = [1, 3, 5]
    for name in ("gate", "up"):
        wanted = before[f"blk.1.ffn_{name}_exps.weight"][kept][:, -16:]
        assert np.array_equal(now[f"blk.1.ffn_{name}_exps.weight"], wanted)
    assert np.array_equal(
        now["blk.1.ffn_down_exps.weight"], 2 * before["blk.1.ffn_down_exps.weight"][kept][..., -16:]
    )
    assert np.array_equal(now["blk.1.ffn_gate_inp.weight"], before["blk.1.ffn_gate_inp.weight"][kept])
    assert keys[f"{ARCH}.expert_feed_forward_length"] == 16 and keys[f"{ARCH}.expert_count"] == 3
    assert f"{ARCH}.expert_kept_count" not in keys
    whole = narrow(kept=tuple(range(N_EXPERT)))
    write(source, STATISTICS, whole, tmp_path / "all.gguf", novices=Fixed())
    assert read(tmp_path / "all.gguf")[1][f"{ARCH}.expert_feed_forward_length"] == 16, (
        "narrow, though all stay"
    )


def test_biases_of_narrow_experts_are_of_their_channels(tmp_path: Path) -> None:
    source = saved(tmp_path, "ffn_gate_exps.bias", "ffn_down_exps.bias")
    write(source, STATISTICS, narrow(), tmp_path / "out.gguf", novices=Fixed())
    before, now = read(source)[0], read(tmp_path / "out.gguf")[0]
    assert np.array_equal(
        now["blk.1.ffn_gate_exps.bias"], before["blk.1.ffn_gate_exps.bias"][[1, 3, 5]][:, -16:]
    )
    assert np.array_equal(now["blk.1.ffn_down_exps.bias"], before["blk.1.ffn_down_exps.bias"][[1, 3, 5]])


def test_tiers_have_tensors_of_their_own(tmp_path: Path) -> None:
    source = saved(tmp_path, "ffn_gate_exps.bias")
    chosen = tiered(Tier(SIZE, (4,)), Tier(16, (0, 2)))
    write(source, STATISTICS, chosen, tmp_path / "out.gguf", novices=Fixed())
    before, (now, keys) = read(source)[0], read(tmp_path / "out.gguf")
    assert keys[f"{ARCH}.expert_kept_count"] == [0, 2, 0]
    assert keys[f"{ARCH}.expert_tier_count"] == 2 and keys[f"{ARCH}.expert_tier_sizes"] == [0, 0, 1, 2, 0, 0]
    assert keys["mone.expert_order"] == [1, 3, 4, 0, 2, 5] and keys["mone.format_version"] == 2
    up, down = "blk.1.ffn_up_exps", "blk.1.ffn_down_exps"
    assert np.array_equal(now[f"{up}.weight"], before[f"{up}.weight"][[1, 3]])
    assert np.array_equal(now[f"{up}.t1.weight"], before[f"{up}.weight"][[4]])
    assert np.array_equal(now[f"{up}.t2.weight"], before[f"{up}.weight"][[0, 2]][:, -16:])
    assert np.array_equal(now[f"{down}.t2.weight"], 2 * before[f"{down}.weight"][[0, 2]][..., -16:])
    constant = novices(STATISTICS.layers[1], "least-squares").float().numpy()[5]
    wanted = np.stack([np.zeros(D), np.zeros(D), np.zeros(D), np.full(D, 100), np.full(D, 102), constant])
    assert np.array_equal(now[f"{down}.bias"], wanted.astype(np.float32))
    gate = "blk.1.ffn_gate_exps.bias"
    rows = np.zeros((N_EXPERT, SIZE), np.float32)
    rows[:3], rows[3, :16], rows[4, :16] = (
        before[gate][[1, 3, 4]],
        before[gate][0, -16:],
        before[gate][2, -16:],
    )
    assert np.array_equal(now[gate], rows)
    assert np.array_equal(now["blk.2.ffn_up_exps.weight"], before["blk.2.ffn_up_exps.weight"]), "all stay"
    found = layouts(open_source(source), chosen, ("auto",))["auto"]
    tiers = {f"blk.1.ffn_{name}_exps.t{n}.weight" for name in ("gate", "up", "down") for n in (1, 2)}
    assert found.added == tiers | {f"{down}.bias"}


def test_whole_tiers_keep_their_own_biases(tmp_path: Path) -> None:
    source = saved(tmp_path, "ffn_down_exps.bias")
    chosen = tiered(Tier(SIZE, (4,)), Tier(16, (0, 2)))
    write(source, STATISTICS, chosen, tmp_path / "out.gguf", novices=Fixed())
    name = "blk.1.ffn_down_exps.bias"
    before, now = read(source)[0][name], read(tmp_path / "out.gguf")[0][name]
    constant = novices(STATISTICS.layers[1], "least-squares").float().numpy()[5]
    wanted = [before[1], before[3], before[4], np.full(D, 100), np.full(D, 102), constant]
    assert np.array_equal(now, np.stack(wanted).astype(np.float32))


def test_biases_of_tiers_are_taken_from_lazy_tensors() -> None:
    edits = Edits(tiered(Tier(SIZE, (4,)), Tier(16, (0,))), BLANK, {}, Fixed())
    bias = lazy(N_EXPERT, SIZE)
    found = edits.edit("blk.1.ffn_gate_exps.bias", bias)
    wanted = torch.zeros(N_EXPERT, SIZE)
    wanted[:3], wanted[3, :16] = bias[[1, 3, 4]], bias[0, -16:]
    assert torch.equal(found, wanted)


def test_a_layer_that_was_whole_is_pruned_in_its_own_order(tmp_path: Path) -> None:
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    chosen = replace(half(), layers=(half().layers[0], LayerPlan(2, tuple(range(N_EXPERT)), ())))
    write(saved(tmp_path), STATISTICS, chosen, first)
    source = GgufFile(first)
    assert source.spec.kept_before == (3, 6)
    layers = LayerPlan(1, (0, 1, 2), (3, 4, 5)), half().layers[1]
    again = Plan(source.spec, Recipe.of(1 / 4, allocation="even"), layers)
    write(source, statistics(source.spec), again, second)
    assert read(second)[1]["mone.expert_order"] == [*ORDER[1], *ORDER[2]]


def test_whole_tiers_alone_need_no_constants(tmp_path: Path) -> None:
    """All experts are whole, in two types: the order changes, nothing is added to any output."""
    chosen = tiered(Tier(SIZE, (0, 2, 4, 5)))
    write(saved(tmp_path), None, chosen, tmp_path / "out.gguf")
    now, keys = read(tmp_path / "out.gguf")
    assert "blk.1.ffn_down_exps.bias" not in now and keys["mone.expert_order"] == [1, 3, 0, 2, 4, 5]
    empty = stored_novices(None, chosen, open_source(saved(tmp_path)), None)
    assert empty.keys() == {1} and empty[1].shape == (N_EXPERT, D) and not empty[1].any()
    thin = tiered(Tier(16, (0, 2, 4, 5)))
    write(saved(tmp_path), STATISTICS, thin, tmp_path / "out.gguf", novices=Fixed())
    assert "blk.1.ffn_down_exps.bias" in read(tmp_path / "out.gguf")[0], (
        "what is left out of thin ones is there"
    )


def test_thin_experts_need_what_was_found_of_them(tmp_path: Path) -> None:
    with pytest.raises(MoneError) as error:
        write(saved(tmp_path), STATISTICS, narrow(), tmp_path / "out.gguf")
    assert str(error.value) == "the plan has thin experts: pass as novices what plan_thin returned with it"


def test_constants_may_be_given(tmp_path: Path) -> None:
    given = {layer: torch.full((N_EXPERT, D), float(layer), dtype=torch.float64) for layer in (1, 2)}
    write(saved(tmp_path), STATISTICS, half(), tmp_path / "out.gguf", novices=given)
    now = read(tmp_path / "out.gguf")[0]
    for layer in (1, 2):
        rows = now[f"blk.{layer}.ffn_down_exps.bias"]
        assert not rows[:3].any() and (rows[3:] == layer).all()


def test_constants_must_be_finite(tmp_path: Path) -> None:
    given = {layer: torch.full((N_EXPERT, D), float("nan") if layer == 2 else 0.0) for layer in (1, 2)}
    with pytest.raises(MoneError) as error:
        write(saved(tmp_path), STATISTICS, half(), tmp_path / "out.gguf", novices=given)
    assert str(error.value) == (
        "layer 2: novices are not finite in float32; calibrate again with --dtype float32, or without this "
        "--stats file"
    )


def test_only_pruned_layers_have_constants(tmp_path: Path) -> None:
    source = open_source(saved(tmp_path))
    mixed = replace(half(), layers=(LayerPlan(1, tuple(range(N_EXPERT)), ()), half().layers[1]))
    assert stored_novices(STATISTICS, mixed, source, None).keys() == {2}
    assert stored_novices(STATISTICS, half(method="drop"), source, None) == {}
    thin = stored_novices(STATISTICS, tiered(Tier(16, (0,))), source, Fixed())
    wanted = novices(STATISTICS.layers[1], "least-squares").float().numpy()
    wanted[0] = 100
    assert thin.keys() == {1} and thin[1].dtype == np.float32 and np.array_equal(thin[1], wanted)
    made = SimpleNamespace(substituted=SimpleNamespace(novices=lambda spec: {1: spec}))
    assert stored_novices(None, half(), made, None) == {1: SPEC}, "a checkpoint with constants has its own"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EACCES, "not allowed"), "not allowed"),
        (OSError("4 requested and 0 written"), "No space left on device"),
    ],
)
def test_what_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, reason: str
) -> None:
    closed = []

    def fail(self: GgufConversion, progress: Any) -> None:
        assert progress is show
        raise error

    monkeypatch.setattr(GgufConversion, "write_tensors", fail)
    monkeypatch.setattr(GgufConversion, "close", lambda self: closed.append(1))
    with pytest.raises(MoneError) as said:
        write(saved(tmp_path), STATISTICS, half(), tmp_path / "out.gguf", progress=show)
    assert (
        str(said.value)
        == f"cannot write out.gguf in {tmp_path}: {reason}; free some space or choose another -o"
    )
    assert closed and said.value.__suppress_context__
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_what_the_converter_leaves_out_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(saved(tmp_path), STATISTICS, half(method="dern", score="gate"), tmp_path / "out.gguf")
    assert "new experts are made of unpacked ones and stay so" in caplog.text


def test_weights_are_brought_and_hashed_with_progress(tmp_path: Path) -> None:
    class Remote(GgufFile):
        seen: list[Any] = []

        def fetch(self, *, progress: Any = None) -> None:
            self.seen.append(progress)

        def fingerprint(self, *, progress: Any = None) -> str:
            self.seen.append(progress)
            return "f" * 64

    steps: list[tuple[int, int, str]] = []

    def shown(*step: Any) -> None:
        steps.append(step)

    write(Remote(saved(tmp_path)), STATISTICS, half(), tmp_path / "out.gguf", progress=shown)
    assert Remote.seen == [shown, shown] and steps[-1][2] == "writing (MiB)"
    assert read(tmp_path / "out.gguf")[1]["mone.source.sha256"] == "f" * 64


def test_experts_that_are_known_by_number_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        MoneError, match="blk.[12].ffn_gate_chexps.weight refers to experts by their number: such"
    ):

        class Unaware(GgufFile):
            spec = SPEC

        write(Unaware(saved(tmp_path, "ffn_gate_chexps.weight")), STATISTICS, half(), tmp_path / "out.gguf")
    aware = GgufFile(saved(tmp_path, "ffn_gate_chexps.weight"))
    assert aware.spec.numbered == (1, 2)
    write(aware, STATISTICS, half(aware.spec), tmp_path / "out.gguf")
    assert "blk.1.ffn_exps_slot" in read(tmp_path / "out.gguf")[0]


def test_experts_beside_the_models_layers_forbid_one_count(tmp_path: Path) -> None:
    class Shorter(GgufFile):
        spec = replace(SPEC, moe_layers=(1,))

    one = replace(STATISTICS, spec=Shorter.spec)
    for method in ("drop", "dern", "mone"):
        chosen = Plan(Shorter.spec, Recipe.of(0.5, method=method), (half().layers[0],))
        if method == "mone":
            write(Shorter(saved(tmp_path)), one, chosen, tmp_path / "out.gguf")
            continue
        with pytest.raises(MoneError) as error:
            write(Shorter(saved(tmp_path)), one, chosen, tmp_path / "out.gguf")
        assert str(error.value) == (
            "blk.2.ffn_gate_exps.weight: experts outside the model's own layers stay whole, and with "
            f"--method {method} all layers have the same number of experts: use --method mone"
        )


class Converted(SimpleNamespace):
    """A conversion as a converter might have made it: names, shapes and keys."""

    def key(self, name: str) -> Any:
        return self.keys.get(name)

    def add_tensor(self, name: str, values: np.ndarray) -> None:
        self.shapes = self.shapes | {name: values.shape}


def converted(shapes: Mapping[str, tuple[int, ...]], arch: str = ARCH, **keys: int) -> Any:
    stated = {f"{{arch}}.{name}": value for name, value in keys.items()}
    there = Converted(shapes=dict(shapes), keys=stated, arch=arch, closed=0)
    there.close = lambda: setattr(there, "closed", there.closed + 1)
    return SimpleNamespace(
        before=None, convert=lambda **asked: setattr(there, "asked", asked) or there, there=there
    )


def expert_shapes(n: int, layers: Sequence[int] = (1, 2), width: int = SIZE) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        found |= {f"blk.{layer}.ffn_{name}_exps.weight": (n, width, D) for name in ("gate", "up")}
        found[f"blk.{layer}.ffn_down_exps.weight"] = (n, D, width)
    return found


BLANK = dict.fromkeys((1, 2), np.zeros((N_EXPERT, D), np.float32))


def test_the_conversion_is_asked_as_the_recipe_says() -> None:
    for chosen in (half(), half(method="drop"), half(mtp="drop")):
        source, edits = converted(expert_shapes(3)), Edits(chosen, BLANK, {})
        assert edits.apply(source, outtype="f16") is source.there
        assert source.there.asked == {"edits": edits, "outtype": "f16", "mtp": chosen.recipe.mtp}
        assert edits.spec is SPEC and not edits.rewrites


def test_counts_that_the_converter_did_not_cut_down_are_refused() -> None:
    with pytest.raises(MoneError) as error:
        Edits(half(), BLANK, {}).apply(
            converted(expert_shapes(3, (1,)) | expert_shapes(6, (2,))), outtype="auto"
        )
    names = [f"blk.2.ffn_{name}_exps.weight" for name in ("gate", "up", "down")]
    shapes = [(6, SIZE, D), (6, SIZE, D), (6, D, SIZE)]
    found = ", ".join(f"{name} {shape}" for name, shape in zip(names, shapes, strict=True))
    assert str(error.value) == (
        f"layer 2: llama.cpp's converter writes {found}, not 3 experts; this checkpoint's experts cannot be "
        "pruned yet: try a BF16 checkpoint of the model"
    )
    with pytest.raises(
        MoneError, match="layer 2: llama.cpp's converter writes no expert tensors, not 3 experts"
    ):
        Edits(half(), BLANK, {}).apply(converted(expert_shapes(3, (1,))), outtype="auto")


def test_tiers_that_were_not_made_are_refused() -> None:
    shapes = expert_shapes(2, (1,)) | expert_shapes(6, (2,))
    with pytest.raises(MoneError) as error:
        Edits(tiered(Tier(16, (0, 2))), BLANK, {}, Fixed()).apply(converted(shapes), outtype="auto")
    assert str(error.value) == (
        "layer 1: of blk.1.ffn_gate_exps.weight no experts of 16 channels can be made: pass --novice "
        "least-squares, or a BF16 checkpoint of the model"
    )


class Lazy(torch.Tensor):
    """As llama.cpp's lazy tensors: made into real ones, and of them, by the class."""

    @staticmethod
    def to_eager(tensor: Tensor) -> Tensor:
        return tensor.as_subclass(torch.Tensor)

    @staticmethod
    def from_eager(tensor: Tensor) -> Tensor:
        return tensor.as_subclass(Lazy)


def lazy(*shape: int) -> Any:
    return torch.arange(float(np.prod(shape))).reshape(shape).as_subclass(Lazy)


def test_a_tensor_without_experts_stays_itself() -> None:
    edits = Edits(half(), BLANK, {})
    for name in (
        "blk.1.attn_q.weight",
        "token_embd.weight",
        "blk.0.ffn_gate_inp.weight",
        "blk.7.ffn_gate_inp.weight",
    ):
        tensor = lazy(N_EXPERT, 4)
        assert edits.edit(name, tensor) is tensor and edits.rows(name, (N_EXPERT, 4)) is None, name
        assert edits.select(name) is None and edits.derived(name, (N_EXPERT, 4, 4)) == ()
    tensor = lazy(5, 4)
    assert edits.edit("blk.1.ffn_gate_inp.weight", tensor) is tensor, "not one row for each expert"


def test_experts_are_selected_by_name() -> None:
    edits = Edits(half(), BLANK, {})
    assert edits.select("blk.1.ffn_up_exps.weight") == (1, 3, 5) and edits.select(
        "blk.2.ffn_up_exps.weight"
    ) == (0, 2, 4)
    assert edits.select("blk.0.ffn_up_exps.weight") == range(N_EXPERT), "a layer beside the model's own"
    assert Edits(narrow(), {}, {}, Fixed()).select("blk.1.ffn_up_exps.weight") == ()


def test_the_router_is_in_the_order_of_the_file() -> None:
    edits = Edits(half(), BLANK, {})
    for shape in ((N_EXPERT, 4), (N_EXPERT,), (1, N_EXPERT)):
        tensor = lazy(*shape)
        found = edits.edit("blk.1.ffn_gate_inp.weight", tensor)
        wanted = tensor[:, list(ORDER[1])] if shape[0] == 1 else tensor[list(ORDER[1])]
        assert torch.equal(found, wanted)
    dropped = Edits(half(method="drop"), {}, {})
    assert torch.equal(
        dropped.edit("blk.1.ffn_gate_inp.weight", lazy(N_EXPERT, 4)), lazy(N_EXPERT, 4)[[1, 3, 5]]
    )


def test_constants_contain_the_scale_that_the_runtime_applies_before_them() -> None:
    stored_ones = {layer: np.arange(N_EXPERT * D, dtype=np.float32).reshape(N_EXPERT, D) for layer in (1, 2)}
    edits, source = Edits(half(), stored_ones, {}), converted(expert_shapes(3))
    scale = lazy(N_EXPERT)
    found = edits.edit("blk.1.ffn_down_exps.scale", scale)
    assert torch.equal(found, torch.tensor([1.0, 3, 5, 1, 1, 1])) and isinstance(found, Lazy)
    kept: dict[str, np.ndarray] = {}
    source.there.add_tensor = lambda name, values: kept.update({name: values})
    edits.apply(source, outtype="auto")
    assert edits.added == [*kept] == ["blk.1.ffn_down_exps.bias", "blk.2.ffn_down_exps.bias"]
    for layer, times in ((1, [0.0, 2, 4]), (2, [1.0, 1, 1])):
        pruned = list(ORDER[layer][3:])
        wanted = np.zeros((N_EXPERT, D), np.float32)
        wanted[3:] = stored_ones[layer][pruned] * np.array(times, np.float32)[:, None]
        assert np.array_equal(kept[f"blk.{layer}.ffn_down_exps.bias"], wanted)


def test_tiers_contain_the_scale_of_their_experts() -> None:
    edits = Edits(tiered(Tier(SIZE, (4,)), Tier(16, (0, 2))), BLANK, {}, Fixed())
    edits.edit("blk.1.ffn_down_exps.scale", lazy(N_EXPERT))
    whole, thin = edits.derived("blk.1.ffn_down_exps.weight", (N_EXPERT, D, SIZE))
    one = torch.ones(D, SIZE)
    assert (whole.name, thin.name) == ("blk.1.ffn_down_exps.t1.weight", "blk.1.ffn_down_exps.t2.weight")
    assert (
        (whole.make(4, one) == 4).all() and (thin.make(2, one) == 4).all() and (thin.make(0, one) == 0).all()
    )
    assert edits.added == [whole.name, thin.name]
    plain = Edits(tiered(Tier(SIZE, (4,))), BLANK, {}, Fixed())
    (whole,) = plain.derived("blk.1.ffn_down_exps.weight", (N_EXPERT, D, SIZE))
    assert torch.equal(whole.make(4, one), one), "without scales nothing is multiplied"
    (alone,) = Edits(narrow(), {}, {}, Fixed()).derived("blk.1.ffn_down_exps.weight", (N_EXPERT, D, SIZE))
    assert alone.name == "blk.1.ffn_down_exps.weight" and (alone.make(1, one) == 2).all()


@pytest.mark.parametrize(
    "name", ["blk.1.ffn_up_exps.scale", "blk.1.ffn_down_exps.input_scale", "blk.1.ffn_down_exps.scale"]
)
def test_blocks_with_scales_of_their_own_are_refused(name: str) -> None:
    tensor = lazy(N_EXPERT)
    if name.endswith("down_exps.scale"):
        tensor = tensor.to(torch.int32)
    with pytest.raises(MoneError) as error:
        Edits(half(), BLANK, {}).edit(name, tensor)
    assert (
        str(error.value) == f"{name}: experts in blocks with scales cannot be pruned: pass a BF16 checkpoint"
    )
    assert Edits(half(method="drop"), {}, {}).edit(name, tensor).shape == (3,), "the kept ones' own"


def test_merged_experts_have_neither_biases_nor_scales() -> None:
    edits = Edits(half(method="dern", score="gate"), {}, importances(STATISTICS))
    assert edits.rewrites
    for part in ("bias", "down bias", "scale"):
        name = f"blk.1.ffn_{'down' if 'down' in part else 'gate'}_exps.{part.split()[-1]}"
        with pytest.raises(MoneError) as error:
            edits.rows(name, (N_EXPERT, 4))
        assert (
            str(error.value) == f"{name}: --method dern cannot merge experts with a {part}: use --method drop"
        )
    assert edits.rows("blk.1.ffn_gate_inp.weight", (N_EXPERT, 4)).own == (1, 3, 5)


def test_experts_of_a_layer_that_stays_are_read_as_they_are() -> None:
    edits = Edits(half(method="dern", score="gate"), {}, importances(STATISTICS))

    def read_one(expert: int) -> Tensor:
        return torch.full((2, 2), float(expert))

    assert len(edits.rewrite("blk.1.ffn_up_exps.weight", read_one)) == 3
    untouched = edits.rewrite("blk.0.ffn_up_exps.weight", read_one)
    assert [float(make()[0, 0]) for make in untouched] == [0, 1, 2, 3, 4, 5]
    plain = Edits(half(), BLANK, {}).rewrite("blk.1.ffn_up_exps.weight", read_one)
    assert [float(make()[0, 0]) for make in plain] == [0, 1, 2, 3, 4, 5]


def test_merging_needs_every_matrix() -> None:
    with pytest.raises(MoneError, match="--method dern needs the gate, up and down matrix"):
        Edits(half(method="dern", score="gate"), {}, importances(STATISTICS)).apply(
            converted(expert_shapes(3)), outtype="auto"
        )


DENSE = {"blk.0.ffn_up.weight": (SIZE, D)}
SHARED = {"blk.1.ffn_up_shexp.weight": (2 * SIZE, D)}


@pytest.mark.parametrize(
    ("more", "keys", "arch", "possible"),
    [
        ({}, {"expert_feed_forward_length": SIZE}, ARCH, (8, 16, 24)),
        ({}, {"feed_forward_length": SIZE}, ARCH, (8, 16, 24)),
        ({}, {}, ARCH, ()),
        ({}, {"expert_feed_forward_length": 2 * SIZE}, ARCH, ()),
        ({}, {"expert_feed_forward_length": SIZE, "feed_forward_length": SIZE}, ARCH, (8, 16, 24)),
        ({}, {"expert_feed_forward_length": SIZE, "feed_forward_length": 3 * SIZE}, ARCH, (8, 16, 24)),
        (DENSE, {"expert_feed_forward_length": SIZE, "feed_forward_length": SIZE}, ARCH, (8, 16, 24)),
        (DENSE, {"feed_forward_length": SIZE}, ARCH, ()),
        (
            SHARED,
            {"expert_feed_forward_length": SIZE, "expert_shared_feed_forward_length": 128},
            ARCH,
            (8, 16, 24),
        ),
        (SHARED, {"expert_feed_forward_length": SIZE, "expert_shared_count": 2}, ARCH, ()),
        (SHARED, {"expert_feed_forward_length": SIZE, "expert_shared_count": 2}, "deepseek2", (8, 16)),
        (SHARED, {"expert_feed_forward_length": SIZE}, "deepseek2", (8, 16, 24)),
    ],
)
def test_experts_are_narrow_where_a_key_says_so_of_them_alone(
    more: dict[str, tuple[int, ...]], keys: dict[str, int], arch: str, possible: tuple[int, ...]
) -> None:
    source = converted(expert_shapes(3, width=1) | more, arch=arch, **keys)
    assert ordinary_widths(source, narrow(), (8, 16, 24)) == possible if possible else True
    assert source.there.closed == 1 if possible else True
    if not possible:
        with pytest.raises(MoneError):
            ordinary_widths(source, narrow(), (8, 16, 24))


def test_why_experts_cannot_be_narrow_is_said() -> None:
    shapes = expert_shapes(3, width=1)
    for source, said in (
        (converted(shapes), f"no key of {ARCH} states the width of its experts alone"),
        (
            converted(shapes | SHARED, expert_feed_forward_length=SIZE, expert_shared_count=2),
            f"llama.cpp takes the width of the shared experts from that of the others in {ARCH}",
        ),
    ):
        with pytest.raises(MoneError) as error:
            ordinary_widths(source, narrow(), (8,))
        assert str(error.value) == said


@pytest.mark.parametrize(
    ("more", "keys", "stated"),
    [
        ((), {}, {"expert_feed_forward_length": 16}),
        ((), {"feed_forward_length": SIZE}, {"expert_feed_forward_length": 16, "feed_forward_length": 16}),
        (
            (),
            {"feed_forward_length": 3 * SIZE},
            {"expert_feed_forward_length": 16, "feed_forward_length": 3 * SIZE},
        ),
        (
            ("ffn_up.weight",),
            {"feed_forward_length": SIZE},
            {"expert_feed_forward_length": 16, "feed_forward_length": SIZE},
        ),
        (
            (),
            {"expert_feed_forward_length": 0, "feed_forward_length": SIZE},
            {"expert_feed_forward_length": 0, "feed_forward_length": 16},
        ),
    ],
)
def test_narrow_files_say_their_width_where_it_is_read(
    tmp_path: Path, more: tuple[str, ...], keys: dict[str, int], stated: dict[str, int]
) -> None:
    write(saved(tmp_path, *more, **keys), STATISTICS, narrow(), tmp_path / "out.gguf", novices=Fixed())
    found = read(tmp_path / "out.gguf")[1]
    assert {name: found[f"{ARCH}.{name}"] for name in stated} == stated
    assert f"{ARCH}.expert_shared_count" not in found


def test_narrow_files_count_shared_experts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SHARED_BY_COUNT", (ARCH,))
    source = saved(tmp_path, "ffn_up_shexp.weight", expert_shared_count=3)
    write(source, STATISTICS, narrow(), tmp_path / "out.gguf", novices=Fixed())
    assert read(tmp_path / "out.gguf")[1][f"{ARCH}.expert_shared_count"] == 3 * SIZE // 16


@pytest.mark.parametrize(
    ("outtype", "n"),
    [
        *(("f32", 1), ("f16", 1), ("bf16", 1)),
        *(("q8_0", 32), ("q4_0", 32), ("q5_1", 32), ("mxfp4", 32), ("mxfp4_moe", 32), ("iq4_nl", 32)),
        *(("q4_k_m", 256), ("q6_k", 256), ("iq4_xs", 256), ("iq2_s", 256), ("q2_k", 256)),
        ("auto", 7),
    ],
)
def test_rows_are_packed_by_so_many(outtype: str, n: int) -> None:
    source: Any = SimpleNamespace(block=7)
    assert packed_together(source, outtype) == n
    assert packed_together(source, outtype, mixed=True) == 32


def test_a_temporary_folder_goes_and_says_where_it_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with temporary_folder() as folder:
        assert folder.is_dir() and folder.name.startswith("mone-export-")
    assert not folder.exists()
    with pytest.raises(MoneError) as error, temporary_folder():
        raise OSError(errno.ENOSPC, "full")
    assert str(error.value) == "cannot write temporary files (full): free some space there, or set TMPDIR"
