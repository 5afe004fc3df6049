"""Estimated errors against plain sums over the tokens."""

import pytest
import torch
from small_layer import LAYER, N_EXPERT

from mone_export.pruning.damage import error_left, relative_error
from mone_export.pruning.novices import NOVICES, novices

STATS = LAYER.stats()


@pytest.mark.parametrize("name", NOVICES)
def test_error_left_is_the_sum_over_tokens(name: str) -> None:
    vectors = novices(STATS, name)
    found = error_left(STATS, vectors)
    for e in range(N_EXPERT):
        g, f = LAYER.gates[e][:, None], LAYER.outputs[e]
        wanted = (g * (f - vectors[e])).square().sum()
        torch.testing.assert_close(found[e], wanted, rtol=1e-9, atol=1e-12)


def test_losing_all_experts_loses_all_of_the_output() -> None:
    assert relative_error(STATS, range(N_EXPERT), "zero") == pytest.approx(1)
    assert relative_error(STATS, [LAYER.unseen], "zero") == 0
    assert relative_error(STATS, (), "mean") == 0


def test_order_of_the_novices_is_that_of_their_error() -> None:
    zero, mean, least = (relative_error(STATS, (0, 1, 3), name) for name in ("zero", "mean", "least-squares"))
    assert zero > mean > least > 0
