"""Perplexity, divergence, shares of slots: llama-perplexity's numbers, and counts made in another way."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_models import tiny_gguf
from gguf_parts import Parts, put_together, taken_apart
from gguf_reference import MoeLayer
from gguf_tiers import TILTS, Fates, fates_for, tiered
from llama_tensors import inside
from programs import run

from mone_export.calibration.eval_callback import Routed, Tap
from mone_export.calibration.llama_model import LlamaModel
from mone_export.errors import MoneError
from mone_export.evaluation.predictions import Originals, Predictions, mean, paired, predict, quantiles
from mone_export.evaluation.results import Measured
from mone_export.evaluation.slots import fates_by_slot
from mone_export.evaluation.texts import Text, read_texts
from mone_export.llama_options import LlamaOptions
from mone_export.runtime import path as bin_folder
from mone_export.source.gguf_file import GgufFile

pytestmark = pytest.mark.upstream

N_CHUNK = 4


def predictions(
    file: Path, text: Text, *, keep: Originals | None = None, against: Originals | None = None
) -> Predictions:
    source = GgufFile(file)
    with LlamaModel(file, LlamaOptions()) as model:
        return predict(model, text, fates_by_slot(source.header, source.spec), keep=keep, against=against)


def text_of(file: Path, text: Path, *, n_ctx: int = 512, n_chunk: int = N_CHUNK) -> Text:
    return read_texts([str(text)], GgufFile(file).tokenizer(), n_ctx=n_ctx, n_chunk=n_chunk)[0]


def n_vocab(file: Path) -> int:
    return int(GgufFile(file).header.tensors["token_embd.weight"].shape[-1])


def perplexity_of(file: Path, *options: object, until: str) -> str:
    """What llama-perplexity prints, which may end without the last lines: they are not waited for."""
    for _ in range(10):
        if until in (said := run(bin_folder() / "llama-perplexity", "-m", file, *options)):
            return said
    raise AssertionError(said)


@pytest.fixture(scope="module")
def measured(demo_gguf: Path, half_gguf: Path, text: Path) -> Iterator[dict[str, Predictions]]:
    """The whole file, its half and itself, against the whole one."""
    cut = text_of(demo_gguf, text)
    kept = Originals([cut], n_vocab(demo_gguf))
    whole = predictions(demo_gguf, cut, keep=kept)
    yield {
        "whole": whole,
        "half": predictions(half_gguf, cut, against=kept),
        "itself": predictions(demo_gguf, cut, against=kept),
    }
    kept.close()


def test_numbers_are_those_of_llama_perplexity(
    demo_gguf: Path, half_gguf: Path, text: Path, measured: dict[str, Predictions], tmp_path: Path
) -> None:
    base = tmp_path / "base.kl"
    perplexity_of(demo_gguf, "-f", text, "--chunks", N_CHUNK, "--kl-divergence-base", base, until="[4]")
    said = perplexity_of(half_gguf, "--kl-divergence-base", base, "--kl-divergence", until="Same top p:")

    def printed(name: str) -> tuple[float, ...]:
        (line,) = re.findall(rf"^{re.escape(name)} *: *(.*)$", said, re.MULTILINE)
        return tuple(float(number) for number in re.findall(r"-?\d+\.\d+", line))

    found = measured["half"].result()
    assert found.kl_mean and found.kl_median and found.kl_99 and found.kl_999 and found.same_top
    assert found.kl_mean.value > 1e-4, "as good as none at all would prove nothing"
    perplexity, error = printed("Mean PPL(Q)")
    assert found.perplexity == Measured(pytest.approx(perplexity, rel=1e-5), pytest.approx(error, rel=1e-3))
    perplexity, error = printed("Mean PPL(base)")
    assert measured["whole"].result().perplexity.value == pytest.approx(perplexity, rel=1e-5)
    kl, error = printed("Mean    KLD")
    assert found.kl_mean == Measured(pytest.approx(kl, abs=2e-6), pytest.approx(error, abs=2e-6))
    # its 16 bits are worth about 1e-5 in each token's divergence
    assert found.kl_median.value == pytest.approx(*printed("Median  KLD"), abs=1e-5)
    assert found.kl_99.value == pytest.approx(*printed("99.0%   KLD"), abs=5e-5)
    assert found.kl_999.value == pytest.approx(*printed("99.9%   KLD"), abs=2e-4)
    same, error = printed("Same top p")
    assert 100 * found.same_top.value == pytest.approx(same, abs=0.15)
    difference, error = printed("Mean ln(PPL(Q)/PPL(base))")
    pair = paired(("half", measured["half"]), ("whole", measured["whole"]))
    assert pair.log_perplexity == Measured(
        pytest.approx(difference, abs=1e-5), pytest.approx(error, abs=1e-5)
    )


def test_a_file_does_not_differ_from_itself(measured: dict[str, Predictions]) -> None:
    found = measured["itself"].result()
    assert found.kl_mean == Measured(0, 0) and found.same_top == Measured(1, 0)
    assert found.kl_999 == Measured(0, 0) and found.perplexity == measured["whole"].result().perplexity


def test_chunks_longer_than_a_piece_are_those_of_llama_perplexity(half_gguf: Path, text: Path) -> None:
    cut = text_of(half_gguf, text, n_ctx=1100, n_chunk=2)
    found = predictions(half_gguf, cut).result()
    said = perplexity_of(half_gguf, "-f", text, "--chunks", 2, "-c", 1100, until="[2]")
    (wanted,) = re.findall(r"\[2\]([\d.]+)", said)
    assert found.perplexity.value == pytest.approx(float(wanted), rel=1e-4)
    assert [sum(own.values()) for own in found.slots.values()] == [pytest.approx(1)] * 5


def test_shares_are_those_of_the_originals_routes(
    demo_gguf: Path, half_gguf: Path, measured: dict[str, Predictions]
) -> None:
    """Up to its first experts a pruned model is the original, whose routes the plan gives fates."""
    cut, counts = measured["half"].text, Counter[int]()

    def see(_: int, routed: Routed) -> None:
        counts.update(routed.ids[cut.first : -1].flatten().tolist())

    with LlamaModel(demo_gguf, LlamaOptions()) as model:
        for row in torch.from_numpy(cut.rows):
            model.run(row[None], Tap((0,), see, until=0))
    layer = json.loads(half_gguf.with_suffix(".json").read_text())["layers"]["0"]
    wanted: Counter[str] = Counter()
    for fate, experts in [
        ("whole", layer["kept"]),
        ("constant", layer["pruned"]),
        *((f"{tier['width']} channels", tier["experts"]) for tier in layer["tiers"]),
    ]:
        wanted[fate] += sum(counts[expert] for expert in experts)
    assert len(wanted) > 2
    assert measured["half"].slots[0] == {
        fate: pytest.approx(count / counts.total()) for fate, count in wanted.items()
    }


NAMES = {"thin": "{} channels", "whole": "whole", TILTS: "tilt of {}"}


def named(parts: Parts, layer: int, fates: Fates) -> list[str]:
    """The fates of a layer's slots, by what its tensors were made of."""
    found = ["whole"] * len(fates.kept)
    for number, (kind, experts) in enumerate(fates.tiers, start=1):
        if experts:
            matrix = "tilt_out" if kind == TILTS else "down"
            size = parts.tensors[f"blk.{layer}.ffn_{matrix}_exps.t{number}.weight"].shape[0]
            found += [NAMES[kind].format(size)] * len(experts)
    return found + ["constant"] * len(fates.constant)


