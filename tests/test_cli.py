"""The `mone-export` command: one line for whatever is wrong, nothing left behind, dry runs that hold."""

import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf_file
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_model, save_small
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from mone_export import cli
from mone_export.artifacts import Calibration
from mone_export.errors import MoneError
from mone_export.output.writing import OUTTYPES
from mone_export.pruning.novices import NOVICES
from mone_export.pruning.scoring import SCORES
from mone_export.recipe import NOVICE_NAMES, SCORE_NAMES
from mone_export.request import Request, prepare

pytestmark = pytest.mark.slow  # a whole command each

Change = Callable[[Path], None]
SMALL_TEXT = ["--chunks", "2", "-c", "32"]
CONSTANTS = ["--novice", "least-squares"]  # as `--allocate` means, and what has no second pass


class Outcome:
    """What a run of the command returned, said and left in the output folder."""

    def __init__(self, status: int, out: str, err: str, left: list[str]) -> None:
        self.status, self.out, self.err, self.left = status, out, err, left

    def is_one_line(self, pattern: str) -> None:
        """Assert that it failed with one line that matches, and left nothing."""
        assert self.status == 1, self.err
        (line,) = self.err.splitlines()
        assert re.match(rf"mone-export: .*{pattern}", line), line
        assert not self.left and not self.out


@pytest.fixture
def export(
    small: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Run the command in this process on a good model and text, unless arguments say otherwise."""
    folder = tmp_path / "out"
    folder.mkdir()

    def run(
        *arguments: Any, model: Path | str = small, ratio: float = 0.5, file: Path | None = text
    ) -> Outcome:
        given = [str(argument) for argument in arguments]
        if "-o" not in given:
            given += ["-o", str(folder / "model.gguf")]
        text_given = [] if file is None else ["-f", str(file)]
        status = cli.main([str(model), "--ratio", str(ratio), *text_given, *SMALL_TEXT, "-q", *given])
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err, sorted(path.name for path in folder.iterdir()))

    return run


@pytest.fixture
def changed(small: Path, tmp_path: Path) -> Callable[[Change], Path]:
    """A copy of the good model with something done to it."""

    def copy(change: Change) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(small, folder)
        change(folder)
        return folder

    return copy


def config(**values: Any) -> Change:
    """Set keys of config.json."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def weights(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"}
        )

    return change


