"""An error known from few tokens may be larger elsewhere, one known from many is what it is."""

from dataclasses import replace

import pytest
import torch
from small_layer import N_EXPERT, SPEC, Layer

from mone_export.artifacts import Calibration
from mone_export.pruning.allocation import error_curves, share_out
from mone_export.pruning.damage import error_left
from mone_export.pruning.novices import novices
from mone_export.pruning.planning import plan
from mone_export.pruning.scoring import score
from mone_export.pruning.uncertainty import MARGIN, possible_use

WIDTH = 4
RARE, FREQUENT = 5, 0


def layer(times: int = 1) -> Layer:
    """Expert 5 is called 1 time in 50 but errs badly, the others often and by little each time."""
    counts = tuple(times * n for n in (400, 500, 600, 700, 800, 9))
    made = Layer(counts)
    random = torch.Generator().manual_seed(1)
    for e, n in enumerate(counts):
        made.gates[e] = torch.ones(n, dtype=torch.float64)
        spread = 1.0 if e == RARE else 0.1 + 0.02 * e
        signs = torch.randint(0, 2, (n, WIDTH), generator=random).double() * 2 - 1
        made.outputs[e] = 2 + signs * (spread / WIDTH) ** 0.5
    return made


def calibration(*layers: Layer) -> Calibration:
    numbers = range(1, 1 + len(layers))
    spec = replace(SPEC, moe_layers=tuple(numbers))
    stats = [made.stats() for made in layers]
    return Calibration(spec, "", "", "", 0, dict(zip(numbers, stats, strict=True)))


def pruned(found: Calibration) -> tuple[int, ...]:
    return plan(score(found), ratio=1 / N_EXPERT, min_kept=1, allocation="even").layers[0].pruned


def test_an_expert_seen_rarely_and_badly_replaced_is_kept() -> None:
    found = calibration(layer())
    stats = found.layers[1]
    measured = error_left(stats, novices(stats, "least-squares"))
    assert int(measured.argmin()) == RARE, "by the error that was measured it would go"
    assert pruned(found) == (FREQUENT,)


def test_much_text_settles_it() -> None:
    assert pruned(calibration(layer(times=100))) == (RARE,)


def test_possible_use_is_the_bound_of_the_count() -> None:
    stats = Layer(counts=(1, 4, 25, 400, 0, 10_000)).stats()
    bounds = [(n**0.5 + MARGIN) ** 2 for n in (1, 4, 25, 400, 10_000)]
    seen = [0, 1, 2, 3, 5]
    assert (possible_use(stats) * stats.count)[seen].tolist() == pytest.approx(bounds, rel=1e-12)
    assert possible_use(stats).isfinite().all()


def test_weights_of_merged_files_do_not_make_an_expert_known() -> None:
    stats = layer().stats()
    assert torch.equal(possible_use(stats.reweighted(1000.0)), possible_use(stats))


def test_the_counts_of_the_layers_allow_for_it_too() -> None:
    """Two layers alike, except that one saw a hundredth of the tokens: the place left over is its."""
    few, many = layer(), layer(times=100)
    found = calibration(many, few)
    curves = error_curves(found, score(found), "least-squares")
    assert share_out(curves, N_EXPERT + 1, {1: 1, 2: 1}) == {1: 3, 2: 4}
    for number, made in ((1, many), (2, few)):
        total = sum(float(f.square().sum()) for f in made.outputs)
        worst = sum(
            (len(f) ** 0.5 + MARGIN) ** 2 / len(f) * float((f - f.mean(0)).square().sum())
            for f in made.outputs
        )
        assert float(curves[number][0]) == pytest.approx(worst / total, rel=1e-9)
