"""collect(): what is measured, in what order, what is kept of it, and what saved statistics are good for."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_layer import SPEC, Layer

from mone_export import __version__
from mone_export.artifacts import Calibration, Candidate, Corpus
from mone_export.calibration import engines, ranks
from mone_export.calibration.corpus import fingerprint_rows, head
from mone_export.calibration.stability import Watch
from mone_export.calibration.work_folder import WorkFolder, begun
from mone_export.errors import MoneError
from mone_export.pruning.damage import relative_error
from mone_export.pruning.novices import novices
from mone_export.pruning.planning import plan
from mone_export.pruning.protecting import most_needed
from mone_export.pruning.scoring import score
from mone_export.recipe import Recipe
from mone_export.request import Job, Request
from mone_export.statistics import (
    calibrate,
    check_origin,
    collect,
    known_protected,
    with_sensitivity,
)

TWO = replace(SPEC, moe_layers=(0, 1))
LAYERS = {0: Layer((12, 7, 1, 20, 0, 3)), 1: Layer((6, 5, 9, 2, 10, 8), seed=1)}
HUGE = torch.tensor([1.0, 1, 1, 1, 1, 1e9]).double()  # the last expert is a super expert
MODEL = "a" * 64
OTHER = "b" * 64


def corpus(n_row: int = 4, first: int = 0, name: str = "text.txt") -> Corpus:
    ids = torch.arange(first, first + 10 * n_row).reshape(n_row, 10)
    return Corpus(ids, name, fingerprint_rows(ids))


TEXT = corpus()
RARE = corpus(3, 500, "rare.txt")


def calibration(text: Corpus = TEXT, **changes: Any) -> Calibration:
    own = Calibration(
        TWO, MODEL, text.sha256, text.name, text.ids.size, {n: at.stats() for n, at in LAYERS.items()}
    )
    return replace(own, **changes)


class FakeEngine:
    """An engine that knows what it measures, and notes what it was asked for."""

    def __init__(self, source: Any, damage: Mapping[int, float] | BaseException | None = None) -> None:
        self.source, self.damage = source, damage or {0: 0.5, 1: 0.25}
        self.asked: list[tuple[str, Any]] = []

    def calibrate(self, text: Corpus, **named: Any) -> Calibration:
        self.asked.append(("calibrate", {"text": text, **named}))
        return calibration(text, model_sha256=named["model_sha256"])

    def damage_by_layer(self, tokens: Any, pruned: Any, means: Any, *, progress: Any) -> dict[int, float]:
        self.asked.append(("damage", (tokens, pruned, means, progress)))
        if isinstance(self.damage, BaseException):
            raise self.damage
        return dict(self.damage)

    def named(self, what: str) -> list[Any]:
        return [found for kind, found in self.asked if kind == what]


class Bench:
    """A job of a model that is never loaded, and the engine that it would run on."""

    def __init__(self) -> None:
        self.source = SimpleNamespace(
            spec=TWO,
            computing_config={"n": 1},
            fingerprint=self._fingerprint,
            name="model",
            packed="",
            direct_types=("f32",),
        )
        self.engine = FakeEngine(self.source)
        self.opened: list[Any] = []
        self.hashed: list[Any] = []
        self.options: dict[str, Any] = {"--dtype": "float32", "--stream": "off"}
        self.pinned: list[Any] = []

    def _fingerprint(self, *, progress: Any = None) -> str:
        self.hashed.append(progress)
        return MODEL

    def open(self, source: Any, setup: Any) -> FakeEngine:
        self.opened.append((source, setup))
        return self.engine

    def pin(self, source: Any, setup: Any) -> dict[str, Any]:
        self.pinned.append(setup)
        assert source is self.source
        return self.options

    def job(self, *, recipe: Recipe | None = None, **named: Any) -> Job:
        asked = {
            name: named.pop(name)
            for name in [*named]
            if name in Request.__dataclass_fields__ and name != "plan"
        }
        request = Request(model="model", ratio=0.5, **{"files": ["text.txt"], **asked})
        settled = recipe or Recipe.of(0.5)
        named = {"corpus": TEXT, **named}
        return Job(request, self.source, settled, "f32", 1, 2, "cpu", **named)  # type-checked by its users


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    found = Bench()
    monkeypatch.setattr(engines, "open_engine", found.open)
    monkeypatch.setattr(engines, "pinned", found.pin)
    return found


def progress(*_: Any) -> None:
    """Stand in for what shows progress."""


def test_nothing_is_measured_where_nothing_depends_on_it(bench: Bench) -> None:
    job = bench.job(recipe=Recipe.of(0.0))
    assert collect(job) == (job, None, None)
    assert not bench.opened and not bench.hashed, "not even the weights are read"


def test_statistics_are_measured_and_the_layers_weighed(bench: Bench) -> None:
    job = bench.job()
    after, found, stability = collect(job, progress=progress)
    assert after is job and found is not None
    assert stability is None, "the engine showed the watch nothing"
    assert found.model_sha256 == MODEL and found.sensitivity.keys() == {0, 1}
    assert bench.hashed == [progress]
    assert len(bench.opened) == 1, "the model is loaded once"
    assert bench.opened[0] == (bench.source, job.setup)
    (asked,) = bench.engine.named("calibrate")
    assert asked["text"] is TEXT and asked["model_sha256"] == MODEL
    assert asked["progress"] is progress and asked["work"] is None
    assert isinstance(asked["watch"], Watch)
    ((tokens, _, _, shown),) = bench.engine.named("damage")
    assert torch.equal(tokens, TEXT.tokens) and shown is progress


def test_a_count_that_needs_no_sensitivity_gets_none(bench: Bench) -> None:
    even = Recipe.of(0.5, allocation="even")
    assert collect(bench.job(recipe=even))[1].sensitivity == {}
    assert not bench.engine.named("damage")


def test_kept_statistics_have_the_sensitivities_that_others_may_need(bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / "stats"
    found = collect(bench.job(recipe=Recipe.of(0.5, allocation="even"), stats=file))[1]
    assert found.sensitivity.keys() == {0, 1}
    assert Calibration.load(file).sensitivity == found.sensitivity


def test_statistics_are_kept_before_the_layers_are_weighed(bench: Bench, tmp_path: Path) -> None:
    """What is weighed afterwards may end the run, hours after the calibration."""
    bench.engine.damage = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        collect(bench.job(stats=tmp_path / "stats"))
    saved = Calibration.load(tmp_path / "stats")
    assert saved.corpus_sha256 == TEXT.sha256 and saved.sensitivity == {}


def test_statistics_stay_where_the_layers_cannot_be_weighed(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench.engine.damage = RuntimeError("out of memory\nat a place")
    found = collect(bench.job(stats=tmp_path / "stats"))[1]
    assert found.sensitivity == {} and Calibration.load(tmp_path / "stats").sensitivity == {}
    assert "how much the layers matter could not be measured (out of memory)" in caplog.text


def test_only_the_text_that_was_read_is_run_again(bench: Bench) -> None:
    """A calibration that ended early has seen the first rows only."""
    bench.engine.calibrate = lambda text, **_: calibration(head(text, 3))  # type: ignore[method-assign]
    collect(bench.job())
    ((tokens, *_),) = bench.engine.named("damage")
    assert torch.equal(tokens, TEXT.tokens[:3])


@pytest.mark.parametrize("given", [{"files": ["x"]}, {"files": (), "datasets": ["x"]}, {"files": ()}])
def test_who_gives_no_text_is_told_which_one_decides(
    bench: Bench, caplog: pytest.LogCaptureFixture, given: dict[str, Any]
) -> None:
    caplog.set_level(logging.INFO)
    collect(bench.job(**given))
    told = "calibrating on the built-in text, mostly Python code and technical English" in caplog.text
    assert told == (given == {"files": ()})


def test_an_early_end_needs_all_layers_at_once(bench: Bench) -> None:
    bench.options["--stream"] = "on"
    with pytest.raises(MoneError, match="--until-stable needs the ratio, and all layers after each batch"):
        collect(bench.job(until_stable=0.9))
    assert not bench.opened
    collect(bench.job())
    bench.options["--stream"] = "off"
    collect(bench.job(until_stable=0.9))


def test_the_watch_follows_what_the_scores_would_prune(bench: Bench) -> None:
    """Each batch shows the decision; the report says how much of it stood."""
    seen: list[bool] = []

    def shown(text: Corpus, **named: Any) -> Calibration:
        for n_token in (4, 8, 12, 16, 20, 40):
            layers = {layer: replace(at.stats(), n_token=n_token) for layer, at in LAYERS.items()}
            seen.append(named["watch"](layers))
        return calibration(text)

    bench.engine.calibrate = shown  # type: ignore[method-assign]
    _, _, stability = collect(bench.job(until_stable=0.9))
    assert stability is not None and stability.n_token == 40
    assert stability.overlaps == {0: 1.0, 1: 1.0}
    assert seen == [False, False, True, True, True, True], "twice at least as stable as was asked for"


class Noted:
    """Takes the place of a watch, and notes what it was made with."""

    made: list["Noted"] = []

    def __init__(self, decide: Any, *, n_token: int, until: float | None) -> None:
        self.decide, self.n_token, self.until = decide, n_token, until
        self.made.append(self)

    def stability(self) -> None:
        """Nothing was seen."""


@pytest.fixture
def watches(monkeypatch: pytest.MonkeyPatch) -> list[Noted]:
    monkeypatch.setattr("mone_export.statistics.Watch", Noted)
    monkeypatch.setattr(Noted, "made", [])
    return Noted.made


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe.of(1 / 3, score="gate"),
        Recipe.of(0.5, novice="thin"),
        Recipe.of(0.5, guarded=False),
        Recipe.of(0.5, method="drop"),
    ],
    ids=["default", "thin", "unguarded", "drop"],
)
def test_the_watch_decides_as_the_plan_does(bench: Bench, watches: list[Noted], recipe: Recipe) -> None:
    """As many in each layer as the ratio says; a streamed model shows one layer at a time."""
    collect(bench.job(recipe=recipe, until_stable=0.75))
    (watch,) = watches
    assert (watch.n_token, watch.until) == (40, 0.75)
    layers = {n: replace(at.stats(), max_abs=at.stats().max_abs * HUGE) for n, at in LAYERS.items()}
    scores = score(calibration(layers=layers), recipe.score, guarded=recipe.guarded)
    choices = {"method": recipe.method} if recipe.method != "mone" else {"allocation": "even"}
    wanted = {at.layer: frozenset(at.pruned) for at in plan(scores, ratio=recipe.ratio, **choices).layers}
    assert watch.decide(layers) == wanted
    assert [watch.decide({layer: layers[layer]}) for layer in (0, 1)] == [{0: wanted[0]}, {1: wanted[1]}]


@pytest.mark.parametrize("score_name", ["aimer", "random"])
def test_nothing_is_watched_where_no_text_changes_the_decision(bench: Bench, score_name: str) -> None:
    collect(bench.job(recipe=Recipe.of(0.5, score=score_name)))
    assert bench.engine.named("calibrate")[0]["watch"] is None


def test_nothing_is_watched_where_the_decision_is_made_or_open(bench: Bench) -> None:
    two = tuple(Candidate("f16", ratio, 1, 1, {}) for ratio in (0.25, 0.5))
    collect(bench.job(plan=plan(score(calibration()), ratio=0.5)))
    collect(bench.job(candidates=two))
    collect(bench.job(recipe=Recipe.of(0.0), candidates=two))
    assert [each["watch"] for each in bench.engine.named("calibrate")] == [None] * 3


def test_saved_statistics_need_no_model(bench: Bench) -> None:
    saved = calibration(sensitivity={0: 1.0, 1: 2.0})
    job = bench.job(saved=saved)
    assert collect(job, progress=progress) == (job, saved, None)
    assert bench.hashed == [progress] and not bench.opened


def test_saved_statistics_are_completed_where_their_run_was_ended(bench: Bench, tmp_path: Path) -> None:
    job = bench.job(
        saved=calibration(head(TEXT, 3), sensitivity={}),
        corpus=TEXT,
        stats=tmp_path / "stats",
        until_stable=0.9,
    )
    _, found, stability = collect(job, progress=progress)
    assert found is not None and found.sensitivity.keys() == {0, 1} and stability is None
    assert not bench.engine.named("calibrate"), "nothing is measured twice"
    ((tokens, _, _, shown),) = bench.engine.named("damage")
    assert torch.equal(tokens, TEXT.tokens[:3]) and shown is progress
    assert Calibration.load(tmp_path / "stats").sensitivity == found.sensitivity


def test_saved_statistics_stay_as_they_are_without_the_text(bench: Bench) -> None:
    saved = calibration()
    assert collect(bench.job(saved=saved, corpus=None))[1] is saved
    assert not bench.opened


def test_saved_statistics_are_not_written_where_nothing_was_added(bench: Bench, tmp_path: Path) -> None:
    bench.engine.damage = MoneError("no")
    saved = calibration()
    assert collect(bench.job(saved=saved, stats=tmp_path / "stats"))[1] is saved
    assert not (tmp_path / "stats").exists()
    bench.engine.damage = {0: 1.0, 1: 1.0}
    assert collect(bench.job(saved=saved))[1].sensitivity, "there need not be a file for them"


def test_statistics_of_another_model_or_text_are_refused(bench: Bench, tmp_path: Path) -> None:
    for saved, what, sha256 in (
        (calibration(model_sha256=OTHER), "model", MODEL),
        (calibration(RARE), "calibration text", TEXT.sha256),
        (calibration(head(TEXT, 3)), "calibration text", TEXT.sha256),
    ):
        own = saved.model_sha256 if what == "model" else saved.corpus_sha256
        with pytest.raises(MoneError) as error:
            collect(bench.job(saved=saved, stats=tmp_path / "stats"))
        assert str(error.value) == (
            f"{tmp_path / 'stats'} was made from another {what} (SHA-256 {own[:16]}, this one is "
            f"{sha256[:16]}): choose another --stats file, or the same model, text, --chunks and --ctx-size"
        )


def test_statistics_of_a_run_that_ended_early_are_of_its_first_rows(bench: Bench) -> None:
    saved = calibration(head(TEXT, 3), sensitivity={0: 1.0, 1: 1.0})
    assert collect(bench.job(saved=saved, until_stable=0.9))[1] is saved
    with pytest.raises(MoneError, match="another calibration text"):
        collect(bench.job(saved=replace(saved, n_token=20), until_stable=0.9))


def test_statistics_without_a_text_are_taken_as_they_are(bench: Bench) -> None:
    check_origin(bench.job(), calibration(RARE), MODEL, None)


@pytest.mark.parametrize("asked", ["auto", "float32"])
def test_statistics_say_what_they_are(bench: Bench, caplog: pytest.LogCaptureFixture, asked: Any) -> None:
    caplog.set_level(logging.INFO)
    saved = calibration(
        made_with={"dtype": "float32", "torch": torch.__version__, "mone-export": __version__}
    )
    check_origin(bench.job(dtype=asked, stats="x"), saved, MODEL, TEXT)
    assert [record.getMessage() for record in caplog.records] == [
        "statistics of 40 tokens of text.txt from x"
    ]


def test_statistics_in_another_precision_are_refused(bench: Bench) -> None:
    saved = calibration(made_with={"dtype": "bfloat16"})
    with pytest.raises(MoneError) as error:
        check_origin(bench.job(dtype="float32", stats="x"), saved, MODEL, TEXT)
    assert str(error.value) == (
        "x was made in bfloat16, --dtype asks for float32: choose another --stats file, or leave --dtype out"
    )
    check_origin(bench.job(dtype="float32"), calibration(), MODEL, TEXT)  # old files do not say


def test_statistics_of_other_versions_are_warned_of(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    saved = calibration(made_with={"mone-export": "0.0.1", "torch": "1.0"})
    check_origin(bench.job(stats="x"), saved, MODEL, TEXT, stats=Path("y"))
    assert "y was made by mone-export 0.0.1, torch 1.0, which may have computed otherwise" in caplog.text
    caplog.clear()
    check_origin(bench.job(stats="x"), replace(saved, made_with={"torch": "1.0"}), MODEL, TEXT)
    assert "x was made by torch 1.0, which may" in caplog.text


def test_protected_texts_run_like_the_calibrations(bench: Bench, tmp_path: Path) -> None:
    job = bench.job(protected_texts=((RARE, 2), (TEXT, 1)), stats=tmp_path / "stats")
    after, found, _ = collect(job, progress=progress)
    assert found is not None and found.corpus_sha256 == TEXT.sha256
    assert after.protected == (most_needed(calibration(RARE), 2), most_needed(calibration(TEXT), 1))
    assert replace(after, protected=()).recipe == job.recipe
    texts = [each["text"] for each in bench.engine.named("calibrate")]
    assert texts == [TEXT, RARE, TEXT] and len(bench.opened) == 1
    rare = bench.engine.named("calibrate")[1]
    assert rare["progress"] is progress and rare["model_sha256"] == MODEL
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"stats", f"stats.protect-{RARE.sha256[:12]}", f"stats.protect-{TEXT.sha256[:12]}"}


def test_protected_texts_are_run_once_for_all(bench: Bench, tmp_path: Path) -> None:
    """Their statistics stand beside the others; with them the experts are known without the model."""
    job = bench.job(protected_texts=((RARE, 2),), stats=tmp_path / "stats", recipe=Recipe.of(0.0))
    assert known_protected(job) is None
    after, nothing, _ = collect(job)
    assert nothing is None, "the ratio asks for no other statistics"
    bench.opened.clear()
    again, *_ = collect(job)
    assert again.protected == after.protected and not bench.opened
    known = known_protected(job)
    assert known is not None and known.protected == after.protected == (most_needed(calibration(RARE), 2),)
    assert known_protected(replace(job, protected_texts=((RARE, 2), (TEXT, 1)))) is None
    both = known_protected(replace(job, protected_texts=((RARE, 2), (RARE, 1))))
    assert both is not None and [each.n for each in both.protected] == [2, 1]


def test_without_a_place_for_statistics_protected_ones_are_not_kept(bench: Bench) -> None:
    job = bench.job(protected_texts=((RARE, 2),))
    assert known_protected(job) is None
    assert collect(job)[0].protected == (most_needed(calibration(RARE), 2),)


def test_protected_statistics_of_another_model_are_refused(bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / f"stats.protect-{RARE.sha256[:12]}"
    job = bench.job(protected_texts=((RARE, 2),), stats=tmp_path / "stats", recipe=Recipe.of(0.0))
    for saved, what in (
        (calibration(RARE, model_sha256=OTHER), "model"),
        (calibration(), "calibration text"),
    ):
        saved.save(file)
        with pytest.raises(MoneError, match=f"{file.name} was made from another {what}"):
            collect(job)


class FakeRanks:
    """Several processes, of which this is one: what it would hear from the first, and how often it waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rank: int, n: int = 4) -> None:
        self.waits, self.joined, self.heard = 0, 0, [] if rank else None
        for name, made in {
            "rank": lambda: rank,
            "n_rank": lambda: n,
            "wait": self._wait,
            "from_first": self._from_first,
            "joined": self._joined,
        }.items():
            monkeypatch.setattr(ranks, name, made)

    def _wait(self) -> None:
        self.waits += 1

    def _from_first(self, value: Any) -> Any:
        if self.heard is None:
            return value
        self.heard.append(value)
        return MODEL if isinstance(value, str) else False

    @contextmanager
    def _joined(self) -> Iterator[None]:
        self.joined += 1
        yield