def without(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def spoil(value: float) -> Change:
    return weights(lambda tensors: tensors["model.norm.weight"].__setitem__(3, value))


def of_type(model_type: str, **values: Any) -> Change:
    """Put the config of another model type in place, tiny."""

    def change(folder: Path) -> None:
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
        other = AutoConfig.for_model(model_type, **sizes, vocab_size=400, pad_token_id=0, **values)
        other.architectures = [type(AutoModelForCausalLM.from_config(other)).__name__]
        other.save_pretrained(folder)

    return change


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def split_weights(folder: Path) -> None:
    """Claim that a second file of weights exists."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    files = {"model.norm.weight": "model-00001-of-00002.safetensors"}
    files["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def drop_expert(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if re.search(r"layers\.1\..*experts\.3\.", name))]


BROKEN: dict[str, tuple[Change, str]] = {
    "no experts": (
        of_type("llama", num_key_value_heads=4),
        "no mixture-of-experts layers .*only models with",
    ),
    "no config": (without("config.json"), "has no config.json: pass the folder"),
    "no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        "cannot read .*config.json: .*; pass the folder of a model",
    ),
    "unknown model type": (
        config(model_type="mystery"),
        "cannot read .*config.json: .*mystery.*; pass the folder of a model",
    ),
    "unknown to the converter": (
        of_type(
            "flex_olmo", num_experts=8, num_experts_per_tok=2, num_key_value_heads=4, norm_topk_prob=False
        ),
        "llama.cpp has no converter for the model .*FlexOlmo.* only models that llama.cpp can run",
    ),
    "groups by their best expert": (
        of_type("deepseek_v2", n_group=2, topk_method="group_limited_greedy", norm_topk_prob=False),
        "topk_method = group_limited_greedy, but llama.cpp always computes deepseek2 with .* = greedy",
    ),
    "another normalisation": (
        of_type("olmoe", num_experts=8, num_experts_per_tok=2, norm_topk_prob=True),
        "norm_topk_prob = True, but llama.cpp always computes olmoe",
    ),
    "NVFP4": (
        config(quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"}),
        "quantised by modelopt, .* cannot unpack for calibration: pass the model's BF16",
    ),
    "AWQ": (config(quantization_config={"quant_method": "awq", "bits": 4}), "quantised by awq, .*: pass the"),
    "FP8 without a method": (config(quantization_config={"bits": 8}), "quantised by an unknown method"),
    "NaN": (spoil(float("nan")), "tensor model.norm.weight holds NaN or infinite values.*get it again"),
    "infinity": (spoil(float("inf")), "tensor model.norm.weight holds NaN or infinite values"),
    "no weights": (without("model.safetensors"), "holds neither model.safetensors nor .*: pass the folder"),
    "truncated weights": (truncate, "cannot read the weights .*; get it again"),
    "no weights in the file": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"version https://git-lfs"),
        "cannot read the weights .*; get it again",
    ),
    "no safetensors": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "holds neither model.safetensors nor .*: pass the folder",
    ),
    "a file of several missing": (
        split_weights,
        "lacks 1 of the 2 files of weights that its index lists: get model-00002-of-00002.safetensors",
    ),
    "an expert missing": (weights(drop_expert), "does not fit its config.json: .*experts"),
    "a norm missing": (
        weights(lambda tensors: tensors.pop("model.norm.weight")),
        "does not fit its config.json: it lacks model.norm.weight: get all files again",
    ),
    "a norm too short": (
        weights(lambda tensors: tensors.update({"model.norm.weight": torch.ones(32)})),
        "does not fit its config.json: .*model.norm.weight",
    ),
    "no vocabulary": (
        without("tokenizer.model"),
        "(cannot load the tokenizer|llama.cpp cannot convert the tokenizer) .*",
    ),
    "broken vocabulary": (
        lambda folder: (folder / "tokenizer.model").write_bytes(b"hello"),
        "(cannot load the tokenizer|llama.cpp cannot convert the tokenizer) .*",
    ),
    "broken tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        "(cannot load the tokenizer|llama.cpp cannot convert the tokenizer) .*",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_unusable_model_is_one_line(
    export: Callable[..., Outcome], changed: Callable[[Change], Path], name: str
) -> None:
    change, message = BROKEN[name]
    export(model=changed(change)).is_one_line(message)


def test_notices_of_transformers_are_not_shown(
    export: Callable[..., Outcome], changed: Callable[[Change], Path]
) -> None:
    """Not even where a program raised its verbosity before."""
    change, message = BROKEN["a norm missing"]
    handler = logging.StreamHandler()
    transformers_logging.add_handler(handler)
    transformers_logging.set_verbosity_warning()
    try:
        export(model=changed(change)).is_one_line(message)
    finally:
        transformers_logging.remove_handler(handler)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere/to/be/found", "neither a folder nor a Hugging Face id like org/model"),
        ("./missing", "neither a folder, a GGUF nor a Hugging Face id"),
        (__file__, "is no GGUF: pass one, or the folder of a checkpoint"),
        ("nowhere/model.gguf", "there is no file nowhere/model.gguf"),
    ],
)
def test_model_that_is_no_folder_is_one_line(
    export: Callable[..., Outcome], model: str, message: str
) -> None:
    export(model=model).is_one_line(message)


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (-0.1, "--ratio -0.1 is out of range: .* 0 <= ratio < 1"),
        (1.0, "--ratio 1 is out of range"),
        (float("nan"), "--ratio nan is out of range"),
        (0.9, "--ratio 0.9 keeps 2 of 16 experts, fewer than 4: pass --ratio 0.75 or less"),
    ],
)
def test_ratio_that_cannot_be_is_one_line(export: Callable[..., Outcome], ratio: float, message: str) -> None:
    export(ratio=ratio).is_one_line(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--outtype", "q9_9"], f"unknown --outtype q9_9: choose from {', '.join(OUTTYPES)}"),
        (["--chunks", "0"], "--chunks 0 of --ctx-size 32 tokens: at least 1 row"),
        (["-c", "0"], "--chunks 2 of --ctx-size 0 tokens: at least 1 row"),
        (["--chunks", "-5"], "--chunks -5 of"),
        (["--min-kept", "17"], "--min-kept 17 is more than the 16 experts"),
        (["--device", "tpu9"], "--device tpu9: .*try --device cpu"),
        (
            ["--chunks", "100000"],
            r"gives \d+ rows of 32 tokens .*asks for 100000: add text or pass --chunks \d+",
        ),
    ],
)
def test_option_that_cannot_be_is_one_line(
    export: Callable[..., Outcome], arguments: list[str], message: str
) -> None:
    export(*arguments).is_one_line(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the calibration text .*No such file or directory; pass a readable file"),
        (b"", "is empty; pass text"),
        (b"\xff\xfe\x00", "is not UTF-16-LE"),
        (b"three short words", "gives 0 rows of 32 tokens .*add text or lower --ctx-size"),
    ],
)
def test_text_that_cannot_be_used_is_one_line(
    export: Callable[..., Outcome], tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    export(file=path).is_one_line(message)


def test_two_files_too_short_are_named_with_their_rows(
    export: Callable[..., Outcome], tmp_path: Path
) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("a few words of text " * 20)
    outcome = export("-f", tmp_path / "b.txt", "--chunks", "50", file=tmp_path / "a.txt")
    outcome.is_one_line(r"a.txt, b.txt gives \d+ rows .*asks for 50: add text or pass --chunks \d+")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("missing/model.gguf", "output folder .*missing does not exist: create it or choose another -o"),
        ("file/model.gguf", "output folder .*file .*choose another -o"),
        ("/proc/model.gguf", "output folder /proc is not writable .*choose another -o"),
    ],
)
def test_output_that_cannot_be_is_one_line(
    export: Callable[..., Outcome], tmp_path: Path, place: str, message: str
) -> None:
    if place.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("needs a folder that nobody can write to")
    (tmp_path / "file").touch()
    export("-o", tmp_path / place).is_one_line(message)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission_is_one_line(export: Callable[..., Outcome], tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    export("-o", folder / "model.gguf").is_one_line("is not writable .*choose another -o")


def test_a_folder_that_is_not_there_is_no_file(
    export: Callable[..., Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        export("-o", f"{tmp_path / 'none'}/")
    assert f"there is no folder {tmp_path / 'none'}/: make it, or name a file" in capsys.readouterr().err


def test_a_plan_that_is_not_there_is_one_line(small: Path, tmp_path: Path) -> None:
    wanted = "cannot read the plan .*none.json: No such file or directory; pass what --plan-out wrote"
    with pytest.raises(MoneError, match=wanted):
        prepare(Request(model=small, plan=tmp_path / "none.json"))


@pytest.mark.parametrize("name", ["missing.txt", "missing.txt=0.5"])
def test_a_text_that_is_not_there_is_refused_first(
    export: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("mone_export.request.open_source", None)  # would be the first thing that is read
    export("-f", name).is_one_line("cannot read the calibration text missing.txt: No such file")


def test_too_little_disk_is_one_line_before_any_work(
    export: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(
        "mone_export.source.checkpoint.fingerprint", None
    )  # would be the first reading of weights
    export().is_one_line(r"has 1\.00 kB free, the export needs [\d.]+ MB: free some space, choose another -o")


def test_statistics_in_an_impossible_place_are_refused_before_any_work(
    export: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mone_export.source.checkpoint.fingerprint", None)
    export("--stats", tmp_path / "missing" / "s").is_one_line("missing does not exist: .*another --stats")


@pytest.fixture(scope="module")
def stats(small: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of the good model and text."""
    folder = tmp_path_factory.mktemp("stats")
    arguments = [str(small), "--ratio", "0.5", "-f", str(text), *SMALL_TEXT, "-q"]
    assert cli.main([*arguments, "--stats", str(folder / "s"), "-o", str(folder / "model.gguf")]) == 0
    return folder / "s"


def test_statistics_of_another_model_are_refused_with_both_fingerprints(
    export: Callable[..., Outcome], stats: Path, tmp_path: Path
) -> None:
    other = save_small(tmp_path / "other", seed=1)
    pattern = (
        r"s was made from another model \(SHA-256 ([0-9a-f]{16}), this one is (?!\1)[0-9a-f]{16}\): choose"
    )
    export("--stats", stats, model=other).is_one_line(pattern)


def test_statistics_of_another_text_are_refused_with_both_fingerprints(
    export: Callable[..., Outcome], stats: Path
) -> None:
    pattern = r"another calibration text \(SHA-256 ([0-9a-f]{16}), this one is (?!\1)[0-9a-f]{16}\): choose"
    export("--stats", stats, "--chunks", "3").is_one_line(pattern)
    export("--stats", stats, file=Path(__file__)).is_one_line(pattern)


def test_statistics_are_taken_as_they_are_where_no_text_is_given(
    export: Callable[..., Outcome], stats: Path, tmp_path: Path, text: Path
) -> None:
    assert export(*CONSTANTS, "-o", tmp_path / "text.gguf").status == 0
    assert export("--stats", stats, "-o", tmp_path / "none.gguf", file=None).status == 0
    assert gguf_file.without_command(tmp_path / "text.gguf") == gguf_file.without_command(
        tmp_path / "none.gguf"
    )
    assert f"text     {text.name} 64 tokens" in export("--stats", stats, "--dry-run", file=None).out


def test_saved_statistics_need_nothing_that_builds_models(small: Path, stats: Path, tmp_path: Path) -> None:
    """It takes longer to import than all the rest of such a command."""
    options = [str(small), "--ratio", "0.5", "--stats", str(stats), "-o", str(tmp_path / "f.gguf"), "-q"]
    heavy = ["transformers.modeling_utils", "torch._dynamo", "torch.distributed.tensor"]
    code = f"""
import sys
from mone_export.cli import main
assert main({options!r}) == 0
assert not (found := [name for name in {heavy!r} if name in sys.modules]), found
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_mix_of_texts_is_reported_and_announced(
    export: Callable[..., Outcome],
    small: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": "word " * 100}))
    options = ["-f", f"{text}=3", "-f", f"{tmp_path / 'b.jsonl'}=1", "--field", "body", "--chunks", "4"]
    wanted = f"text     {text.name} 96 tokens, b.jsonl 32 tokens"
    assert wanted in export(*options, "--dry-run", file=None).out
    stats = str(tmp_path / "s")
    arguments = ["--ratio", "0.5", "-c", "32", *options, "--stats", stats, "-o", str(tmp_path / "x.gguf")]
    assert cli.main([str(small), *arguments]) == 0
    out = capsys.readouterr().out
    assert wanted in out
    count = Calibration.load(Path(stats)).layers[0].count.tolist()
    rare = [expert for expert, n in enumerate(count) if n < 32]
    notes = re.findall(
        r"note     layer 0: (\d+) experts seen .* 32 of 128 tokens \((\d+) never, .*: (.*)", out
    )
    assert notes == [(str(len(rare)), str(count.count(0)), ", ".join(map(str, rare)))]


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_file_that_holds_no_statistics_is_refused(
    export: Callable[..., Outcome], tmp_path: Path, more: list[str]
) -> None:
    (tmp_path / "s").write_text("something else")
    export("--stats", tmp_path / "s", *more).is_one_line("s is not a statistics file .*choose another file")


def test_dry_run_refuses_statistics_of_a_model_of_another_shape(
    export: Callable[..., Outcome], stats: Path, tmp_path: Path
) -> None:
    other = save_small(tmp_path / "other", num_local_experts=8, num_experts_per_tok=2)
    outcome = export("--stats", stats, "--dry-run", model=other)
    outcome.is_one_line("s was made with another config.json, different in num_experts")


def test_saved_statistics_give_the_same_file(
    export: Callable[..., Outcome], stats: Path, tmp_path: Path
) -> None:
    for arguments in ([], ["--stats", stats]):
        assert export(*arguments, "-o", tmp_path / f"{len(arguments)}.gguf").status == 0
    assert (tmp_path / "0.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()


@pytest.mark.parametrize("ratio", [0, 0.5])
@pytest.mark.parametrize(
    "options", [[], ["--score", "frequency", "--novice", "least-squares"], ["--outtype", "q8_0"]], ids=str
)
def test_dry_run_writes_nothing_and_its_bytes_are_the_real_files(
    export: Callable[..., Outcome], tmp_path: Path, ratio: float, options: list[str]
) -> None:
    outcome = export("--dry-run", *options, ratio=ratio)
    assert (outcome.status, outcome.left, outcome.err) == (0, [], "")
    kept = 16 - round(16 * ratio)
    if ratio:
        assert f"keep {kept} of 16 experts on average" in outcome.out
        assert re.search(r"size     about [\d.]+ [kM]B, \d+% of about [\d.]+ MB", outcome.out)
        options = [*options, "--allocate", "even"]
        outcome = export("--dry-run", *options, ratio=ratio)
    (announced,) = re.findall(r"\((\d+) bytes\)", outcome.out)
    assert outcome.out.count(f"keep {kept}, prune {16 - kept}") == 3
    assert export(*options, ratio=ratio).left == ["model.gguf"]
    assert (tmp_path / "out" / "model.gguf").stat().st_size == int(announced)


def test_dry_run_with_statistics_names_the_experts_of_the_real_file(
    export: Callable[..., Outcome], stats: Path, small: Path, tmp_path: Path
) -> None:
    found = re.findall(
        r"layer +\d+  keep (\d+), prune \d+: ([\d ]+)", export(*CONSTANTS, "--dry-run", "--stats", stats).out
    )
    ids = [[int(expert) for expert in pruned.split()] for _, pruned in found]
    assert len(ids) == 3 and all(layer == sorted(set(layer)) for layer in ids)
    assert [16 - len(layer) for layer in ids] == [int(n_kept) for n_kept, _ in found]
    export(*CONSTANTS, "--stats", stats, "-o", tmp_path / "model.gguf")
    tensors, weights = gguf_file.read(tmp_path / "model.gguf").tensors, load_file(small / "model.safetensors")
    for layer, pruned in enumerate(ids):
        order = [expert for expert in range(16) if expert not in pruned] + pruned
        (router,) = (
            weights[name] for name in weights if re.search(rf"layers\.{layer}\..*gate\.weight", name)
        )
        found = torch.from_numpy(tensors[f"blk.{layer}.ffn_gate_inp.weight"].data.copy())
        assert torch.equal(found, router[order].float())


def test_dry_run_of_an_impossible_ratio_is_one_line(export: Callable[..., Outcome]) -> None:
    export("--dry-run", ratio=0.9).is_one_line("keeps 2 of 16 experts, fewer than 4")


@pytest.mark.parametrize(
    ("arguments", "method"),
    [
        ([], "mone"),
        (["--stock"], "drop"),
        (["--method", "drop"], "drop"),
        (["--stock", "--method", "drop"], "drop"),
    ],
)
def test_stock_decides_the_method_where_none_is_named(arguments: list[str], method: str) -> None:
    """As far as it is known before the model is."""
    args = cli.parse(["folder", "--ratio", "0.5", "-o", "x", *arguments])
    assert Request(model="folder", ratio=0.5, stock=args.stock, method=args.method).recipe.method == method


def test_stock_contradicts_novices(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["folder", "--ratio", "0.5", "-o", "x", "--stock", "--method", "mone"]) == 1
    assert "novices need the patched llama.cpp" in capsys.readouterr().err


def test_counts_are_searched_in_the_model(export: Callable[..., Outcome], tmp_path: Path) -> None:
    for number in range(2):
        outcome = export("--allocate", "search", "-o", tmp_path / f"{number}.gguf")
        assert outcome.status == 0, outcome.err
    keys = gguf_file.read(tmp_path / "0.gguf").keys
    counts = keys["llama.expert_kept_count"][1]
    assert sum(count or 16 for count in counts) == 3 * 8 and keys["mone.scope"][1] == "search"
    assert (tmp_path / "0.gguf").read_bytes() == (tmp_path / "1.gguf").read_bytes()
    export("--allocate", "search", "--stock").is_one_line("--allocate search does not: leave one of them out")


def test_counts_follow_the_sensitivities_in_the_statistics(
    export: Callable[..., Outcome], stats: Path, tmp_path: Path
) -> None:
    """A layer keeps most experts where it matters most, and fewest where it matters least."""
    for factor, holds in ((1e6, max), (1e-6, min)):
        calibration = Calibration.load(stats)
        sensitivity = dict.fromkeys(calibration.layers, 1.0) | {1: factor}
        replace(calibration, sensitivity=sensitivity).save(tmp_path / "stats")
        outcome = export(*CONSTANTS, "--stats", tmp_path / "stats", "-o", tmp_path / "model.gguf")
        assert outcome.status == 0, outcome.err
        keys = gguf_file.read(tmp_path / "model.gguf").keys
        counts = [count or 16 for count in keys["llama.expert_kept_count"][1]]
        assert sum(counts) == 3 * 8 and counts[1] == holds(counts) != 8, counts
        assert keys["mone.scope"][1] == "sensitivity"


def test_statistics_without_sensitivities_mean_even_counts(
    export: Callable[..., Outcome], stats: Path, tmp_path: Path
) -> None:
    """Unless the text is there to measure them on, as after a run that was ended while it did."""
    replace(Calibration.load(stats), sensitivity={}).save(tmp_path / "stats")
    outcome = export("--stats", tmp_path / "stats", "-o", tmp_path / "model.gguf", file=None)
    assert outcome.status == 0, outcome.err
    assert export(*CONSTANTS, "--stats", tmp_path / "stats", "-o", tmp_path / "whole.gguf").status == 0
    assert (tmp_path / "stats").read_bytes() == stats.read_bytes()
    keys = gguf_file.read(tmp_path / "model.gguf").keys
    assert keys["mone.scope"][1] == "layer" and keys["llama.expert_kept_count"][1] == [8, 8, 8]


@pytest.mark.parametrize("allocate", ["sensitivity", "search"])
def test_counts_are_decided_in_one_way(allocate: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["folder", "--ratio", "0.5", "-o", "x", "--scope", "model", "--allocate", allocate])
    assert stop.value.code == 2
    assert f"--scope model with --allocate {allocate}: leave one" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--score", "aimer"], ["--scope", "model"], ["--score", "random"], ["--no-guard"], ["--sequential"]],
)
def test_pruning_options_are_carried_out(
    export: Callable[..., Outcome], arguments: list[str], tmp_path: Path
) -> None:
    outcome = export(*CONSTANTS, *arguments, "-o", tmp_path / "model.gguf")
    assert outcome.status == 0, outcome.err
    keys = gguf_file.read(tmp_path / "model.gguf").keys
    counts = keys["llama.expert_kept_count"][1]
    assert sum(count or 16 for count in counts) == 3 * 8 and all(count == 0 or count >= 4 for count in counts)
    if len(arguments) > 1:
        assert keys[f"mone.{arguments[0][2:]}"][1] == arguments[1]


def test_layer_after_layer_the_plan_file_has_the_scores_that_decided(
    export: Callable[..., Outcome], tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    outcome = export(
        "--sequential", "--allocate", "even", "--no-guard", "--plan-out", plan, "-o", tmp_path / "model.gguf"
    )
    assert outcome.status == 0, outcome.err
    for layer in json.loads(plan.read_text())["layers"].values():
        scores = [-math.inf if score is None else score for score in layer["scores"]]
        assert min(scores[expert] for expert in layer["kept"]) >= max(scores[n] for n in layer["pruned"])


def test_joint_novices_are_written(export: Callable[..., Outcome], tmp_path: Path) -> None:
    for name in ("joint", "least-squares"):
        outcome = export("--novice", name, "-o", tmp_path / f"{name}.gguf")
        assert outcome.status == 0, outcome.err
    joint, single = (gguf_file.read(tmp_path / f"{name}.gguf") for name in ("joint", "least-squares"))
    assert joint.keys["mone.novice"][1] == "joint"
    for name, tensor in single.tensors.items():
        other = joint.tensors[name].data
        assert (other.tobytes() != tensor.data.tobytes()) == name.endswith("ffn_down_exps.bias"), name


def test_interruption_leaves_nothing(export: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mone_export.source.llamacpp.Conversion.write_tensors", interrupt)
    outcome = export()
    assert outcome.status == 130 and not outcome.left
    assert outcome.err == "mone-export: interrupted; nothing was written\n"


def test_choices_are_the_registries() -> None:
    assert {*SCORES, "random", "aimer"} == {*SCORE_NAMES}
    assert {*NOVICES, "joint", "thin"} == {*NOVICE_NAMES}
    named = re.findall(r"\w+", cli.make_parser().format_help().partition("TYPE  ")[2].partition("...")[0])
    assert "f32" in named
    assert set(named) <= set(OUTTYPES)


def test_defaults_are_those_of_the_function() -> None:
    given = {"model": "folder", "outfile": Path("x"), "ratio": 0.5}
    args = cli.parse(["folder", "--ratio", "0.5", "-o", "x"])
    request = Request(**cli.request_options(args))
    assert request.command == "mone-export folder --ratio 0.5 -o x"
    assert replace(request, files=(), datasets=(), protect=(), command="") == Request(**given)
    assert not request.files and not request.datasets and not request.protect


@pytest.mark.parametrize(
    "arguments", [[], ["model"], ["model", "--ratio", "x", "-o", "f"], ["--score", "magic"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: mone-export" in capsys.readouterr().err


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from mone_export.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print({'torch', 'transformers', 'numpy'} & sys.modules.keys())"
    )
    times = []
    for _ in range(3):  # another process may be busy
        start = time.monotonic()
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        times.append(time.monotonic() - start)
        if times[-1] < 2:
            break
    assert result.stdout.endswith("set()\n") and "--ratio" in result.stdout
    assert min(times) < 2


def test_terminal_sees_one_line_and_no_traceback(tmp_path: Path) -> None:
    """A process of its own: nothing that transformers or torch say on their own account comes between."""
    model = random_model("MixtralForCausalLM", 200)
    model.config.model_type = "mystery"
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict() | {"model_type": "mystery"}))
    command = [
        sys.executable,
        "-m",
        "mone_export",
        str(tmp_path),
        "--ratio",
        "0.5",
        "-o",
        str(tmp_path / "x.gguf"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and not result.stdout
    assert result.stderr.startswith("mone-export: transformers cannot read ")
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_an_output_folder_gets_a_file_named_after_the_request(
    export: Callable[..., Outcome], tmp_path: Path
) -> None:
    outcome = export("-o", tmp_path / "out", "--outtype", "q8_0")
    assert outcome.status == 0, outcome.err
    assert outcome.left == ["small-50pc-q8_0.gguf"]


def test_a_share_may_be_a_percentage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.parse(["folder", "--ratio", "37.5%", "-o", "x"]).ratio == 0.375
    with pytest.raises(SystemExit):
        cli.parse(["folder", "--ratio", "half", "-o", "x"])
    assert "half is no share: write 0.5 or 50%" in capsys.readouterr().err


@pytest.mark.parametrize("size", [".", "", "G", "1..5G"])
def test_no_size_is_no_size(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse(["folder", "--fit", size, "-o", "x"])
    assert stop.value.code == 2 and "is no size: write 12G" in capsys.readouterr().err


def test_a_size_of_nothing_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse(["folder", "--fit", "0", "-o", "x"])
    assert stop.value.code == 2 and "0 holds nothing: write 12G" in capsys.readouterr().err


def test_a_dry_run_needs_no_output(export: Callable[..., Outcome], small: Path, text: Path) -> None:
    arguments = [str(small), "--ratio", "0.5", "-f", str(text), *SMALL_TEXT, "-q", "--dry-run"]
    assert cli.main(arguments) == 0
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments[:-1])
    assert stop.value.code == 2


def test_help_lists_what_most_need_and_help_all_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    for option, has_all in (("--help", False), ("--help-all", True)):
        with pytest.raises(SystemExit) as stop:
            cli.main([option])
        assert stop.value.code == 0
        listed = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out.partition("examples:")[0]))
        assert {"--ratio", "--fit", "--stats", "--outtype", "--help-all"} <= listed
        assert ("--novice" in listed) == ("--seed" in listed) == has_all


def test_options_are_not_abbreviated() -> None:
    with pytest.raises(SystemExit):
        cli.parse(["folder", "--ratio", "0.5", "-o", "x", "--nov", "mean"])


CONTRADICTIONS = [
    (["--sequential", "--novice", "joint"], "--sequential and --novice joint .*leave one of them out"),
    (["--sequential", "--score", "aimer"], "leave out --method and --score aimer, or --sequential"),
    (["--until-stable", "0.9", "--score", "aimer"], "--until-stable with --score aimer.*leave one"),
    (["--allocate", "search", "--stream", "on"], "--allocate search .*leave out --stream on, or pass"),
    (["--novice", "mean", "--stock"], "--novice mean with --method drop.*leave one"),
    (["--allocate", "model", "--stock"], "--method drop keeps the same .*leave one"),
    (["--min-kept", "0"], "--min-kept 0 is out of range"),
    (["--seed", "-1"], "--seed -1 is out of range"),
    (["--fit", "1G", "--min-kept", "999"], "--min-kept 999 is more than the 16 experts"),
    (["--fit", "1G", "--allocate", "model"], "--allocate even or sensitivity, not model"),
]


@pytest.mark.parametrize(("arguments", "message"), CONTRADICTIONS, ids=lambda value: " ".join(value))
def test_contradictions_are_refused_before_any_work(
    export: Callable[..., Outcome], arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mone_export.source.checkpoint.fingerprint", None)
    export(*arguments).is_one_line(message)


def test_nothing_is_calibrated_for_what_needs_no_statistics(
    export: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mone_export.calibration.passes.calibrate", None)
    for number, arguments in enumerate(
        (["--stock", "--score", "aimer"], ["--stock", "--score", "random"], ["--fit", "1G", "--ratio", "0"])
    ):
        outcome = export(*arguments, "-o", tmp_path / f"{number}.gguf")
        assert outcome.status == 0, outcome.err
    assert export("-o", tmp_path / "whole.gguf", ratio=0).status == 0
    keys = gguf_file.read(tmp_path / "whole.gguf").keys
    claims = {"mone.score", "mone.novice", "mone.scope", "mone.method", "mone.calibration.sha256"}
    assert not claims.intersection(keys), "nothing was scored, and nothing stands in"


def test_a_probe_that_fails_costs_neither_the_statistics_nor_the_file(
    export: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        assert (tmp_path / "s").exists(), "saved first"
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("mone_export.calibration.engines.damage_by_layer", fail)
    outcome = export(*CONSTANTS, "--stats", tmp_path / "s", "-o", tmp_path / "model.gguf")
    assert outcome.status == 0, outcome.err
    assert gguf_file.read(tmp_path / "model.gguf").keys["mone.scope"][1] == "layer"


def test_an_unexpected_error_is_one_line_and_one_event(
    export: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero\nand more")

    monkeypatch.setattr("mone_export.request.layouts", fail)
    export().is_one_line(r"unexpected ZeroDivisionError: division by zero \(-v shows where\)")
    outcome = export("--json")
    (event,) = map(json.loads, outcome.out.splitlines())
    assert (event["event"], event["status"]) == ("error", 1)


@pytest.mark.parametrize("kind", ["__del__", "finalize"])
def test_a_signal_waits_for_the_end_of_a_finaliser(kind: str, small: Path, tmp_path: Path) -> None:
    """Such as one that removes a temporary folder: what is raised there is printed by Python, and lost."""
    code = f"""
import os, signal, sys, time, weakref
from mone_export import cli, pipeline
def remove():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    print("removed", flush=True)
class Folder:
    if "{kind}" == "__del__":
        def __del__(self):
            remove()
    else:
        def __init__(self):
            weakref.finalize(self, remove)
def stop(*_, **__):
    Folder()
    time.sleep(30)
pipeline.export = stop
sys.exit(cli.main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", code, str(small), "--ratio", "0.5", "-o", str(tmp_path / "model.gguf")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (143, "removed\n")
    assert result.stderr == "mone-export: terminated; nothing was written\n"


@pytest.mark.parametrize(
    ("name", "status", "said"), [("SIGTERM", 143, "terminated"), ("SIGINT", 130, "interrupted")]
)
def test_a_second_signal_does_not_disturb_the_cleaning_up(
    name: str, status: int, said: str, small: Path, text: Path, tmp_path: Path
) -> None:
    """A process of its own is ended while it writes, and once more while it removes what it has written."""
    code = f"""
import os, shutil, signal, sys, time
from mone_export import cli, paths
from mone_export.source.llamacpp import Conversion
def stop(*_, **__):
    os.kill(os.getpid(), signal.{name})
    time.sleep(30)
def remove(*arguments, **named):
    os.kill(os.getpid(), signal.{name})
    removed(*arguments, **named)
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
Conversion.write_tensors, removed, shutil.rmtree = stop, shutil.rmtree, remove
sys.exit(cli.main(sys.argv[1:]))
"""
    arguments = [str(small), "--ratio", "0.5", "-f", str(text), *SMALL_TEXT, "-q"]
    command = [sys.executable, "-c", code, *arguments, "-o", str(tmp_path / "model.gguf")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == status, result.stderr
    assert result.stderr == f"mone-export: {said}; nothing was written\n"
    assert not list(tmp_path.iterdir())


def test_termination_unwinds_like_an_interruption(small: Path, text: Path, tmp_path: Path) -> None:
    """A process of its own is ended while it writes."""
    code = """
import os, signal, sys, time
from mone_export import cli
from mone_export.source.llamacpp import Conversion
def wait(*_, **__):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
Conversion.write_tensors = wait
sys.exit(cli.main(sys.argv[1:]))
"""
    arguments = [str(small), "--ratio", "0.5", "-f", str(text), *SMALL_TEXT, "-q"]
    command = [sys.executable, "-c", code, *arguments, "-o", str(tmp_path / "model.gguf")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 143, result.stderr
    assert result.stderr == "mone-export: terminated; nothing was written\n"
    assert not list(tmp_path.iterdir())
