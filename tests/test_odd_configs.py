"""Configs and tokenizers of unexpected form: a file that loads, or one line that names the cause."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_file
import numpy as np
import pytest
from llama_logits import logits
from tiny import random_model, save_small

from mone_export import cli
from mone_export.source import llamacpp

Case = tuple[str, str, Any]
Change = Callable[[Path], None]
N_VOCAB = 400
FAMILIES = {
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}
ABSENT = object()

# (family, key, value): one value of config.json in another's place
HARMLESS: list[Case] = [
    ("mixtral", "router_jitter_noise", 0.1),
    ("mixtral", "hidden_act", "gelu"),
    *(("mixtral", "sliding_window", value) for value in (128, 4096)),
    ("mixtral", "tie_word_embeddings", True),
    ("mixtral", "max_position_embeddings", 16),
    *(("mixtral", "rope_parameters", value) for value in (None, {})),
    ("mixtral", "rope_theta", None),
    *(("mixtral", "quantization_config", value) for value in (None, {"quant_method": "fp8"})),
    ("mixtral", "architectures", ["MixtralForCausalLM", "Other"]),
    ("mixtral", "dtype", None),
    *(("mixtral", "eos_token_id", value) for value in (None, 5000, [0, 1], [])),
    ("mixtral", "pad_token_id", None),
    ("qwen3_moe", "head_dim", ABSENT),
    *(("qwen3_moe", "mlp_only_layers", value) for value in (None, [99])),
    ("qwen3_moe", "use_sliding_window", True),
    ("olmoe", "norm_topk_prob", ABSENT),
    ("olmoe", "clip_qkv", 8.0),
    ("deepseek_v2", "n_group", None),
    ("deepseek_v2", "topk_method", ABSENT),
    ("gpt_oss", "layer_types", None),
]
REFUSED: list[Case] = [
    *(("mixtral", "head_dim", value) for value in (0, -16, "16", 15, 3.5, True)),
    *(
        ("mixtral", "num_hidden_layers", value)
        for value in (0, 1, 2, 4, 9, 2**31, -1, None, "3", 2.5, ABSENT)
    ),
    *(("mixtral", "vocab_size", value) for value in (None, 0, -5, 10, 399, 401, "400", ABSENT)),
    *(("mixtral", "num_local_experts", value) for value in (0, None, 8, 12, 17, -1, "16", 16.0, ABSENT)),
    *(
        ("mixtral", "num_experts_per_tok", value)
        for value in (0, 17, -1, None, "4", 2.5, [4, 4, 4], [4, 4, 2], [])
    ),
    *(("mixtral", "router_jitter_noise", value) for value in (0, None, "x")),
    *(("mixtral", "rms_norm_eps", value) for value in ("x", None, 0, -1e-5, "1e-5", 1)),
    *(("mixtral", "hidden_size", value) for value in (0, -64, 32, 65, None, "64")),
    *(("mixtral", "num_attention_heads", value) for value in (0, -4, 3, None)),
    *(("mixtral", "num_key_value_heads", value) for value in (0, -2, 3, 8, None)),
    *(("mixtral", "intermediate_size", value) for value in (0, -96, 95, None)),
    *(("mixtral", "hidden_act", value) for value in ("mystery", None, 3)),
    *(("mixtral", "sliding_window", value) for value in (0, -1, "x", [128])),
    *(("mixtral", "tie_word_embeddings", value) for value in (None, "x")),
    *(("mixtral", "max_position_embeddings", value) for value in (0, -1, None, "512")),
    *(
        ("mixtral", "rope_parameters", value)
        for value in (
            [],
            "default",
            {"rope_type": "mystery", "rope_theta": 1e6},
            {"rope_theta": None, "rope_type": "default"},
            {"rope_theta": "x", "rope_type": "default"},
            {"rope_type": "linear", "rope_theta": 1e6},
            {"rope_type": "yarn", "rope_theta": 1e6, "factor": "x"},
        )
    ),
    *(("mixtral", "rope_theta", value) for value in (0, -1)),
    *(
        ("mixtral", "quantization_config", value)
        for value in ({}, [], "fp8", {"quant_method": None}, {"quant_method": 3})
    ),
    *(
        ("mixtral", "architectures", value)
        for value in ([], None, ["Mystery"], "MixtralForCausalLM", [None], 3)
    ),
    *(("mixtral", "model_type", value) for value in (None, "", 3, [], "qwen3_moe", ABSENT)),
    *(("mixtral", "dtype", value) for value in ("mystery", "float8", 3, "int8")),
    *(("mixtral", "eos_token_id", value) for value in (-1, "x")),
    *(("mixtral", "pad_token_id", value) for value in (-1, 5000)),
    ("mixtral", "text_config", {}),
    ("mixtral", "auto_map", 3),
    ("mixtral", "layer_types", ["mystery"]),
    *(("qwen3_moe", "norm_topk_prob", value) for value in (ABSENT, None, False, "true")),
    *(("qwen3_moe", "num_local_experts", value) for value in (0, 12, None)),
    *(("qwen3_moe", "head_dim", value) for value in (0, None)),
    *(("qwen3_moe", "mlp_only_layers", value) for value in ([0], "x")),
    *(("qwen3_moe", "decoder_sparse_step", value) for value in (0, 2, None)),
    ("qwen3_moe", "moe_intermediate_size", 0),
    *(("olmoe", "norm_topk_prob", value) for value in (True, None)),
    *(("olmoe", "clip_qkv", value) for value in (0, "x")),
    ("olmoe", "num_experts", None),
    *(("deepseek_v2", "first_k_dense_replace", value) for value in (None, 0, 3, 99, -1)),
    *(("deepseek_v2", "n_group", value) for value in (0, 3)),
    *(("deepseek_v2", "topk_method", value) for value in (None, "mystery")),
    *(("deepseek_v2", "q_lora_rank", value) for value in (None, 0)),
    *(("deepseek_v2", "routed_scaling_factor", value) for value in (None, "x", 0)),
    *(("deepseek_v2", "n_shared_experts", value) for value in (None, 0, 2)),
    *(("gpt_oss", "layer_types", value) for value in ([], ["mystery"] * 4, ["full_attention"])),
    *(("gpt_oss", "sliding_window", value) for value in (None, 0, "x")),
    *(("gpt_oss", "swiglu_limit", value) for value in (None, "x")),
]


# what a message may name in the place of the key, besides the value and a tensor that does not fit
OTHER_WORDS = {
    "num_hidden_layers": "layers",
    "num_local_experts": "experts",
    "first_k_dense_replace": "all layers dense",
    "rope_parameters": "NoneType|'mystery'",
    "quantization_config": "quantised by",
    "architectures": "no converter for the model",
    "model_type": "model type|Qwen3MoeForCausalLM|cannot build MixtralForCausalLM",
    "eos_token_id": "special token type eos",
    "pad_token_id": "special token type pad|Padding_idx",
    "text_config": "'dict' object has no attribute",
}
A_TENSOR = r"does not fit its config.json: .*(\.weight|experts|layers)"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny model of each family, all with the vocabulary of the first."""
    parent = tmp_path_factory.mktemp("models")
    found = {"mixtral": save_small(parent / "mixtral", n_vocab=N_VOCAB)}
    for name, family in FAMILIES.items():
        if name not in found:
            random_model(family, N_VOCAB).save_pretrained(parent / name)
            for file in ("tokenizer.model", "tokenizer_config.json"):
                shutil.copy(found["mixtral"] / file, parent / name)
            found[name] = parent / name
    return found


