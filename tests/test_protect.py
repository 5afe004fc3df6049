"""`--protect`: the experts that a text of its own needs most stay whole, whatever the calibration says."""

import json
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Command, names
from gguf_reference import keys_of, orders_of
from small_layer import N_EXPERT, SPEC, Layer

import mone_export as mone
from mone_export.artifacts import Calibration, Protected, Scores
from mone_export.calibration.corpus import read_all
from mone_export.calibration.loading import load
from mone_export.calibration.masking import masked
from mone_export.calibration.observer import observe
from mone_export.deciding import after_pruned, decided, scored
from mone_export.errors import MoneError
from mone_export.pruning.allocation import allocate
from mone_export.pruning.fates import plan_fates
from mone_export.pruning.novices import novices
from mone_export.pruning.plan_files import load_plan, save_plan
from mone_export.pruning.planning import plan
from mone_export.pruning.protecting import most_needed, protect, with_count
from mone_export.recipe import Recipe
from mone_export.request import Request, prepare
from mone_export.source import open_source
from mone_export.statistics import collect

pytestmark = pytest.mark.slow  # a whole command each

RARE = "\n".join(f"{number:x} \u03b1\u03b2 <tag{number % 7}> {number * number}" for number in range(400))
KINDS = ("even", "sensitivity", "model")


def calibration(*counts: tuple[int, ...]) -> Calibration:
    """A calibration of a layer for each of `counts`: tokens by expert."""
    layers = {number: Layer(each, seed=number).stats() for number, each in enumerate(counts)}
    return Calibration(replace(SPEC, moe_layers=tuple(layers)), "", "sha", "rare.txt", 40, layers)


def protecting(experts: Mapping[int, tuple[int, ...]], n: int = 2) -> Protected:
    return Protected("rare.txt", n, "sha", 40, experts)


def scores_of(values: torch.Tensor) -> Scores:
    found = calibration(*[(12, 7, 5, 20, 9, 3)] * len(values))
    found = replace(found, sensitivity=dict(enumerate([1.0, 5.0, 0.2][: len(values)])))
    return Scores(found.spec, "error", values, found)


def test_the_experts_a_text_needs_most_are_those_whose_constants_leave_most() -> None:
    """By the definition of the score, computed here from the tokens; unseen experts never belong to them."""
    layers = Layer((12, 7, 1, 20, 0, 3), seed=0), Layer((2, 0, 0, 0, 0, 0), seed=1)
    found = most_needed(calibration(layers[0].counts, layers[1].counts), 2)
    left = {}
    for expert, (gates, outputs) in enumerate(zip(layers[0].gates, layers[0].outputs, strict=True)):
        if n := len(gates):
            constant = (gates.square()[:, None] * outputs).sum(0) / gates.square().sum()
            error = (gates.square() * (outputs - constant).square().sum(1)).sum()
            left[expert] = float(error) * (n**0.5 + 7) ** 2 / n
    assert found.experts == {0: tuple(sorted(sorted(left, key=left.__getitem__)[-2:])), 1: (0,)}
    assert (found.name, found.n, found.n_token) == ("rare.txt", 2, 40)
    everything = most_needed(calibration(layers[0].counts, layers[1].counts), N_EXPERT)
    assert everything.experts == {0: (0, 1, 2, 3, 5), 1: (0,)}


@pytest.mark.parametrize("allocation", KINDS)
def test_protected_experts_stay_and_the_best_of_the_others(allocation: str) -> None:
    values = torch.tensor([[6.0, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6], [1, 1, 1, 1, 1, 1]], dtype=torch.float64)
    held = {0: (4, 5), 1: (0, 5), 2: (3,)}
    scores = scores_of(values)
    chosen = plan(protect(scores, [protecting(held)]), ratio=0.5, allocation=allocation)
    assert sum(chosen.n_kept.values()) == 9, "as many as without"
    for layer, own in zip(chosen.layers, values, strict=True):
        best = sorted(set(range(6)) - {*held[layer.layer]}, key=lambda e: (-own[e], e))
        n_more = len(layer.kept) - len(held[layer.layer])
        assert {*layer.kept} == {*held[layer.layer], *best[:n_more]}
    if allocation == "even":
        assert [layer.kept for layer in chosen.layers] == [(0, 4, 5), (0, 4, 5), (0, 1, 3)]
    free = plan(scores, ratio=0.5, allocation=allocation)
    gone = sum(len({*held[layer.layer]} & {*layer.pruned}) for layer in free.layers)
    assert gone and with_count(chosen, free).protected[0].n_saved == gone
    assert torch.equal(scores.values, values), "the scores themselves stay"


