"""DERN's three steps on cases whose answers are known by hand."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from mone_export.pruning.dern import ALPHA, cluster, homes, recombine

WIDTH, N_SEGMENT = 24, 10


def expert(seed: int, n: int = N_SEGMENT) -> Tensor:
    return torch.randn(n, 3, WIDTH, generator=torch.Generator().manual_seed(seed))


def output(segments: Tensor, x: Tensor) -> Tensor:
    """What an expert of these segments computes for rows x [n, WIDTH]."""
    return (silu(x @ segments[:, 0].T) * (x @ segments[:, 1].T)) @ segments[:, 2]


X = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(99))


def recombined(
    experts: list[Tensor], kept: list[int], importance: list[float], **options: float
) -> list[Tensor]:
    pruned = [e for e in range(len(experts)) if e not in kept]
    return list(recombine(lambda e: experts[e], kept, pruned, torch.tensor(importance), **options))


@pytest.mark.parametrize("importance", [[1.0, 1.0, 1.0], [5.0, 0.1, 1.0], [0.0, 0.0, 0.0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_permuted_copy_is_absorbed_without_error(importance: list[float], dtype: torch.dtype) -> None:
    shuffled = torch.randperm(N_SEGMENT, generator=torch.Generator().manual_seed(5))
    one, two = (expert(seed).to(dtype).float() for seed in (1, 2))
    found = recombined([one, two[shuffled], two], [0, 2], importance)
    for segments, wanted in zip(found, (one, two), strict=True):
        torch.testing.assert_close(output(segments, X), output(wanted, X), rtol=1e-5, atol=1e-4)


def test_unrelated_segments_are_dropped() -> None:
    """In 48 dimensions the cosine of random directions hardly ever reaches 0.6."""
    one, two, three = expert(1), expert(2), expert(3)
    assert (homes(three, [one, two], alpha=ALPHA) == -1).all()
    found = recombined([one, two, three], [0, 1], [1.0, 1.0, 1.0])
    assert torch.equal(found[0], one) and torch.equal(found[1], two)


def test_a_segment_goes_to_the_expert_with_the_most_similar_one() -> None:
    one, two = expert(1), expert(2)
    moved = torch.stack([two[3] * 2, one[7] + 0.1 * expert(4)[0], expert(5)[0], -one[0]])
    moved[:, 0] = expert(6)[:4, 0]  # the gate row is not compared
    assert homes(moved, [one, two], alpha=0.6).tolist() == [1, 0, -1, -1]
    assert (homes(moved, [one, two], alpha=-1.0) >= 0).all(), "everything is admitted"


def test_clusters_are_the_ones_that_were_made() -> None:
    """Well separated directions, three noisy segments each, one with a large gate row: centres come back."""
    true = expert(1)
    true[:, 0] /= true[:, 0].abs().amax(1, keepdim=True)
    noisy = torch.cat([true + 0.02 * expert(seed) for seed in (2, 3, 4)])
    noisy[:N_SEGMENT, 0] *= 1.2
    noisy = noisy[torch.randperm(3 * N_SEGMENT, generator=torch.Generator().manual_seed(0))]
    found = cluster(noisy, torch.ones(len(noisy)), N_SEGMENT)
    distance = torch.cdist(found.flatten(1), true.flatten(1))
    assert sorted(distance.argmin(1).tolist()) == list(range(N_SEGMENT))
    assert distance.amin(1).max() < 0.5


def test_centre_is_the_weighted_mean_after_equalising_norms() -> None:
    """Two parallel pairs: rows of norm 1 and 3, importance 3 and 1, mean norm (3 * 1 + 1 * 3) / 4 = 1.5."""
    basis = torch.eye(WIDTH)[:6].reshape(2, 3, WIDTH)
    segments = torch.cat([basis, 3 * basis])
    found = cluster(segments, torch.tensor([3.0, 3.0, 1.0, 1.0]), 2)
    torch.testing.assert_close(found.norm(dim=2), torch.full((2, 3), 1.5))
    torch.testing.assert_close(found.sum(0) / 1.5, basis.sum(0))


def test_direction_of_the_centre_follows_the_importance() -> None:
    angle = 0.3
    a = torch.zeros(1, 3, 2)
    a[..., 0] = 1
    b = torch.zeros(1, 3, 2)
    b[..., 0], b[..., 1] = torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))
    found = cluster(torch.cat([a, b]), torch.tensor([3.0, 1.0]), 1)[0]
    torch.testing.assert_close(found, (3 * a[0] + b[0]) / 4)


def test_clusters_start_from_the_largest_gate_rows() -> None:
    """Of four segments in a plane the two with large gate rows are the centres at the start.

    Keys at 0, 40, 50 and 90 degrees. From 0 and 90 the clusters are (0, 40) and (50, 90); from 40 and 50
    they are the same here; from 0 and 40 the second one takes the other three.
    """

    def at(degrees: float, gate: float) -> Tensor:
        angle = torch.deg2rad(torch.tensor(degrees))
        point = torch.stack([angle.cos(), angle.sin()])
        return torch.stack([torch.tensor([gate, 0.0]), point, torch.zeros(2)])

    def groups(gates: list[float]) -> list[Tensor]:
        segments = torch.stack([at(d, g) for d, g in zip((0, 40, 50, 90), gates, strict=True)])
        return sorted(cluster(segments, torch.ones(4), 2)[:, 1].tolist())

    apart, lopsided = groups([9, 1, 1, 9]), groups([9, 8, 1, 1])
    pair = ((at(50, 1) + at(90, 1)) / 2)[1]
    assert any(torch.allclose(torch.tensor(row), pair) for row in apart)
    triple = ((at(40, 1) + at(50, 1) + at(90, 1)) / 3)[1]
    assert any(torch.allclose(torch.tensor(row), triple) for row in lopsided)


def test_every_expert_is_read_once() -> None:
    asked: list[int] = []

    def read(e: int) -> Tensor:
        asked.append(e)
        return expert(e)

    list(recombine(read, [1, 3], [0, 2, 4], torch.ones(5)))
    assert sorted(asked) == [0, 1, 2, 3, 4]