@pytest.fixture(autouse=True)
def small_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every family's converter take the small vocabulary."""
    seam = "converter_class" if hasattr(llamacpp, "converter_class") else "_converter_class"
    known = getattr(llamacpp, seam)

    def find(conversion: Any, path: Path) -> Any:
        base = known(conversion, path)
        body = {"model_arch": base.model_arch, "set_vocab": lambda self: self._set_vocab_sentencepiece()}
        return type(base.__name__, (base,), body)

    monkeypatch.setattr(llamacpp, seam, find)


def named(case: Case) -> str:
    family, key, value = case
    return f"{family}-{key}-{'absent' if value is ABSENT else json.dumps(value)}"


@pytest.fixture
def export(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[Path], tuple[int, str, Path]]:
    """Run the command on a folder; returns its status, what it said, and where its file is."""

    def run(folder: Path) -> tuple[int, str, Path]:
        out = tmp_path / "out"
        out.mkdir()
        arguments = [str(folder), "--ratio", "0.5", "-f", str(text), "--chunks", "1", "-c", "16", "-q"]
        status = cli.main([*arguments, "-o", str(out / "model.gguf")])
        err = capsys.readouterr().err
        if status:
            (line,) = err.splitlines()
            assert status == 1 and line.startswith("mone-export: ") and "unexpected" not in line, line
            assert not list(out.iterdir())
        return status, err, out / "model.gguf"

    return run