def test_a_search_never_takes_a_place_from_a_protected_expert() -> None:
    scores = scores_of(torch.arange(18, dtype=torch.float64).reshape(3, 6))
    held = protect(scores, [protecting({0: (0, 1, 2), 1: (0,), 2: (5,)}, 3)])
    tried = []

    def trial(counts: Mapping[int, int]) -> float:
        tried.append(dict(counts))
        return float(counts[0])  # the fewer in the layer with three of them, the better

    recipe = Recipe.of(0.5, allocation="search")
    counts = allocate(held, recipe, trial=trial)
    assert counts[0] == 3 and len(tried) > 2 and min(each[0] for each in tried) == 3
    assert {0, 1, 2} == {*plan(held, counts, recipe=recipe).layers[0].kept}


def test_of_several_texts_all_stay_and_too_many_are_refused() -> None:
    scores = scores_of(torch.arange(6, dtype=torch.float64)[None])
    both = protect(scores, [protecting({0: (0, 1)}), protecting({0: (1, 2)})])
    assert plan(both, ratio=0.5).layers[0].kept == (0, 1, 2)
    with pytest.raises(MoneError, match=r"^layer 0 keeps 2 experts.* --protect rare\.txt=2"):
        plan(both, ratio=4 / 6, min_kept=1)


@pytest.mark.parametrize("allocation", KINDS)
def test_a_group_may_hold_more_than_its_share(allocation: str) -> None:
    """Each group keeps its best experts first; protected ones beyond them come next, or it is refused."""
    spec = replace(SPEC, moe_layers=(0,), n_group=2, topk_group=2)  # experts 0 to 2 and 3 to 5; one of each
    scores = replace(scores_of(torch.tensor([[9.0, 8, 7, 1, 2, 3]])), spec=spec)
    held = protect(scores, [protecting({0: (3, 4)})])
    chosen = plan(held, ratio=0.5, allocation=allocation)
    assert chosen.layers[0].kept == (0, 3, 4)
    with pytest.raises(MoneError, match="fewer than must stay"):
        plan(held, ratio=4 / 6, allocation=allocation)


def test_a_protected_expert_is_never_thin_nor_a_constant() -> None:
    """In a budget of channels, whatever others are worth; the budget is kept."""
    found = calibration((12, 7, 5, 20, 9, 3), (12, 7, 5, 20, 9, 3))
    spec = replace(found.spec, expert_size=8)
    widths, rng = (0, 2, 4, 8), np.random.default_rng(0)
    errors = {layer: np.sort(rng.random((6, 4)))[:, ::-1] * [1, 1, 1, 0] for layer in (0, 1)}
    errors[0][4] = errors[1][2] = 0  # nobody would keep these
    scores = Scores(spec, "error", torch.zeros(2, 6, dtype=torch.float64), found)
    held = protect(scores, [protecting({0: (4,), 1: (2, 3)})])
    recipe = Recipe.of(0.5, novice="thin")
    free, chosen = plan_fates(scores, errors, widths, recipe), plan_fates(held, errors, widths, recipe)
    assert 4 not in free.layers[0].kept and 2 not in free.layers[1].kept
    assert 4 in chosen.layers[0].kept and {2, 3} <= {*chosen.layers[1].kept}
    for each in (free, chosen):
        assert each.share_pruned == pytest.approx(0.5, abs=1 / 8)
        assert each.share_pruned >= 0.5
    gone = 2 + (3 not in free.layers[1].kept)
    assert with_count(chosen, free).protected[0].n_saved == gone
    with pytest.raises(MoneError, match=r"must stay take more.*--protect"):
        plan_fates(
            protect(scores, [protecting({0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}, 4)]), errors, widths, recipe
        )


