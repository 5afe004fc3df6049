"""Tiny random models, one per tested family: real classes, small numbers, every routing feature on."""

import functools
import io
import json
from pathlib import Path
from typing import Any

import torch
from fixed_text import fixed_text
from sentencepiece import SentencePieceTrainer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mone_export.runtime import tree

_COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}

# model_type, and what the family needs beyond the common part; 16 experts, 4 used
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "OlmoeForCausalLM": (
        "olmoe",
        {"num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": False, "num_key_value_heads": 4}
        | {"intermediate_size": 32, "rms_norm_eps": 1e-5},
    ),
    "Qwen3MoeForCausalLM": (
        "qwen3_moe",
        {
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "head_dim": 16,
        },
    ),
    "MixtralForCausalLM": (
        "mixtral",
        {"num_local_experts": 16, "num_experts_per_tok": 4, "sliding_window": None},
    ),
    "DeepseekV2ForCausalLM": (
        "deepseek_v2",
        {
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.5,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
            "head_dim": 16,
        },
    ),
    "GptOssForCausalLM": (
        "gpt_oss",
        {
            "num_local_experts": 16,
            "num_experts_per_tok": 4,
            "head_dim": 16,
            "sliding_window": 128,
            "num_hidden_layers": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}


def save_tiny(family: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write a tiny random model of a family, tokenizer included, as an ordinary Hugging Face folder."""
    tokenizer = _tokenizer()
    random_model(family, len(tokenizer), dtype=dtype, seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_small(folder: Path, *, n_vocab: int = 400, seed: int = 0, **config: Any) -> Path:
    """Write a tiny Mixtral with a vocabulary of `n_vocab`, which converts in a fraction of a second."""
    random_model("MixtralForCausalLM", n_vocab, seed=seed, **config).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(_small_vocabulary(n_vocab))
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def random_model(
    family: str, n_vocab: int, *, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any
) -> PreTrainedModel:
    """Return a tiny random model of a family."""
    model_type, special = TINY[family]
    tiny_config = AutoConfig.for_model(model_type, **_COMMON | special | config | {"vocab_size": n_vocab})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # wide enough that routing is decided and experts differ; biases that would be zero are not
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1 if parameter.dim() > 1 else 0.05)
    return model


@functools.cache
def _tokenizer() -> Any:
    # a vocabulary the converter recognises, from the pinned tree
    return AutoTokenizer.from_pretrained(tree(whole=True) / "models", gguf_file="ggml-vocab-gpt-2.gguf")


@functools.cache
def _small_vocabulary(n_vocab: int) -> bytes:
    lines = fixed_text()[:10_000].splitlines()  # enough for a few hundred pieces
    vocabulary = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=vocabulary,
        model_type="bpe",
        vocab_size=n_vocab,
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )
    return vocabulary.getvalue()