def with_value(folder: Path, models: dict[str, Path], case: Case) -> Path:
    """Copy a model with one value of its config changed."""
    family, key, value = case
    shutil.copytree(models[family], folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop(key, None)
    if value is not ABSENT:
        config[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", HARMLESS, ids=named)
@pytest.mark.by_day(9)
def test_harmless_value_gives_a_file(
    models: dict[str, Path], case: Case, tmp_path: Path, export: Callable[[Path], tuple[int, str, Path]]
) -> None:
    status, err, file = export(with_value(tmp_path / "model", models, case))
    assert status == 0, err
    keys = gguf_file.read(file).keys
    assert any(key.endswith(".expert_kept_count") for key in keys), sorted(keys)


@pytest.mark.slow
@pytest.mark.upstream
@pytest.mark.parametrize("case", HARMLESS, ids=named)
@pytest.mark.by_day(9)
def test_file_of_a_harmless_value_runs(
    models: dict[str, Path], case: Case, tmp_path: Path, export: Callable[[Path], tuple[int, str, Path]]
) -> None:
    _, _, file = export(with_value(tmp_path / "model", models, case))
    assert np.isfinite(logits(file, [1, 5, 9, 200], n_batch=4)).all()


@pytest.mark.parametrize("case", REFUSED, ids=named)
def test_value_that_cannot_be_is_named(
    models: dict[str, Path], case: Case, tmp_path: Path, export: Callable[[Path], tuple[int, str, Path]]
) -> None:
    status, err, _ = export(with_value(tmp_path / "model", models, case))
    assert status == 1
    words = [case[1], re.escape(str(case[2])), OTHER_WORDS.get(case[1], case[1]), A_TENSOR]
    cause = err.replace(str(tmp_path), "")
    assert re.search("|".join(words), cause), cause


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"3",
        b"null",
        b'"config"',
        b"",
        b"{",
        b"\xff\xfe{}",
        b"{}",
        b'{"a": NaN',
        b"\0" * 100,
        b"[" * 100000,
    ],
    ids=lambda content: repr(content[:10]),
)
def test_config_that_is_none_is_one_line(
    models: dict[str, Path],
    content: bytes,
    tmp_path: Path,
    export: Callable[[Path], tuple[int, str, Path]],
) -> None:
    folder = shutil.copytree(models["mixtral"], tmp_path / "model")
    (folder / "config.json").write_bytes(content)
    status, err, _ = export(folder)
    assert status == 1 and "config.json" in err


def _edited(**values: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def _holds(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)  # type: ignore[func-returns-value]


BROKEN_TOKENIZERS: dict[str, Change] = {
    "settings are a list": _holds("tokenizer_config.json", b"[]"),
    "settings are no JSON": _holds("tokenizer_config.json", b"{"),
    "settings are no text": _holds("tokenizer_config.json", b"\xff\xfe\0"),
    "class is a number": _edited(tokenizer_class=3),
    "class is unknown": _edited(tokenizer_class="MysteryTokenizer"),
    "added tokens are a list": _edited(added_tokens_decoder=[1, 2]),
    "an added token has no number": _edited(added_tokens_decoder={"x": {"content": "<x>"}}),
    "an added token has no text": _edited(added_tokens_decoder={"5000": {}}),
    "an added token is beyond the embeddings": _edited(added_tokens_decoder={"5000": {"content": "<x>"}}),
    "model is empty": _holds("tokenizer.model", b""),
    "model is cut off": lambda folder: _cut(folder / "tokenizer.model"),
    "model is a page": _holds("tokenizer.model", b"<html>not found</html>"),
    "model is missing": lambda folder: (folder / "tokenizer.model").unlink(),
    "tokenizer.json is a list": _holds("tokenizer.json", b"[]"),
    "tokenizer.json is empty": _holds("tokenizer.json", b""),
    "tokenizer.json has no model": _holds("tokenizer.json", b'{"version": "1.0"}'),
    "special tokens are a list": _holds("special_tokens_map.json", b"[]"),
    "added tokens are text": _holds("added_tokens.json", b'"x"'),
    "template is no template": _edited(chat_template="{% if"),
    "template is a number": _edited(chat_template=3),
}


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN_TOKENIZERS)
def test_broken_tokenizer_gives_a_file_or_one_line(
    models: dict[str, Path], name: str, tmp_path: Path, export: Callable[[Path], tuple[int, str, Path]]
) -> None:
    folder = shutil.copytree(models["mixtral"], tmp_path / "model")
    BROKEN_TOKENIZERS[name](folder)
    status, err, file = export(folder)
    print(status, err)
    if status:
        assert re.search("token|template", err.replace(str(tmp_path), "")), err
    else:
        assert gguf_file.read(file).keys["tokenizer.ggml.model"][1] == "llama"


def test_ids_beyond_the_embeddings_are_refused(
    models: dict[str, Path], tmp_path: Path, export: Callable[[Path], tuple[int, str, Path]]
) -> None:
    folder = tmp_path / "model"
    random_model("MixtralForCausalLM", N_VOCAB - 100).save_pretrained(folder)
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(models["mixtral"] / file, folder)
    status, err, _ = export(folder)
    assert status == 1
    assert re.search(r"token (3\d\d), the model has embeddings for 300|llama.cpp cannot convert", err), err


def test_rows_beyond_the_window_are_warned_of(
    models: dict[str, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_value(tmp_path / "model", models, ("mixtral", "max_position_embeddings", 16))
    arguments = [str(folder), "--ratio", "0.5", "-f", str(text), "--chunks", "1", "-c", "32", "--dry-run"]
    assert cli.main(arguments) == 0
    assert "rows of 32 tokens are longer than the model's window of 16: -c 16" in capsys.readouterr().err