def test_a_plan_file_names_the_protected_experts(tmp_path: Path) -> None:
    scores = protect(scores_of(torch.arange(6, dtype=torch.float64)[None]), [protecting({0: (0, 1)})])
    chosen = with_count(plan(scores, ratio=0.5), plan(scores, ratio=0.5))
    save_plan(file := tmp_path / "plan.json", chosen, scores, {})
    assert load_plan(file, scores.spec, chosen.recipe) == chosen
    value = json.loads(file.read_text())
    value["protected"][0]["experts"]["0"] = [0, 2]
    file.write_text(json.dumps(value))
    with pytest.raises(MoneError, match="fewer than must stay"):
        load_plan(file, scores.spec, chosen.recipe)


def test_a_short_text_is_one_short_row(tmp_path: Path) -> None:
    source = open_source("demo")
    (file := tmp_path / "rare.txt").write_text(RARE)
    whole = read_all(file, source.tokenizer(), n_row=100, seq_len=512)
    assert whole.ids.shape[1] == 512 and 1 < len(whole.ids) < 100
    assert read_all(file, source.tokenizer(), n_row=2, seq_len=64).ids.shape == (2, 64)
    file.write_text("a few words")
    assert len(short := read_all(file, source.tokenizer(), n_row=100, seq_len=512).ids) == 1
    assert 2 < short.shape[1] < 20


# --------------------------------------------------------------------------------- from end to end


@pytest.fixture
def rare(tmp_path: Path) -> Path:
    (folder := tmp_path / "texts").mkdir()
    (file := folder / "rare.txt").write_text(RARE)
    return file


@pytest.fixture
def needed(small: Path, rare: Path) -> Protected:
    """What the small model's layers need for the rare text, calibrated by itself."""
    model = load(small, device="cpu", dtype="float32")
    corpus = read_all(rare, model.source.tokenizer(), n_row=2, seq_len=32)
    return most_needed(mone.calibrate(model, corpus), 6)


def kept_in(file: Path) -> dict[int, set[int]]:
    return {layer: {*order[:count]} for layer, (count, order) in orders_of(file).items()}


@pytest.mark.parametrize("options", [["--allocate", kind] for kind in KINDS] + [["--sequential"]])
def test_they_stay_in_the_file(
    command: Command, rare: Path, needed: Protected, tmp_path: Path, options: list[str]
) -> None:
    out = tmp_path / "held.gguf"
    done = command("--protect", f"{rare}=6", *options, "-o", out, quiet=False)
    done.is_fine()
    kept = kept_in(out)
    assert all({*experts} <= kept[layer] for layer, experts in needed.experts.items())
    command(*options, "-o", tmp_path / "free.gguf").is_fine()
    free = kept_in(tmp_path / "free.gguf")
    found = re.search(r"rare\.txt \(64 tokens\) protects 6 .*: (\d+) stay whole, (\d+) of which", done.out)
    assert found and int(found[1]) == sum(map(len, needed.experts.values()))
    if options == ["--allocate", "even"]:  # the layers keep as many either way
        assert int(found[2]) == sum(len({*own} - free[layer]) for layer, own in needed.experts.items()) > 0
    assert keys_of(out)["mone.protected"] == f"{needed.corpus_sha256}=6"


