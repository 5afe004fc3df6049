"""Thin experts against least squares by brute force: errors, constants, projections, channels."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mone_export.artifacts import ChannelStats, MoeSpec
from mone_export.calibration.channel_sums import ChannelSums
from mone_export.calibration.sums import expert_stats
from mone_export.pruning import thinning
from mone_export.pruning.damage import error_left
from mone_export.pruning.novices import novices
from mone_export.pruning.thinning import channel_bytes, refit, thin, widths_of

N_EXPERT, SIZE, WIDTH = 3, 12, 7
WIDTHS = (0, 4, 8, 12)


class Experts:
    """Hidden activations [n, SIZE], gates [n] and down projections [WIDTH, SIZE] of a few experts."""

    def __init__(self, *counts: int, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=random)

        self.hidden = [normal(n, SIZE) @ normal(SIZE, SIZE) + 1 for n in counts]
        self.gates = [torch.rand(n, dtype=torch.float64, generator=random) for n in counts]
        self.down = [normal(WIDTH, SIZE) for _ in counts]

    def stats(self) -> ChannelStats:
        sums = ChannelSums(len(self.down), SIZE)
        for expert, (hidden, gates) in enumerate(zip(self.hidden, self.gates, strict=True)):
            if len(gates):
                sums.add(expert, hidden, gates)
        return sums.stats()

    def fitted(self, expert: int, channels: Tensor, *, centred: bool = True) -> tuple[Tensor, Tensor, float]:
        """Return (projection [WIDTH, n], constant [WIDTH], squared error) by least squares."""
        hidden, gates = self.hidden[expert], self.gates[expert][:, None]
        ones = torch.full((len(hidden), 1), float(centred), dtype=torch.float64)
        inputs = torch.cat([hidden[:, channels], ones], 1)
        outputs = hidden @ self.down[expert].T
        found = torch.linalg.lstsq(inputs * gates, outputs * gates, driver="gelsd").solution
        error = ((outputs - inputs @ found) * gates).square().sum()
        return found[:-1].T, found[-1], float(error)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thinning, "PRIOR", 0.0)
    monkeypatch.setattr(thinning, "ROUNDING", 0.0)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("centred", [True, False], ids=["with a constant", "without"])
def test_every_width_is_the_least_squares_solution(centred: bool) -> None:
    experts = Experts(400, 300, 60)
    stats = experts.stats()
    found = thin(stats, experts.down, WIDTHS, centred=centred)
    for expert in range(N_EXPERT):
        for place, width in enumerate(WIDTHS):
            channels = found.channels(expert, width)
            down, constant, error = experts.fitted(expert, channels, centred=centred)
            assert found.errors[expert, place].item() == pytest.approx(error, rel=1e-6, abs=1e-9)
            if centred:
                own = found.constant(expert, width).double()
                torch.testing.assert_close(own, constant, rtol=1e-5, atol=1e-5)
            if width:
                own = experts.down[expert] @ refit(stats, expert, channels, centred=centred)
                torch.testing.assert_close(own, down, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("exact")
def test_no_channels_are_the_novice_and_all_are_the_expert() -> None:
    experts = Experts(50, 40, 30)
    found = thin(experts.stats(), experts.down, WIDTHS)
    outputs = [hidden @ down.T for hidden, down in zip(experts.hidden, experts.down, strict=True)]
    counts = torch.tensor([50, 40, 30])
    stats = expert_stats(torch.cat(outputs), torch.cat(experts.gates), counts, n_token=60)
    vectors = novices(stats, "least-squares")
    torch.testing.assert_close(found.constants[:, 0].double(), vectors, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.errors[:, 0], error_left(stats, vectors), rtol=1e-6, atol=1e-9)
    assert (found.errors[:, -1] == 0).all()
    assert (found.constants[:, -1] == 0).all()
    assert (found.errors.diff(dim=1) <= 0).all(), "more channels are never worse"


def test_one_token_is_fitted_to_nothing() -> None:
    """Its centred second moment is 0, up to how its sums were rounded: no weight may come of that."""
    for seed in range(20):
        hidden = torch.randn(1, SIZE, generator=torch.manual_seed(seed)).double() * 0.01
        noise = 1 + 1e-7 * torch.randn(SIZE, SIZE, generator=torch.manual_seed(seed + 1)).double()
        stats = ChannelStats(
            count=torch.tensor([1]),
            weight=torch.tensor([0.3], dtype=torch.float64),
            first=0.3 * hidden,
            second=(0.3 * hidden.T @ hidden * (noise + noise.T) / 2)[None],
        )
        assert refit(stats, 0, torch.arange(SIZE // 2)).abs().max() < 100


@pytest.mark.usefixtures("exact")
def test_channels_are_near_the_best_there_are() -> None:
    experts = Experts(300, seed=3)
    chosen = thin(experts.stats(), experts.down, (0, 3, SIZE)).errors[0, 1].item()
    every = [experts.fitted(0, torch.tensor(channels))[2] for channels in combinations(range(SIZE), 3)]
    assert min(every) * 0.999999 <= chosen < 1.25 * min(every)
    assert chosen < 0.75 * sorted(every)[len(every) // 2], "better than any channels"


def test_a_prior_helps_where_text_is_short() -> None:
    """On tokens that the fit has not seen."""
    short, errors = Experts(4025, seed=5), {}
    unseen, short.hidden[0] = short.hidden[0][25:], short.hidden[0][:25]
    short.gates[0] = short.gates[0][:25]
    stats = short.stats()
    for prior in (0.0, 8.0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(thinning, "PRIOR", prior)
            found = thin(stats, short.down, WIDTHS)
            channels = found.channels(0, 4)
            answer = unseen[:, channels] @ (short.down[0] @ refit(stats, 0, channels)).T
            answer += found.constant(0, 4)
        errors[prior] = float((answer - unseen @ short.down[0].T).square().sum())
    assert errors[8.0] < errors[0.0]


def test_merging_in_any_split_equals_one_pass() -> None:
    experts = Experts(90, 70, 50)
    whole, merged = experts.stats(), ChannelStats.empty(N_EXPERT, SIZE)
    for part in range(3):
        sums = ChannelSums(N_EXPERT, SIZE)
        for expert, (hidden, gates) in enumerate(zip(experts.hidden, experts.gates, strict=True)):
            sums.add(expert, hidden[part::3], gates[part::3])
        merged = sums.stats().merge(merged)
    torch.testing.assert_close(merged.second, whole.second, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(merged.first, whole.first, rtol=1e-9, atol=1e-9)
    assert torch.equal(merged.count, whole.count)


def test_an_expert_never_seen_costs_nothing() -> None:
    experts = Experts(50, 0, 30)
    bias = torch.ones(N_EXPERT, WIDTH)
    found = thin(experts.stats(), experts.down, WIDTHS, bias)
    assert (found.errors[1] == 0).all()
    assert (found.constants[1, :-1] == 1).all(), "the model's own bias stays"
    without = thin(experts.stats(), experts.down, WIDTHS)
    torch.testing.assert_close(found.constants[0, :-1], without.constants[0, :-1] + 1)
    channels = found.channels(1, 4)
    columns = experts.down[1] @ refit(experts.stats(), 1, channels)
    torch.testing.assert_close(columns, experts.down[1][:, channels])


def test_channels_that_never_answer_go_first() -> None:
    experts = Experts(200, 200, 200)
    for hidden in experts.hidden:
        hidden[:, 5] = 0
    found = thin(experts.stats(), experts.down, WIDTHS)
    assert (found.order[:, -1] == 5).all()


@pytest.mark.parametrize(
    ("size", "block", "widths"),
    [
        (32, 1, (0, 8, 16, 24, 32)),
        (32, 32, (0, 32)),
        (96, 32, (0, 32, 64, 96)),
        (768, 256, (0, 256, 512, 768)),
        (768, 32, (0, 96, 192, 288, 384, 576, 768)),
        (1408, 256, (0, 192, 352, 512, 704, 1056, 1408)),
        (7, 256, (0, 1, 2, 3, 4, 5, 7)),
    ],
)
def test_widths_have_whole_blocks(size: int, block: int, widths: tuple[int, ...]) -> None:
    spec = MoeSpec("TinyForCausalLM", 2, (1,), 8, 2, 1, 64, size)
    assert widths_of(spec, block) == widths
    assert widths_of(replace(spec, expert_size=256), 256) == (0, 256)


def test_half_of_a_matrix_is_kept_on_disk_and_all_of_it_comes_back(tmp_path: Path) -> None:
    """As many bytes as `channel_bytes` says, about."""
    spec = MoeSpec("llama", 1, (0,), 4, 2, 1, 8, 64)
    made = torch.rand(4, 64, 64, dtype=torch.float64)
    sums = ChannelStats(torch.ones(4, dtype=torch.int64), torch.rand(4), torch.rand(4, 64), made @ made.mT)
    sums.save(tmp_path, 0)
    back = ChannelStats.load(tmp_path, 0)
    assert torch.equal(back.second, sums.second.float().tril() + sums.second.float().tril(-1).mT)
    assert torch.equal(back.first, sums.first)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == pytest.approx(channel_bytes(spec), rel=0.05)
