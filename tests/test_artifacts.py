"""Statistics merge exactly in any order; saved ones come back bit for bit; broken files are named."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mone_export.artifacts import Calibration, ExpertStats, LayerPlan, MoeSpec, Part, Plan
from mone_export.calibration.sums import expert_stats
from mone_export.errors import MoneError
from mone_export.recipe import Recipe

N_EXPERT, WIDTH = 6, 5
FIELDS = [field.name for field in fields(ExpertStats)]
SPEC = MoeSpec("TinyForCausalLM", 3, (0, 2), N_EXPERT, 2, 1, WIDTH, 4)


def slots(n: int, *, mean: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random (expert, gate, output) of n routed tokens; expert 5 is never chosen, expert 4 hardly ever."""
    random = torch.Generator().manual_seed(seed)
    chances = torch.tensor([5.0, 3.0, 2.0, 1.0, 0.05, 0.0])
    ids = torch.multinomial(chances, n, replacement=True, generator=random)
    gates = torch.rand(n, dtype=torch.float64, generator=random)
    return ids, gates, torch.randn(n, WIDTH, dtype=torch.float64, generator=random) + mean


def stats_of(ids: Tensor, gates: Tensor, outputs: Tensor) -> ExpertStats:
    order = torch.argsort(ids, stable=True)
    count = torch.bincount(ids, minlength=N_EXPERT)
    return expert_stats(outputs[order], gates[order], count, n_token=len(ids))


def merged(parts: Sequence[ExpertStats]) -> ExpertStats:
    result = ExpertStats.empty(N_EXPERT, WIDTH)
    for part in parts:
        result = result.merge(part)
    return result


def assert_equal(found: ExpertStats, wanted: ExpertStats, *, rtol: float = 1e-12) -> None:
    assert found.n_token == wanted.n_token
    for name in FIELDS[1:]:
        a, b = getattr(found, name), getattr(wanted, name)
        assert a.dtype == b.dtype
        # relative to the row: single channels of a sum may cancel
        scale = b.abs().amax(-1, keepdim=True) if b.dim() == 2 else b.abs()
        assert ((a - b).abs() <= rtol * scale).all(), f"{name}: {a} is not {b}"