def test_other_processes_measure_and_keep_nothing(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They give their sums to the first, which alone weighs the layers, protects and writes."""
    there = FakeRanks(monkeypatch, rank=1, n=2)
    job = bench.job(stats=tmp_path / "stats", protected_texts=((RARE, 2),))
    after, found, _ = collect(job)
    assert not bench.hashed and there.heard == ["", False], "the first one's fingerprint is theirs"
    assert found is not None and found.model_sha256 == MODEL and after.protected == ()
    assert not bench.engine.named("damage") and not list(tmp_path.iterdir())
    assert there.joined == 1 and there.waits == 2


def test_the_first_process_does_it_for_all(
    bench: Bench, watches: list[Noted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = FakeRanks(monkeypatch, rank=0, n=2)
    after, _, _ = collect(bench.job(stats=tmp_path / "stats", protected_texts=((RARE, 2),)))
    assert len(after.protected) == 1 and len(bench.engine.named("damage")) == 1 and there.waits == 2
    assert watches[0].n_token == 20, "half of the tokens are its own"


def test_saved_statistics_are_completed_by_the_first_process_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeRanks(monkeypatch, rank=1)
    saved = calibration()
    assert collect(bench.job(saved=saved))[1] is saved and not bench.opened


def test_a_protected_text_too_short_to_share_is_refused_at_once(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeRanks(monkeypatch, rank=0, n=4)
    job = bench.job(protected_texts=((RARE, 2),), stats=tmp_path / "stats")
    with pytest.raises(MoneError) as error:
        collect(job)
    assert str(error.value) == (
        "--protect rare.txt is 3 rows of text for 4 processes: a longer text, a smaller --ctx-size, or fewer "
        "processes"
    )
    assert not bench.opened and not bench.hashed
    calibration(RARE).save(tmp_path / f"stats.protect-{RARE.sha256[:12]}")
    assert collect(job)[0].protected, "where it was run before, nobody shares it"
    FakeRanks(monkeypatch, rank=0, n=3)
    collect(replace(job, request=replace(job.request, stats=None)))


def test_a_work_folder_says_what_it_belongs_to(bench: Bench, tmp_path: Path) -> None:
    given: list[WorkFolder] = []

    def shown(text: Corpus, **named: Any) -> Calibration:
        given.append(named["work"])
        named["work"].save(1, calibration().layers)
        return calibration(text)

    bench.engine.calibrate = shown  # type: ignore[method-assign]
    after, found, _ = collect(bench.job(workdir=tmp_path / "work"))
    folder = tmp_path / "work" / "rank-0"
    assert given[0].folder == folder and given[0].steps() == [], "what it had is complete, and kept elsewhere"
    assert begun(folder) == {
        "model": MODEL,
        "config": hashlib.sha256(b'{"n": 1}').hexdigest(),
        "mone-export": __version__,
        "inputs": "of all matrices",
        "text": TEXT.sha256,
        "--dtype": "float32",
        "--stream": "off",
        "processes": 1,
    }
    assert (after.request.dtype, after.request.stream) == ("float32", "off")
    assert Calibration.load(tmp_path / "work" / "statistics.safetensors").sensitivity == found.sensitivity
    bench.source.computing_config = {"n": 2}
    with pytest.raises(MoneError, match="was begun with config"):
        collect(bench.job(workdir=tmp_path / "work"))


@pytest.mark.parametrize(
    ("job", "text"),
    [
        ({"corpus": None, "saved": calibration(RARE, sensitivity={0: 1.0})}, RARE.sha256),
        ({"corpus": RARE}, RARE.sha256),
    ],
    ids=["of saved statistics", "read"],
)
def test_a_work_folder_is_of_a_text(bench: Bench, tmp_path: Path, job: dict[str, Any], text: str) -> None:
    collect(bench.job(workdir=tmp_path, **job))
    assert begun(tmp_path / "rank-0")["text"] == text


def test_a_work_folder_may_be_for_protected_texts_alone(bench: Bench, tmp_path: Path) -> None:
    collect(bench.job(workdir=tmp_path, corpus=None, protected_texts=((RARE, 1),), recipe=Recipe.of(0.0)))
    assert begun(tmp_path / "rank-0")["text"] == ""


@pytest.mark.parametrize("asked", ["auto", "given"])
def test_what_was_left_to_auto_stays_as_it_was(bench: Bench, tmp_path: Path, asked: str) -> None:
    """The folder's precision and way come first, unless others are asked for: those are refused."""
    bench.options = {"--dtype": "bfloat16", "--stream": "on"}
    first = collect(bench.job(workdir=tmp_path))[0]
    assert (first.setup.dtype, first.setup.stream) == ("bfloat16", "on"), "settled for all that follows"
    bench.pinned.clear()
    given = {} if asked == "auto" else {"dtype": "float32", "stream": "off"}
    collect(bench.job(workdir=tmp_path, **given))
    wanted = ("bfloat16", "on") if asked == "auto" else ("float32", "off")
    assert (bench.pinned[0].dtype, bench.pinned[0].stream) == wanted


def test_what_a_new_work_folder_leaves_open_is_decided_by_the_machine(bench: Bench, tmp_path: Path) -> None:
    bench.options = {}
    after, *_ = collect(bench.job(workdir=tmp_path, dtype="float16", stream="off"))
    assert (after.request.dtype, after.request.stream) == ("float16", "off"), "where nothing pins them"
    assert (bench.pinned[0].dtype, bench.pinned[0].stream) == ("float16", "off")
    bench.pinned.clear()
    collect(bench.job(workdir=tmp_path / "other"))
    assert (bench.pinned[0].dtype, bench.pinned[0].stream) == ("auto", "auto")


def test_of_several_processes_each_has_its_work_folder(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeRanks(monkeypatch, rank=1, n=2)
    collect(bench.job(workdir=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["rank-1"]
    assert begun(tmp_path / "rank-1")["processes"] == 2


def test_two_runs_do_not_share_a_work_folder(bench: Bench, tmp_path: Path) -> None:
    def shown(text: Corpus, **_: Any) -> Calibration:
        with pytest.raises(MoneError, match="rank-0"):
            collect(bench.job(workdir=tmp_path))
        return calibration(text)

    bench.engine.calibrate = shown  # type: ignore[method-assign]
    collect(bench.job(workdir=tmp_path))


def test_calibrate_measures_what_the_command_does(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        engines, "engine_of", lambda model, memory=None: asked.append((model, memory)) or bench.engine
    )
    model: Any = SimpleNamespace(source=bench.source)
    found = calibrate(model, TEXT, memory=5, progress=progress)
    assert asked == [(model, 5), (bench.engine, None)], "loaded once"
    assert bench.hashed == [progress]
    assert found.sensitivity.keys() == {0, 1} and found.model_sha256 == MODEL
    (given,) = bench.engine.named("calibrate")
    assert given == {"text": TEXT, "model_sha256": MODEL, "progress": progress}
    ((tokens, _, _, shown),) = bench.engine.named("damage")
    assert torch.equal(tokens, TEXT.tokens) and shown is progress


def test_sensitivity_is_what_the_worse_half_of_a_layer_does(bench: Bench) -> None:
    own, engine = calibration(), bench.engine
    found = with_sensitivity(engine, TEXT, own, progress=progress)
    ((_, pruned, means, _),) = engine.named("damage")
    scores = score(own, "mone", guarded=False)
    wanted = plan(scores, ratio=0.5, min_kept=1, allocation="even")
    assert pruned == {layer.layer: layer.pruned for layer in wanted.layers}
    assert [len(each) for each in pruned.values()] == [3, 3]
    for layer, vectors in means.items():
        assert torch.equal(vectors, novices(own.layers[layer], "mean"))
    for layer, damage in ((0, 0.5), (1, 0.25)):
        error = relative_error(own.layers[layer], pruned[layer], "mean")
        assert found.sensitivity[layer] == pytest.approx(damage / error, rel=1e-12)
    assert own.sensitivity == {}, "the calibration itself stays as it was"


def test_half_may_be_fewer_than_a_token_uses(bench: Bench) -> None:
    """The layers' harm is asked about, no plan: neither top_k nor super experts keep it from half."""
    stats = {layer: replace(at, max_abs=at.max_abs * HUGE) for layer, at in calibration().layers.items()}
    own = calibration(spec=replace(TWO, top_k=5), layers=stats)
    with_sensitivity(bench.engine, TEXT, own)
    ((_, pruned, _, _),) = bench.engine.named("damage")
    plain = plan(score(calibration(), "mone", guarded=False), ratio=0.5, min_kept=1, allocation="even")
    assert pruned == {layer.layer: layer.pruned for layer in plain.layers}