def test_layer_after_layer_they_stay_while_the_layers_after_them_are_measured(
    small: Path, text: Path, rare: Path, tmp_path: Path
) -> None:
    """The last layer's statistics are those of the model whose layers before it are pruned as in the file."""
    request = Request(
        model=small,
        outfile=tmp_path / "held.gguf",
        ratio=0.5,
        files=[text],
        n_row=2,
        seq_len=32,
        protect=[(rare, 6)],
        sequential=True,
        device="cpu",
        dtype="float32",
    )
    job, first, _ = collect(prepare(request))
    assert first
    counts = decided(job, scored(job, first)).n_kept
    found = after_pruned(job, first, counts)
    assert job.corpus
    model, *before, last = load(small, device="cpu", dtype="float32"), *found.spec.moe_layers
    layers = plan(scored(job, found), counts, recipe=job.recipe).layers
    pruned = {layer.layer: layer.pruned for layer in layers if layer.layer != last}
    assert not any({*job.protected[0].experts[layer]} & {*pruned[layer]} for layer in before)
    vectors = {layer: novices(found.layers[layer], job.recipe.known_novice) for layer in before}
    with masked(model.module, pruned, vectors), observe(model.module) as seen, torch.inference_mode():
        model.module.base_model(job.corpus.tokens)
    torch.testing.assert_close(found.layers[last].out_mean, seen[last].out_mean, rtol=1e-6, atol=1e-9)


