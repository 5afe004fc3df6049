"""What fits is the most that fits, to the byte, and the best of it by the estimate is what gets written."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Command

from mone_export.artifacts import Calibration, Candidate, Corpus
from mone_export.calibration.loading import load
from mone_export.calibration.passes import calibrate
from mone_export.errors import MoneError
from mone_export.fitting import answer, candidates, judge
from mone_export.output.importance import Rounding
from mone_export.output.writing import layouts, measure
from mone_export.pipeline import export
from mone_export.pruning.planning import plan, plan_without_scores
from mone_export.pruning.scoring import score
from mone_export.recipe import Recipe
from mone_export.source import inspect, open_source
from mone_export.spending import Spending

pytestmark = pytest.mark.upstream


@pytest.fixture(scope="module")
def calibration(small: Path) -> Calibration:
    tokens = torch.randint(0, 400, (8, 64), generator=torch.Generator().manual_seed(0))
    corpus = Corpus(tokens=tokens, name="random", sha256="0")
    return calibrate(load(small, device="cpu", dtype="float32"), corpus, model_sha256="")


def size(small: Path, outtype: str, n_kept: int, method: str = "mone") -> int:
    spec = inspect(small)
    blank = plan_without_scores(spec, Recipe.of(1 - n_kept / spec.n_expert, method=method))
    return measure(small, blank, outtype=Rounding(outtype))


@pytest.mark.parametrize("method", ["mone", "drop"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.75, 0.97])
def test_one_expert_more_would_not_fit(small: Path, share: float, method: str) -> None:
    spec = inspect(small)
    budget = int(share * size(small, "auto", spec.n_expert))
    found = candidates(open_source(small), Recipe.of(0, method=method), budget)
    assert found
    for item in found:
        n_kept = round((1 - item.ratio) * spec.n_expert)
        assert item.size == size(small, item.outtype, n_kept, method) <= budget
        assert n_kept == spec.n_expert or size(small, item.outtype, n_kept + 1, method) > budget


def test_types_behind_the_first_that_takes_all_experts_are_left_out(small: Path) -> None:
    spec = inspect(small)
    found = candidates(open_source(small), Recipe.of(0), size(small, "q8_0", spec.n_expert))
    assert found[-1].outtype == "q8_0" and found[-1].ratio == 0
    assert all(item.ratio > 0 for item in found[:-1])


def test_names_that_the_file_states_count(small: Path) -> None:
    spec = inspect(small)
    sizes = set()
    names = product(
        ("error", "mone-paper"), ("mean", "zero", "gate-weighted", "least-squares"), ("", 32 * "x")
    )
    for name, novice, said in names:
        recipe, keys = Recipe.of(0.5, score=name, novice=novice), {"mone.options": ("STRING", said)}
        measured = partial(layouts, stated=keys)
        options: dict[str, Any] = {"outtype": "q8_0", "any_ratio": False, "measured": measured}
        (found,) = candidates(open_source(small), recipe, 10**9, **options)
        blank = plan_without_scores(spec, recipe)
        assert found.size == measure(small, blank, outtype=Rounding("q8_0", stated=keys))
        sizes.add(found.size)
    assert len(sizes) > 1, "they do make a difference"


def test_a_type_and_a_ratio_narrow_the_search(small: Path) -> None:
    source, budget = open_source(small), 10**9
    (only,) = candidates(source, Recipe.of(0.5), budget, outtype="q4_0", any_ratio=False)
    assert (only.outtype, only.ratio) == ("q4_0", 0.5)
    half = candidates(source, Recipe.of(0.5), budget, any_ratio=False)
    assert len(half) > 3 and {item.ratio for item in half} == {0.5}


def test_what_cannot_fit_is_refused_with_the_smallest_size(small: Path) -> None:
    with pytest.raises(MoneError, match=r"nothing fits 1000 bytes: the smallest file has \d+"):
        candidates(open_source(small), Recipe.of(0), 1000)


def test_the_estimate_adds_what_is_lost_and_what_is_rounded(small: Path, calibration: Calibration) -> None:
    errors = judged(small, calibration, {"f32": 0.0, "q8_0": 0.0, "q2_k": 0.0})
    assert errors["f32"] == 0
    assert 0 < errors["q8_0"] < 1e-4 < 1e-3 < errors["q2_k"]
    pruned = judged(small, calibration, {"f32": 0.5, "q8_0": 0.5})
    assert pruned["q8_0"] > pruned["f32"] > errors["q8_0"]
    more = judged(small, calibration, {"f32": 0.75})
    assert more["f32"] > pruned["f32"]


def judged(small: Path, calibration: Calibration, ratios: Mapping[str, float]) -> dict[str, float]:
    source = open_source(small)
    found = [
        candidates(source, Recipe.of(ratio), 10**9, outtype=name, any_ratio=False)[0]
        for name, ratio in ratios.items()
    ]
    scores = score(calibration)
    result = judge(found, source, calibration, lambda item: plan(scores, ratio=item.ratio, novice="mean"))
    assert [item.error for item in result] == sorted(item.error or 0.0 for item in result)
    return {item.outtype: item.error or 0.0 for item in result}


def test_the_answer_names_the_best_of_the_other_kind() -> None:
    whole = Candidate("iq4_xs", 0.0, 10, 20, {}, 0.04)
    pruned = Candidate("q6_k", 0.25, 10, 20, {}, 0.01)
    worse = replace(pruned, outtype="q8_0", error=0.02)
    assert answer([pruned, worse, whole]).startswith("prune: --outtype q6_k, 25% of the experts pruned")
    assert "rather than --outtype iq4_xs" in answer([pruned, worse, whole])
    assert (
        answer([whole])
        == "only quantise: --outtype iq4_xs, all experts kept, estimated error 4%; all experts fit"
    )
    assert answer([pruned]).endswith("no type takes all experts")


@pytest.mark.parametrize("share", [0.4, 0.6])
def test_the_export_fits_and_says_how(small: Path, text: Path, tmp_path: Path, share: float) -> None:
    budget = int(share * size(small, "auto", inspect(small).n_expert))
    report = export(str(small), fit=budget, outfile=tmp_path / "fits.gguf", files=[text], n_row=4, seq_len=64)
    assert report is not None
    best = report.candidates[0]
    assert (tmp_path / "fits.gguf").stat().st_size == report.size == best.size <= budget
    assert best.mixed or best.ratio == 0
    assert {fate.split()[0] for fates in report.fates.values() for fate in fates} >= {"whole"}


@pytest.mark.parametrize("allocation", ["even", "sensitivity"])
def test_the_size_that_is_announced_is_never_exceeded(
    command: Command, tmp_path: Path, allocation: str
) -> None:
    out = tmp_path / "fits.gguf"
    done = command("-o", out, "--fit", "400000", "--allocate", allocation, quiet=False)
    done.is_fine()
    assert "will have at most 400 kB" in done.err and out.stat().st_size <= 400_000


def test_errors_are_shares_of_what_experts_say(small: Path, calibration: Calibration) -> None:
    """Of experts twice as loud, the same: both kinds of estimates have one unit."""
    loud = {
        layer: replace(
            stats, gated2_norm_sq_sum=4 * stats.gated2_norm_sq_sum, gated2_out_sum=2 * stats.gated2_out_sum
        )
        for layer, stats in calibration.layers.items()
    }
    source, recipe = open_source(small), Recipe.of(0.0, allocation="budget")
    (item,) = candidates(source, recipe, 10**9, outtype="q8_0")
    found = []
    for each in (calibration, replace(calibration, layers=loud)):
        scores = score(each)
        zero = {
            layer: np.stack([stats.gated2_norm_sq_sum.numpy(), np.zeros(source.spec.n_expert)], axis=1)
            for layer, stats in each.layers.items()
        }
        widths = (0, source.spec.expert_size)
        found.append(Spending(source, scores, recipe, widths, zero).plan(item, item.size, mixed=False)[1])
    assert 0 < found[0] < 0.1 and found[1] == pytest.approx(found[0])


def test_counts_by_sensitivity_fit_where_types_depend_on_the_layer(tmp_path: Path, text: Path) -> None:
    """In some layers of the demo an expert takes more: its down projection is in Q6_K."""
    stats = tmp_path / "stats"
    options: dict[str, Any] = {"files": [text], "n_row": 4, "seq_len": 256, "stats": stats}
    export("demo", ratio=0.5, outfile=tmp_path / "half.gguf", **options)
    calibration = Calibration.load(stats)
    ends = {layer: 100.0 if layer in (0, 4) else 1.0 for layer in calibration.layers}
    replace(calibration, sensitivity=ends).save(stats)
    found = {}
    for allocate in ("even", "sensitivity"):
        outfile = tmp_path / f"{allocate}.gguf"
        found[allocate] = export(
            "demo", fit=2_915_000, outtype="q4_k_m", outfile=outfile, allocation=allocate, **options
        )
        assert outfile.stat().st_size == found[allocate].size <= 2_915_000
    even, uneven = found["even"], found["sensitivity"]
    assert uneven.n_kept[0] + uneven.n_kept[4] > even.n_kept[0] + even.n_kept[4]
    assert sum(uneven.n_kept.values()) < sum(even.n_kept.values()), "so that they fit"
    assert uneven.size > 0.98 * 2_915_000


def test_the_exporter_wants_a_ratio_or_a_size(small: Path, tmp_path: Path) -> None:
    with pytest.raises(MoneError, match="--ratio.*--fit"):
        export(str(small), outfile=tmp_path / "out.gguf")
    with pytest.raises(MoneError, match="--allocate even or sensitivity, not model"):
        export(str(small), outfile=tmp_path / "out.gguf", fit=10**9, allocation="model")
