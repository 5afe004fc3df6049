"""The watch sees what changes, when it looks and when it stops; the export says so."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from mone_export import cli
from mone_export.artifacts import Calibration, ExpertStats
from mone_export.calibration.stability import Watch

pytestmark = pytest.mark.slow  # a whole command each

Pruned = Mapping[int, set[int]]


class Script:
    """A calibration whose decision after n tokens is written down: layer -> {n: pruned}."""

    def __init__(
        self, decisions: Mapping[int, Pruned], *, n_token: int = 100, until: float | None = None
    ) -> None:
        self.decisions = decisions
        self.asked: list[tuple[int, int]] = []  # (layer, tokens)
        self.watch = Watch(self.decide, n_token=n_token, until=until)

    def decide(self, layers: Mapping[int, ExpertStats]) -> dict[int, frozenset[int]]:
        self.asked += [(layer, stats.n_token) for layer, stats in layers.items()]
        return {layer: frozenset(self.decisions[layer][stats.n_token]) for layer, stats in layers.items()}

    def see(self, n_token: int, *layers: int) -> bool:
        stats = replace(ExpertStats.empty(4, 2), n_token=n_token)
        return self.watch(dict.fromkeys(layers or self.decisions, stats))


def test_it_looks_once_at_every_tenth() -> None:
    script = Script({0: dict.fromkeys(range(101), {1})})
    for n_token in range(1, 101):
        script.see(n_token)
    assert [n_token for _, n_token in script.asked] == list(range(10, 101, 10))
    large_batches = Script({0: dict.fromkeys(range(101), {1})})
    for n_token in (35, 70, 100):
        large_batches.see(n_token)
    assert [n_token for _, n_token in large_batches.asked] == [35, 70, 100]


def test_overlap_is_with_half_the_text() -> None:
    script = Script({0: {10: {0, 1}, 20: {1, 2}, 30: {1, 2}, 40: {1, 2}, 50: {1, 3}}})
    found = []
    for n_token in (10, 20, 30, 40, 50):
        script.see(n_token)
        found.append(script.watch.stability())
    # 10: nothing before; 20 and 30 with 10; 40 with 20; 50 with 20, the last in its first half
    assert found[0] is None
    assert [(s.n_token, s.overlaps[0]) for s in found[1:] if s] == [
        (20, 1 / 3),
        (30, 1 / 3),
        (40, 1),
        (50, 1 / 3),
    ]


def test_layers_count_alike_and_the_lowest_is_named() -> None:
    script = Script({1: {50: {0, 1}, 100: {0, 1}}, 4: {50: {0, 1}, 100: {1, 2}}})
    script.see(50)
    script.see(100)
    found = script.watch.stability()
    assert found is not None and found.overlaps == {1: 1.0, 4: 1 / 3}
    assert (found.mean, found.lowest) == (pytest.approx(2 / 3), 1 / 3)


def test_layers_that_come_one_after_the_other_are_followed_as_well() -> None:
    decisions = {1: {50: {0, 1}, 100: {0, 1}}, 4: {50: {0, 1}, 100: {1, 2}}}
    together, streamed = Script(decisions), Script(decisions)
    for n_token in (50, 100):
        together.see(n_token)
    for layer in decisions:
        for n_token in (50, 100):
            streamed.see(n_token, layer)
    assert streamed.watch.stability() == together.watch.stability()


def test_a_layer_taken_up_again_stands_beside_one_that_has_just_begun() -> None:
    script = Script({0: {100: {1}}, 1: {20: {1}}})
    finished, begun = (replace(ExpertStats.empty(4, 2), n_token=n_token) for n_token in (100, 5))
    script.watch({0: finished, 1: begun})
    assert script.watch.stability() is None
    script.watch({0: finished, 1: replace(begun, n_token=20)})
    assert script.asked == [(0, 100), (1, 20)]


@pytest.mark.parametrize(("until", "stops_at"), [(None, None), (1.0, 70), (0.3, 30), (0.34, 70)])
def test_it_stops_when_the_overlap_is_reached(until: float | None, stops_at: int | None) -> None:
    """Twice in a row: overlaps are 1/3, 1/3, 1, 1/3, 1, 1 from 20 tokens on."""
    points = {10: {0, 1}, 20: {1, 2}, 30: {1, 2}, 40: {1, 2}, 50: {1, 3}, 60: {1, 2}, 70: {1, 2}}
    script = Script({0: points}, until=until)
    stops = [n_token for n_token in points if script.see(n_token)]
    assert (stops[0] if stops else None) == stops_at


def test_nothing_pruned_is_stable() -> None:
    script = Script({0: {50: set(), 100: set()}})
    assert not script.see(50) and not script.see(100)
    found = script.watch.stability()
    assert found is not None and found.mean == 1


@pytest.fixture
def export(small: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mone_export.calibration.passes.TOKENS_PER_BATCH", 64)

    def run(*arguments: str) -> int:
        options = ["--ratio", "0.5", "-f", str(text), "--chunks", "20", "-c", "32"]
        return cli.main([str(small), *options, "-o", str(tmp_path / "x.gguf"), *arguments])

    return run


def test_export_stops_early_and_says_what_it_used(
    export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = tmp_path / "s"
    assert export("--stats", str(stats)) == 0
    whole = capsys.readouterr().out
    assert re.search(r"stable   0\.\d\d \(least stable layer 0\.\d\d\): .* pruned at 640 tokens", whole)
    stats.unlink()
    assert export("--stats", str(stats), "--until-stable", "0.2") == 0
    early = capsys.readouterr().out
    (n_token,) = map(int, re.findall(r"pruned at (\d+) tokens", early))
    calibration = Calibration.load(stats)
    assert n_token < 640 and calibration.n_token == n_token == sum(calibration.parts[0].sources.values())
    assert calibration.layers[0].n_token == n_token
    # the same as asking for those rows alone, and known again by the same command only
    fewer = tmp_path / "fewer"
    assert export("--stats", str(fewer), "--chunks", str(n_token // 32)) == 0
    assert fewer.read_bytes() == stats.read_bytes()
    assert export("--stats", str(stats), "--until-stable", "0.2") == 0
    assert export("--stats", str(stats)) == 1


def test_streamed_model_is_as_stable_as_the_one_in_memory(
    export, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    found = []
    for stream in ("off", "on"):
        assert export("--stream", stream, "-v", "--novice", "mean") == 0  # thin experts take another pass
        found.append(re.findall("stable .*", capsys.readouterr().out))
    assert found[0] == found[1] != []
    layers = [
        record.message for record in caplog.records if re.match(r"layer \d of 3: 20 rows", record.message)
    ]
    assert len(layers) == 3
    assert export("--stream", "on", "--until-stable", "0.9") == 1
    assert "--until-stable needs the ratio, and all layers after each batch" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "nan"])
def test_overlap_that_cannot_be_is_one_line(export, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert export("-q", "--until-stable", value) == 1
    assert re.fullmatch(rf"mone-export: --until-stable {value} is no overlap: .*\n", capsys.readouterr().err)


def test_threshold_that_is_not_reached_is_said(export, capsys: pytest.CaptureFixture[str]) -> None:
    assert export("--until-stable", "1") == 0
    out = capsys.readouterr().out
    assert re.search(r"note     --until-stable 1 was not reached in 640 tokens: more text", out), out
