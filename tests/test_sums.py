"""All three ways to the statistics, against their definitions written as loops over single tokens."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from mone_export.artifacts import ExpertStats
from mone_export.calibration.sums import Sums, expert_stats, grouped_stats, routed_stats

WIDTH = 6
FIELDS = [field.name for field in fields(ExpertStats) if field.name != "n_token"]
# more experts than a thread takes at a time, blocks of 32 that are full, begun and empty, more than 128 rows
COUNTS = {
    "uneven": (5, 0, 1, 32, 33, 0, 150, 2, 7, 1, 64, 0),
    "the last alone": (0, 0, 3),
    "the first alone": (300, 0, 0),
    "one each": (1, 1, 1, 1),
    "two full blocks": (64, 64),
}


def by_definition(outputs: Tensor, gates: Tensor, count: tuple[int, ...]) -> dict[str, Tensor]:
    """The table of statistics, written out: float64, an expert and a token after the other."""
    found = {name: getattr(ExpertStats.empty(len(count), WIDTH), name).clone() for name in FIELDS}
    begin = 0
    for e, n in enumerate(count):
        own = outputs[begin : begin + n].double()
        for f, g in zip(own, gates[begin : begin + n].double(), strict=True):
            norm = f.dot(f) ** 0.5
            found["gate_sum"][e] += g
            found["gate_sq_sum"][e] += g * g
            found["gated_out_sum"][e] += g * f
            found["gated2_out_sum"][e] += g * g * f
            found["norm_sum"][e] += norm
            found["norm_sq_sum"][e] += norm * norm
            found["gated_norm_sum"][e] += g * norm
            found["gated2_norm_sq_sum"][e] += g * g * norm * norm
            found["max_abs"][e] = max(found["max_abs"][e], f.abs().max())
        if n:
            found["out_mean"][e] = own.sum(0) / n
            found["out_m2"][e] = (own - own.sum(0) / n).square().sum()
        found["count"][e] = found["weight"][e] = n
        begin += n
    return found


def batch(count: tuple[int, ...], dtype: torch.dtype = torch.float64, mean: float = 0.5) -> tuple[Any, Any]:
    """Outputs of which the largest are negative, and gates."""
    random = torch.Generator().manual_seed(len(count))
    outputs = torch.randn(sum(count), WIDTH, generator=random, dtype=torch.float64) * 3 - mean
    return outputs.to(dtype), torch.rand(sum(count), generator=random, dtype=torch.float64).to(dtype) + 0.1


def assert_stats(found: ExpertStats, wanted: dict[str, Tensor], *, rtol: float = 1e-9) -> None:
    for name in FIELDS:
        own = getattr(found, name)
        assert own.dtype == wanted[name].dtype and own.shape == wanted[name].shape, name
        atol = rtol * float(wanted[name].abs().max())
        torch.testing.assert_close(own, wanted[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
def test_a_batch_in_the_order_of_experts(count: tuple[int, ...], dtype: torch.dtype) -> None:
    outputs, gates = batch(count, dtype)
    found = expert_stats(outputs, gates, torch.tensor(count), n_token=17)
    assert found.n_token == 17
    assert_stats(found, by_definition(outputs, gates, count))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
def test_a_batch_all_at_once(count: tuple[int, ...], dtype: torch.dtype) -> None:
    """As a GPU does it: what has few digits is summed in float32, what has many keeps them."""
    outputs, gates = batch(count, dtype)
    found = grouped_stats(outputs, gates, torch.tensor(count), torch.repeat_interleave(torch.tensor(count)))
    assert found.n_token == 0
    assert_stats(found, by_definition(outputs, gates, count), rtol=1e-9 if dtype == torch.float64 else 3e-6)


@pytest.mark.parametrize("n_expert", [3, 8, 21])
@pytest.mark.parametrize("threads", [False, True])
def test_a_batch_in_the_order_of_tokens(n_expert: int, threads: bool) -> None:
    """Slots are sorted by expert here; the same to the last bit with threads."""
    random, n_token = torch.Generator().manual_seed(n_expert), 60
    outputs = torch.randn(n_token, 2, WIDTH, generator=random, dtype=torch.float64)
    gates = torch.rand(n_token, 2, generator=random, dtype=torch.float64)
    ids = torch.stack([torch.randperm(n_expert - 1, generator=random)[:2] for _ in range(n_token)])
    order = ids.flatten().argsort(stable=True)
    count = tuple(torch.bincount(ids.flatten(), minlength=n_expert).tolist())
    wanted = by_definition(outputs.flatten(0, 1)[order], gates.flatten()[order], count)
    alone = routed_stats(outputs, gates, ids, n_expert)
    assert alone.n_token == n_token and count[-1] == 0, "the last expert sees no token"
    assert_stats(alone, wanted)
    if threads:
        with CountingPool(2) as pool:
            together = routed_stats(outputs, gates, ids, n_expert, pool=pool)
        assert pool.n_map == 1
        assert all(torch.equal(getattr(together, name), getattr(alone, name)) for name in FIELDS)


class CountingPool(ThreadPoolExecutor):
    """Threads that know whether they were asked."""

    n_map = 0

    def map(self, *args: Any, **named: Any) -> Any:
        self.n_map += 1
        return super().map(*args, **named)


@pytest.mark.parametrize("way", ["one by one", "all at once"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_outputs_that_are_all_the_same_have_no_variance(value: float, way: str) -> None:
    """A difference of large squares would leave some, or a negative one."""
    outputs, gates, count = torch.full((200, WIDTH), value).double(), torch.ones(200), torch.tensor([200])
    found = (
        expert_stats(outputs, gates, count, n_token=200)
        if way == "one by one"
        else grouped_stats(outputs, gates, count, torch.zeros(200, dtype=torch.int64))
    )
    assert 0 <= found.out_m2.item() <= 1e-20 * max(value, 1) ** 2 * 200 * WIDTH


@pytest.mark.parametrize("mean", [40.0, 100.0, 1e5])
def test_a_small_variance_around_a_large_mean_keeps_its_digits(mean: float) -> None:
    outputs, gates = batch((150,), mean=mean)
    found = expert_stats(outputs, gates, torch.tensor([150]), n_token=150)
    wanted = float((outputs - outputs.mean(0)).square().sum())
    assert found.out_m2.item() == pytest.approx(wanted, rel=1e-11)


def test_experts_may_come_in_blocks() -> None:
    """Each block says which experts it has; the sums are those of all at once."""
    count = COUNTS["uneven"]
    outputs, gates = batch(count)
    sums, begin = Sums(torch.tensor(count), WIDTH), 0
    for first in range(0, len(count), 5):
        own = slice(first, min(first + 5, len(count)))
        n = sum(count[own])
        sums.add(own, outputs[begin : begin + n], gates[begin : begin + n])
        begin += n
    assert_stats(sums.stats(), by_definition(outputs, gates, count))


def test_what_comes_in_is_left_alone() -> None:
    outputs, gates = batch(COUNTS["uneven"])
    count = torch.tensor(COUNTS["uneven"])
    before = outputs.clone(), gates.clone(), count.clone()
    expert_stats(outputs, gates, count, n_token=1)
    grouped_stats(outputs, gates, count, torch.repeat_interleave(count))
    assert all(torch.equal(now, then) for now, then in zip((outputs, gates, count), before, strict=True))


def test_rows_must_be_those_that_were_announced() -> None:
    """Fewer gates than outputs, or rows of no expert, are an error and no wrong sum."""
    sums = Sums(torch.tensor([2, 1]), WIDTH)
    with pytest.raises((RuntimeError, ValueError)):
        sums.add(slice(0, 2), torch.zeros(3, WIDTH), torch.zeros(2))
    with pytest.raises((RuntimeError, ValueError)):
        sums.add(slice(0, 1), torch.zeros(3, WIDTH), torch.zeros(3))