@pytest.mark.parametrize("mean", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("sizes", [[150, 150], [1, 299], [299, 1], [7] * 42 + [6], [0, 300], [1] * 300])
def test_merge_in_any_split_equals_one_pass(sizes: list[int], mean: float) -> None:
    data = slots(300, mean=mean)
    pieces = zip(*(column.split(sizes) for column in data), strict=True)
    # the mean of 1e4 leaves 8 of 16 digits for the variance: M2 is the square of what remains
    found, wanted = merged([stats_of(*piece) for piece in pieces]), stats_of(*data)
    if mean > 1:
        torch.testing.assert_close(found.out_m2, wanted.out_m2, rtol=1e-10, atol=0)
        found = replace(found, out_m2=wanted.out_m2)
    assert_equal(found, wanted)


def test_merge_in_any_order_and_grouping_is_the_same() -> None:
    parts = [stats_of(*slots(n, mean=3.0, seed=n)) for n in (50, 1, 20, 200)]
    wanted = merged(parts)
    for order in itertools.permutations(parts):
        assert_equal(merged(order), wanted)
    a, b, c, d = parts
    assert_equal(a.merge(b).merge(c.merge(d)), wanted)


def test_merge_keeps_a_small_variance_beside_a_huge_mean() -> None:
    """Sums of squares would lose it: 1e4^2 against 1, over ten thousand tokens in a hundred batches."""
    ids, gates, outputs = slots(10_000, mean=1e4)
    parts = zip(ids.split(100), gates.split(100), outputs.split(100), strict=True)
    found = merged([stats_of(*part) for part in parts])
    for e in range(N_EXPERT):
        own = outputs[ids == e]
        wanted = (own - own.mean(0)).square().sum() if len(own) else torch.tensor(0.0).double()
        torch.testing.assert_close(found.out_m2[e], wanted, rtol=1e-9, atol=0)


def test_nothing_is_neutral() -> None:
    stats, nothing = stats_of(*slots(100)), ExpertStats.empty(N_EXPERT, WIDTH)
    for both in (stats.merge(nothing), nothing.merge(stats)):
        assert all(torch.equal(getattr(both, name), getattr(stats, name)) for name in FIELDS[1:])
        assert both.n_token == stats.n_token
    twice = nothing.merge(nothing)
    assert all(torch.equal(getattr(twice, name), getattr(nothing, name)) for name in FIELDS[1:])


def test_token_that_counts_three_times_is_three_tokens() -> None:
    """Integer weights are repetitions, except in `count` and `n_token`, which say what was seen."""
    once, other = stats_of(*slots(100, mean=3.0)), stats_of(*slots(40, mean=-2.0, seed=1))
    found = once.reweighted(3).merge(other)
    wanted = merged([once, once, once, other])
    assert found.n_token == 140 and torch.equal(found.count, once.count + other.count)
    assert torch.equal(found.weight, wanted.count.double())
    assert_equal(replace(found, n_token=wanted.n_token, count=wanted.count), wanted)


@pytest.fixture
def calibration() -> Calibration:
    return Calibration(
        spec=SPEC,
        model_sha256="a" * 64,
        corpus_sha256="b" * 64,
        corpus_name="text é.txt",
        n_token=300,
        layers={0: stats_of(*slots(300)), 2: stats_of(*slots(300, seed=1))},
        parts=(Part("c" * 64, {"a é.txt": 200, "b": 50}), Part("d" * 64, {"c": 50}, weight=1 / 3)),
    )


def test_saved_calibration_comes_back_bit_for_bit(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "model.stats"
    calibration.save(path)
    back = Calibration.load(path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.stats"], "no .part left"
    for field in fields(Calibration):
        if field.name != "layers":
            assert getattr(back, field.name) == getattr(calibration, field.name)
    assert list(back.layers) == [0, 2]
    for layer, stats in calibration.layers.items():
        assert back.layers[layer].n_token == stats.n_token
        for name in FIELDS[1:]:
            a, b = getattr(back.layers[layer], name), getattr(stats, name)
            assert a.dtype == b.dtype and torch.equal(a, b)


def test_tensors_of_earlier_versions_are_ignored(calibration: Calibration, tmp_path: Path) -> None:
    """Files written before hold, of each pair of experts, the sum of g_e g_e', which nothing read."""
    path = tmp_path / "model.stats"
    calibration.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert not any("gram" in name for name in tensors)
    gram = {f"layers.{layer}.gate_gram": torch.ones(N_EXPERT, N_EXPERT).double() for layer in (0, 2)}
    save_file(tensors | gram, tmp_path / "earlier.stats", metadata=metadata)
    Calibration.load(tmp_path / "earlier.stats").save(tmp_path / "again.stats")
    assert (tmp_path / "again.stats").read_bytes() == path.read_bytes()


def test_saving_twice_gives_the_same_bytes(calibration: Calibration, tmp_path: Path) -> None:
    calibration.save(tmp_path / "a")
    Calibration.load(tmp_path / "a").save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_statistics_in_use_can_be_replaced(calibration: Calibration, tmp_path: Path) -> None:
    """Windows lets nobody replace a file that is mapped."""
    calibration.save(tmp_path / "stats")
    loaded = Calibration.load(tmp_path / "stats")
    loaded.save(tmp_path / "stats")
    assert Calibration.load(tmp_path / "stats").layers.keys() == loaded.layers.keys()


def rewrite(path: Path, change: object) -> None:
    """Write the statistics file again with another header, or without some tensors."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["mone_calibration"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if isinstance(change, dict):
        header |= change
        header = {key: value for key, value in header.items() if value is not None}
    elif isinstance(change, str):
        tensors = {name: tensor for name, tensor in tensors.items() if change not in name}
    else:
        header = change
    save_file(tensors, path, metadata={"mone_calibration": json.dumps(header)})


@pytest.mark.parametrize(
    "change",
    [
        {"spec": None},
        {"model_sha256": None},
        {"version": 4},
        {"spec": asdict(SPEC) | {"n_wings": 2}},
        "layers.2.out_m2",
        [],
    ],
    ids=["no spec", "no fingerprint", "later version", "other spec", "no tensor", "no header"],
)
def test_file_that_lacks_something_is_refused(
    calibration: Calibration, tmp_path: Path, change: object
) -> None:
    path = tmp_path / "model.stats"
    calibration.save(path)
    rewrite(path, change)
    with pytest.raises(
        MoneError, match=r"model\.stats is not a statistics file of mone-export .*: choose another"
    ):
        Calibration.load(path)


@pytest.mark.parametrize("content", ["truncated", b"", b"hello\nworld", b"\x00" * 100, "folder", "other"])
def test_broken_file_is_refused_in_one_line(
    calibration: Calibration, tmp_path: Path, content: str | bytes
) -> None:
    path = tmp_path / "model.stats"
    calibration.save(path)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif content == "other":
        save_file({"weight": torch.zeros(2)}, path)
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(MoneError, match="is not a statistics file") as error:
        Calibration.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("parent", ["missing", "file"])
def test_calibration_that_cannot_be_saved_is_a_moneerror(
    calibration: Calibration, tmp_path: Path, parent: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MoneError, match="choose another"):
        calibration.save(tmp_path / parent / "model.stats")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_order_of_a_layer_is_kept_then_pruned() -> None:
    assert LayerPlan(layer=1, kept=(0, 3), pruned=(1, 2)).order == (0, 3, 1, 2)


def test_share_pruned_counts_all_layers() -> None:
    layers = (LayerPlan(0, (0, 1, 2), (3, 4, 5)), LayerPlan(2, (0, 1, 2, 3, 4, 5), ()))
    plan = Plan(spec=SPEC, recipe=Recipe(ratio=0.25), layers=layers)
    assert plan.share_pruned == 0.25