def test_a_text_too_short_for_all_processes_is_refused_before_the_calibration(
    command: Command, rare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rare.write_text("a few words")
    monkeypatch.setattr("mone_export.calibration.ranks.joined", nullcontext)
    monkeypatch.setattr("mone_export.calibration.engines.open_engine", lambda *_: pytest.fail("loaded"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    done = command("--protect", f"{rare}=6", "-o", tmp_path / "held.gguf")
    done.is_one_line(r"--protect rare\.txt is 1 rows of text for 2 processes: a longer text, a smaller --ctx")


def test_the_second_command_needs_no_model(
    command: Command, rare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text's statistics lie beside the others', where a dry run finds them."""
    (folder := tmp_path / "kept").mkdir()
    given = ("--stats", folder / "stats", "--protect", f"{rare}=6", "--allocate", "even")
    command("-o", tmp_path / "first.gguf", *given).is_fine()
    assert len(names(folder)) == 2
    monkeypatch.setattr("mone_export.calibration.engines.open_engine", lambda *_: pytest.fail("loaded"))
    again = command("-o", tmp_path / "again.gguf", *given, "--plan-out", tmp_path / "plan.json")
    again.is_fine()
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "first.gguf").read_bytes()
    dry = command("--dry-run", *given, "--json", quiet=False)
    dry.is_fine()
    pruned = json.loads(dry.out.splitlines()[-1])["pruned"]
    layers = json.loads((tmp_path / "plan.json").read_text())["layers"]
    assert pruned == {layer: own["pruned"] for layer, own in layers.items()}
    rare.write_text(RARE[100:])
    changed = command("--dry-run", *given, "--json", quiet=False)
    assert json.loads(changed.out.splitlines()[-1])["pruned"] is None, "not known before it ran"


@pytest.mark.parametrize("method", ["drop", "dern"])
def test_they_stay_in_an_ordinary_file(
    command: Command, rare: Path, needed: Protected, tmp_path: Path, method: str
) -> None:
    for score_name in ("gate", "random"):
        plan_file = tmp_path / f"{score_name}.json"
        given = ("--method", method, "--score", score_name, "--protect", f"{rare}=6", "--plan-out", plan_file)
        command(*given, "-o", tmp_path / "held.gguf").is_fine()
        layers = json.loads(plan_file.read_text())["layers"]
        assert all({*own} <= {*layers[str(layer)]["kept"]} for layer, own in needed.experts.items())


def test_a_plan_holds_them_again(command: Command, rare: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    given = ("--stats", tmp_path / "stats", "--allocate", "even")
    command("--protect", f"{rare}=6", "--plan-out", file, *given, "-o", tmp_path / "first.gguf").is_fine()
    again = ("--plan", file, "--stats", tmp_path / "stats", "-o", tmp_path / "again.gguf", "-q")
    assert mone.cli.main([str(command.model), *map(str, again)]) == 0
    assert kept_in(tmp_path / "again.gguf") == kept_in(tmp_path / "first.gguf")
    assert (
        keys_of(tmp_path / "again.gguf")["mone.protected"]
        == keys_of(tmp_path / "first.gguf")["mone.protected"]
    )
    both = [
        str(command.model),
        "--plan",
        str(file),
        "--protect",
        f"{rare}=6",
        "-o",
        str(tmp_path / "no.gguf"),
    ]
    assert mone.cli.main(both) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("rare.txt", "pass a text and how many"),
        ("rare.txt=0", "pass a text and how many"),
        ("=3", "pass a text and how many"),
        ("{rare}=9", "is more than the 8 experts that --ratio 0.5 leaves in a layer"),
        ("nowhere.txt=3", "there is no such file"),
        ("{empty}=3", "is empty"),
    ],
)
def test_what_cannot_be_protected_is_one_line(
    command: Command, rare: Path, tmp_path: Path, given: str, message: str
) -> None:
    (empty := rare.with_name("empty.txt")).write_text("")
    done = command("--protect", given.format(rare=rare, empty=empty), "-o", tmp_path / "no.gguf")
    done.is_one_line(message)
    assert names(tmp_path) == ["texts"]


def held_by(plan_file: Path, n: int) -> tuple[dict[int, set[int]], Mapping[str, Any]]:
    value = json.loads(plan_file.read_text())
    (text,) = value["protected"]
    kept = {int(layer): {*own["kept"]} for layer, own in value["layers"].items()}
    assert all({*ids} <= kept[int(layer)] and len(ids) == n for layer, ids in text["experts"].items())
    return kept, value


def test_thin_experts_of_the_demo(rare: Path, text: Path, tmp_path: Path) -> None:
    """The default: both kinds of file, through transformers and llama.cpp, at a ratio."""
    given: dict[str, Any] = {"files": [text], "n_row": 4, "seq_len": 256, "protect": [(rare, 4)]}
    given |= {"plan_out": tmp_path / "plan.json", "workdir": tmp_path / "work"}
    report = mone.export("demo", ratio=0.5, outfile=tmp_path / "a.gguf", **given)
    assert report and report.recipe.novice == "thin"
    _, value = held_by(tmp_path / "plan.json", 4)
    assert {tier["width"] for layer in value["layers"].values() for tier in layer["tiers"]} == {8, 16, 24}
    assert any("protects 4 experts" in remark for remark in report.remarks)
    saved = value["protected"][0]["n_saved"]
    free: dict[str, Any] = given | {"protect": (), "plan_out": tmp_path / "free.json"}
    mone.export("demo", ratio=0.5, outfile=tmp_path / "b.gguf", **free)
    layers = json.loads((tmp_path / "free.json").read_text())["layers"]
    held = value["protected"][0]["experts"]
    assert saved == sum(len({*ids} - {*layers[layer]["kept"]}) for layer, ids in held.items()) > 0


@pytest.mark.upstream
@pytest.mark.parametrize(("allocation", "n"), [(None, 4), ("even", 12), ("sensitivity", 12)])
def test_from_a_gguf_to_a_size(
    demo_gguf: Path, rare: Path, text: Path, tmp_path: Path, allocation: str | None, n: int
) -> None:
    """Bytes shared out with types by expert, or one type and whole experts; calibrated through llama.cpp.

    Types whose file of that size has fewer experts than must stay are no candidates.
    """
    size = round(0.14 * demo_gguf.stat().st_size)
    report = mone.export(
        demo_gguf,
        fit=size,
        outfile=tmp_path / "fits.gguf",
        files=[text],
        n_row=4,
        seq_len=256,
        protect=[f"{rare}={n}"],
        allocation=allocation,
        plan_out=tmp_path / "plan.json",
    )
    assert report and 0.9 * size < report.size <= size
    kept, value = held_by(tmp_path / "plan.json", n)
    assert all(item.mixed or 32 * (1 - item.ratio) >= n for item in report.candidates)
    assert any(own["pruned"] or own.get("tiers") for own in value["layers"].values()) and len(kept) == 5