@pytest.mark.parametrize("name", ["qwen3moe", "deepseek2 in groups"])
def test_every_kind_of_tier_is_told_apart(name: str, tmp_path: Path) -> None:
    """By the definition of routing in plain PyTorch; with groups, ids are not slots."""
    whole = taken_apart(tiny_gguf(name, tmp_path))
    fates = fates_for(whole)
    parts = tiered(whole, fates)
    file = tmp_path / "tiers.gguf"
    file.write_bytes(put_together(parts))
    source = GgufFile(file)
    slots = fates_by_slot(source.header, source.spec)
    assert slots == {layer: named(parts, layer, own) for layer, own in fates.items()}
    tokens = np.random.default_rng(1).integers(0, 128, 48)
    found = predictions(file, Text("random", tokens[None])).slots
    for layer in fates:
        inputs = f"ffn_moe_logits-{layer}"
        x = torch.from_numpy(inside(file, tokens.tolist(), [inputs])[f"{inputs}.input"])
        reference = MoeLayer.of(file, layer)
        routed, _ = reference.route(x)
        table = reference.tensors.get("ffn_exps_slot")
        routed = routed if table is None else table.flatten()[routed].long()
        scored = routed[24:-1]  # all tokens are there: `inside` asks for the logits of each
        counts = Counter(slots[layer][slot] for slot in scored.flatten().tolist())
        assert len(counts) > 1
        wanted = {fate: pytest.approx(counts[fate] / scored.numel()) for fate in slots[layer]}
        assert found[layer] == wanted


def test_errors_of_quantiles_are_those_of_new_text() -> None:
    """Of exponential numbers in chunks that differ, beside quantiles of chunks drawn anew."""
    rng = np.random.default_rng(0)

    def drawn() -> np.ndarray:
        return rng.exponential(rng.uniform(0.5, 1.5, (40, 1)), (40, 100))

    shares = (0.5, 0.99)
    wanted = np.std([np.quantile(drawn(), shares) for _ in range(400)], axis=0)
    found = np.mean([[own.error for own in quantiles(drawn(), shares)] for _ in range(8)], axis=0)
    assert found == pytest.approx(wanted, rel=0.3)
    assert quantiles(drawn()[:1], shares)[0].error is None
    assert mean(np.array([[1.0, 2.0, 6.0]])) == Measured(3, pytest.approx(np.std([1, 2, 6], ddof=1) / 3**0.5))


def test_the_originals_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    texts = [Text("a", np.zeros((3, 8), int)), Text("b", np.zeros((2, 12), int))]
    kept = Originals(texts, 7)
    logits = {
        (text.name, chunk): torch.randn(text.targets.shape[1], 7)
        for text in texts
        for chunk in range(len(text.rows))
    }
    for text in texts:
        for chunk in range(len(text.rows)):
            kept.keep(text, chunk, logits[text.name, chunk])
    for text in reversed(texts):
        for chunk in range(len(text.rows)):
            assert torch.equal(kept.logits(text, chunk), logits[text.name, chunk])
    kept.close()


def test_too_little_room_is_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MoneError, match="temporary files need .* [kMGT]B: set TMPDIR"):
        Originals([Text("a", np.zeros((10**4, 4096), int))], 10**6)
