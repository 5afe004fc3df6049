"""One tiny model per family with routed experts, as data: what `test_families.py` builds and compares.

A row names transformers' model type, the config values that make the model small but keep every routing
feature, and, for a family that is refused, the words that say so. Adding a family is adding a row.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

N_LAYER, N_EXPERT, TOP_K = 4, 16, 4

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": N_LAYER,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "num_experts_per_tok": TOP_K,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": N_EXPERT, "moe_intermediate_size": 32}
_LOCAL = {"num_local_experts": N_EXPERT}
_ROUTED = {"n_routed_experts": N_EXPERT, "moe_intermediate_size": 32, "n_shared_experts": 1}
_UNGROUPED = {"n_group": 1, "topk_group": 1}
_GROUPED = {"n_group": 4, "topk_group": 2}
_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
_HYBRID = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
_LINEAR_ATTENTION = {
    "layer_types": _HYBRID,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
_MROPE = {
    "rope_parameters": {
        **_LINEAR_ATTENTION["rope_parameters"],
        "mrope_interleaved": True,
        "mrope_section": [2, 1, 1],
    }
}
_DENSE_FIRST = ["dense"] + ["sparse"] * (N_LAYER - 1)
_SCALED = {"routed_scaling_factor": 2.5}
_DEEPSEEK = (
    _ROUTED | _UNGROUPED | _LATENT_ATTENTION | _SCALED | {"first_k_dense_replace": 1, "norm_topk_prob": True}
)
_WINDOWED = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
_GPT_OSS = _LOCAL | {
    "sliding_window": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_NEMOTRON = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
    "moe_shared_expert_intermediate_size": 32,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "expand": 2,
    "chunk_size": 32,
    "num_nextn_predict_layers": 0,
    "use_mamba_kernels": False,
}
_LLAMA4 = _LOCAL | {
    "intermediate_size": 32,
    "intermediate_size_mlp": 96,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attn_temperature_tuning": False,
}
_SMALL_VISION = {
    "vision_config": {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 64,
    }
}
_GRANITE = _LOCAL | {
    "intermediate_size": 32,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.25,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}


_MTP_KEPT = "the block that predicts further tokens, which no calibration sees, keeps all experts"


@dataclass(frozen=True)
class Row:
    """A family: what to build, what the table says of it, and how far it gets.

    `outer` holds the rest of the config of a model with a vision part, whose text part is `config`.
    `hub` holds keys that the family's published config.json has, that llama.cpp's converter needs, and that
    transformers does not write itself.
    """

    hf_class: str
    model_type: str
    routing: str
    config: dict[str, Any]
    hub: dict[str, Any] = field(default_factory=dict)
    bias: bool = False
    shared: str = ""
    outer: dict[str, Any] = field(default_factory=dict)
    projector: bool = True  # the converter knows the names that transformers gives the vision part
    transposed: bool = False  # experts' matrices stand the other way round in published checkpoints
    packed: str = ""  # how the checkpoint is quantised
    # with a block after the last layer that predicts further tokens: a layer with the next number, or `mtp`
    mtp: Literal["", "layer", "mtp"] = ""
    mtp_kept: bool = True  # by llama.cpp's converter
    variant: str = ""
    refused: str | None = None
    saved: bool = False  # the refusal is the converter's, which wants to see the tensors
    limit: float = 1e-6
    as_llama_cpp: Callable[[nn.Module], None] | None = None  # makes a model compute as llama.cpp does
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.hf_class} {self.variant}".strip()


def _phi_as_llama_cpp(model: nn.Module) -> None:
    def softmax(_module: Any, _args: Any, output: Any) -> Any:
        logits, _, ids = output
        weights = logits.softmax(-1).gather(-1, ids)
        return logits, weights / weights.sum(-1, keepdim=True), ids

    def rms_norm(norm: Any, args: Any, _output: Any) -> Any:
        return nn.functional.rms_norm(args[0], norm.normalized_shape, norm.weight, norm.eps) + norm.bias

    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(rms_norm)
        elif type(module).__name__.endswith("Router"):
            module.register_forward_hook(softmax)


ROWS: tuple[Row, ...] = (
    Row(
        "OlmoeForCausalLM",
        "olmoe",
        "softmax",
        {"num_experts": N_EXPERT, "intermediate_size": 32, "num_key_value_heads": 4, "norm_topk_prob": False},
    ),
    Row(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        "softmax",
        _EXPERTS | {"norm_topk_prob": False, "shared_expert_intermediate_size": 32},
        shared="gated",
    ),
    Row("Qwen3MoeForCausalLM", "qwen3_moe", "softmax, norm", _EXPERTS | {"norm_topk_prob": True}),
    Row("Qwen3NextForCausalLM", "qwen3_next", "softmax, norm", _EXPERTS | _LINEAR_ATTENTION, shared="gated"),
    Row(
        "Qwen3_5MoeForCausalLM",
        "qwen3_5_moe_text",
        "softmax, norm",
        _EXPERTS | _LINEAR_ATTENTION | _MROPE,
        shared="gated",
    ),
    Row("MixtralForCausalLM", "mixtral", "softmax, norm", _LOCAL | {"sliding_window": None}),
    Row(
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        "softmax, scale",
        _DEEPSEEK | {"norm_topk_prob": False, "topk_method": "greedy", "q_lora_rank": 32},
        shared="yes",
    ),
    Row(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        "sigmoid, norm, scale",
        _DEEPSEEK | {"q_lora_rank": 32, "num_nextn_predict_layers": 0},
        {"scoring_func": "sigmoid"},
        bias=True,
        shared="yes",
    ),
    Row(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        "sigmoid, norm, scale",
        _DEEPSEEK | _GROUPED | {"q_lora_rank": 32, "num_nextn_predict_layers": 0},
        {"scoring_func": "sigmoid"},
        variant="with groups",
        bias=True,
        shared="yes",
    ),
    Row(
        "Glm4MoeForCausalLM",
        "glm4_moe",
        "sigmoid, norm, scale",
        _ROUTED
        | _GROUPED
        | _SCALED
        | {"first_k_dense_replace": 1, "use_qk_norm": True, "num_nextn_predict_layers": 0},
        variant="with groups",
        bias=True,
        shared="yes",
    ),
    Row(
        "Dots1ForCausalLM",
        "dots1",
        "sigmoid, norm, scale",
        _ROUTED
        | _GROUPED
        | _SCALED
        | {
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "sliding_window": None,
            "num_key_value_heads": 4,
        },
        {"scoring_func": "sigmoid"},
        variant="with groups",
        bias=True,
        shared="yes",
    ),
    Row(
        "NemotronHForCausalLM",
        "nemotron_h",
        "sigmoid, norm, scale",
        _ROUTED | _GROUPED | _SCALED | _NEMOTRON,
        variant="with groups",
        bias=True,
        shared="yes",
    ),
    Row(
        "DeepseekV32ForCausalLM",
        "deepseek_v32",
        "sigmoid, norm, scale",
        _DEEPSEEK
        | {
            "q_lora_rank": 32,
            "index_topk": 512,
            "index_head_dim": 64,
            "index_n_heads": 2,
            "mlp_layer_types": _DENSE_FIRST,
            "layer_types": ["indexed_attention"] * N_LAYER,
        },
        {"scoring_func": "sigmoid", "num_nextn_predict_layers": 0},
        bias=True,
        shared="yes",
    ),
    Row(
        "Glm4MoeForCausalLM",
        "glm4_moe",
        "sigmoid, norm, scale",
        _ROUTED
        | _UNGROUPED
        | _SCALED
        | {"first_k_dense_replace": 1, "use_qk_norm": True, "num_nextn_predict_layers": 0},
        bias=True,
        shared="yes",
    ),
    Row(
        "Glm4MoeForCausalLM",
        "glm4_moe",
        "sigmoid, norm, scale",
        _ROUTED
        | _UNGROUPED
        | _SCALED
        | {"first_k_dense_replace": 1, "use_qk_norm": True, "num_nextn_predict_layers": 0},
        {"num_nextn_predict_layers": 1},
        bias=True,
        shared="yes",
        variant="with an MTP block",
        mtp="layer",
        note=_MTP_KEPT,
    ),
    Row(
        "Glm4MoeLiteForCausalLM",
        "glm4_moe_lite",
        "sigmoid, norm, scale",
        _DEEPSEEK | {"q_lora_rank": 32, "mlp_layer_types": _DENSE_FIRST},
        {"scoring_func": "sigmoid", "num_nextn_predict_layers": 0},
        bias=True,
        shared="yes",
    ),
    Row(
        "SolarOpenForCausalLM",
        "solar_open",
        "sigmoid, norm, scale",
        _ROUTED | _UNGROUPED | _SCALED,
        {"partial_rotary_factor": 1.0},
        bias=True,
        shared="yes",
    ),
    Row(
        "GlmMoeDsaForCausalLM",
        "glm_moe_dsa",
        "sigmoid, norm, scale",
        _DEEPSEEK
        | {
            "q_lora_rank": 32,
            "index_topk": 512,
            "index_head_dim": 64,
            "index_n_heads": 2,
            "mlp_layer_types": _DENSE_FIRST,
            "layer_types": ["indexed_attention"] * N_LAYER,
            "indexer_types": ["full"] * N_LAYER,
        },
        {"scoring_func": "sigmoid", "num_nextn_predict_layers": 0},
        bias=True,
        shared="yes",
    ),
    Row(
        "Dots1ForCausalLM",
        "dots1",
        "sigmoid, norm, scale",
        _ROUTED
        | _UNGROUPED
        | _SCALED
        | {
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "sliding_window": None,
            "num_key_value_heads": 4,
        },
        {"scoring_func": "sigmoid"},
        bias=True,
        shared="yes",
    ),
    Row(
        "ExaoneMoeForCausalLM",
        "exaone_moe",
        "sigmoid, norm, scale",
        _EXPERTS
        | _UNGROUPED
        | _SCALED
        | {
            "num_shared_experts": 1,
            "mlp_layer_types": _DENSE_FIRST,
            "layer_types": _WINDOWED,
            "sliding_window": 32,
        },
        {"scoring_func": "sigmoid"},
        bias=True,
        shared="yes",
    ),
    Row(
        "Ernie4_5_MoeForCausalLM",
        "ernie4_5_moe",
        "softmax, norm",
        {
            "intermediate_size": 64,
            "moe_num_experts": N_EXPERT,
            "moe_k": TOP_K,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": -1,
            "moe_layer_interval": 1,
        },
        bias=True,
        shared="yes",
    ),
    Row(
        "GptOssForCausalLM",
        "gpt_oss",
        "top-k, softmax",
        _GPT_OSS,
    ),
    Row("GraniteMoeForCausalLM", "granitemoe", "top-k, softmax", _GRANITE),
    Row(
        "GraniteMoeSharedForCausalLM",
        "granitemoeshared",
        "top-k, softmax",
        _GRANITE | {"shared_intermediate_size": 32},
        shared="yes",
    ),
    Row(
        "GraniteMoeSWAForCausalLM",
        "granitemoe_swa",
        "top-k, softmax",
        _GRANITE | {"shared_intermediate_size": 32, "layer_types": _WINDOWED, "sliding_window": 32},
        shared="yes",
    ),
    Row(
        "GraniteMoeHybridForCausalLM",
        "granitemoehybrid",
        "top-k, softmax",
        _GRANITE
        | {
            "shared_intermediate_size": 32,
            "layer_types": ["mamba", "mamba", "mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_expand": 2,
            "mamba_n_groups": 1,
            "position_embedding_type": None,
        },
        {"layer_types": ["mamba", "mamba", "mamba", "attention"]},
        shared="yes",
    ),
    Row(
        "HunYuanMoEV1ForCausalLM",
        "hunyuan_v1_moe",
        "softmax, norm",
        {"num_experts": N_EXPERT, "moe_topk": TOP_K, "use_mixed_mlp_shared_expert": True},
        {
            "moe_intermediate_size": [96] * N_LAYER,
            "moe_topk": [TOP_K] * N_LAYER,
            "num_shared_expert": [1] * N_LAYER,
        },
        shared="yes",
    ),
    Row(
        "HYV3ForCausalLM",
        "hy_v3",
        "sigmoid, norm, scale",
        _EXPERTS
        | {
            "num_shared_experts": 1,
            "router_scaling_factor": 2.5,
            "first_k_dense_replace": 1,
            "mlp_layer_types": _DENSE_FIRST,
            "num_nextn_predict_layers": 0,
        },
        bias=True,
        shared="yes",
    ),
    Row(
        "JambaForCausalLM",
        "jamba",
        "softmax",
        {
            "num_experts": N_EXPERT,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 16,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    Row(
        "Lfm2MoeForCausalLM",
        "lfm2_moe",
        "sigmoid, norm",
        _EXPERTS
        | {
            "num_dense_layers": 1,
            "layer_types": ["conv", "conv", "full_attention", "conv"],
            "use_expert_bias": True,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
        },
        bias=True,
    ),
    Row(
        "MiniMaxM2ForCausalLM",
        "minimax_m2",
        "sigmoid, norm",
        _LOCAL
        | {
            "intermediate_size": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
        {"rotary_dim": 8, "scoring_func": "sigmoid"},
        bias=True,
    ),
    Row(
        "NemotronHForCausalLM",
        "nemotron_h",
        "sigmoid, norm, scale",
        _ROUTED | _UNGROUPED | _SCALED | _NEMOTRON,
        bias=True,
        shared="yes",
    ),
    Row(
        "NemotronHForCausalLM",
        "nemotron_h",
        "sigmoid, norm, scale",
        _ROUTED | _UNGROUPED | _SCALED | _NEMOTRON | {"moe_latent_size": 48},
        bias=True,
        shared="yes",
        variant="with a latent width",
    ),
    Row(
        "AfmoeForCausalLM",
        "afmoe",
        "sigmoid, norm, scale",
        _EXPERTS
        | {
            "num_dense_layers": 1,
            "num_shared_experts": 1,
            "route_scale": 2.5,
            "layer_types": _WINDOWED,
            "sliding_window": 32,
            "mup_enabled": True,
        },
        {"route_norm": True, "score_func": "sigmoid"},
        bias=True,
        shared="yes",
    ),
    Row(
        "Cohere2MoeForCausalLM",
        "cohere2_moe",
        "sigmoid, norm",
        _EXPERTS
        | {
            "intermediate_size": 32,
            "num_shared_experts": 1,
            "shared_expert_combination_strategy": "average",
            "expert_selection_fn": "sigmoid",
            "layer_types": _WINDOWED,
            "sliding_window": 32,
            "mlp_layer_types": _DENSE_FIRST,
            "prefix_dense_intermediate_size": 96,
            "tie_word_embeddings": True,
        },
        shared="yes",
    ),
    Row(
        "LagunaForCausalLM",
        "laguna",
        "sigmoid, norm, scale after the experts",
        _EXPERTS
        | {
            "shared_expert_intermediate_size": 32,
            "moe_routed_scaling_factor": 2.5,
            "layer_types": ["full_attention", *["sliding_attention"] * 3],
            "sliding_window": 32,
            "num_attention_heads_per_layer": [4] * N_LAYER,
            "mlp_layer_types": _DENSE_FIRST,
        },
        bias=True,
        shared="yes",
    ),
    Row(
        "MellumForCausalLM",
        "mellum",
        "softmax, norm",
        _LOCAL
        | {
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "layer_types": _WINDOWED,
            "sliding_window": 32,
            "mlp_layer_types": ["sparse"] * N_LAYER,
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": 500000.0} for kind in set(_WINDOWED)
            },
        },
    ),
    Row(
        "MiMoV2FlashForCausalLM",
        "mimo_v2_flash",
        "sigmoid, norm",
        _ROUTED
        | _UNGROUPED
        | {
            "head_dim": 24,
            "v_head_dim": 16,
            "layer_types": ["full_attention", *["sliding_attention"] * 3],
            "mlp_layer_types": _DENSE_FIRST,
            "sliding_window": 32,
        },
        {
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "partial_rotary_factor": 0.334,
            "swa_head_dim": 24,
            "swa_v_head_dim": 16,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_rope_theta": 10000.0,
            "rope_theta": 5000000.0,
            "hybrid_layer_pattern": [0, 1, 1, 1],
            "moe_layer_freq": [0, 1, 1, 1],
            "layernorm_epsilon": 1e-5,
            "sliding_window_size": 32,
        },
        bias=True,
        refused="llama.cpp cannot convert",
        saved=True,
        note="its converter expects `partial_rotary_factor` where transformers does not write it",
    ),
    Row(
        "Gemma4ForCausalLM",
        "gemma4_text",
        "softmax, norm, scale per expert",
        _EXPERTS
        | {
            "top_k_experts": TOP_K,
            "enable_moe_block": True,
            "layer_types": _WINDOWED,
            "sliding_window": 32,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 0,
            "num_global_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        shared="dense MLP",
        limit=1e-3,
        note="llama.cpp computes GELU from a table of 16-bit numbers",
    ),
    Row(
        "Gemma4ForConditionalGeneration",
        "gemma4",
        "softmax, norm, scale per expert",
        _EXPERTS
        | {
            "top_k_experts": TOP_K,
            "enable_moe_block": True,
            "layer_types": _WINDOWED,
            "sliding_window": 32,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 0,
            "num_global_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        shared="dense MLP",
        limit=1e-3,
        note="llama.cpp computes GELU from a table of 16-bit numbers",
        outer={"vision_config": None, "audio_config": None, "tie_word_embeddings": True},
    ),
    Row(
        "Qwen3NextForCausalLM",
        "qwen3_next",
        "softmax, norm",
        _EXPERTS | _LINEAR_ATTENTION,
        shared="gated",
        variant="with an MTP block",
        mtp="mtp",
        note=_MTP_KEPT,
    ),
    Row(
        "Qwen3_5MoeForCausalLM",
        "qwen3_5_moe_text",
        "softmax, norm",
        _EXPERTS | _LINEAR_ATTENTION | _MROPE,
        {"mtp_num_hidden_layers": 1},
        shared="gated",
        variant="with an MTP block",
        mtp="mtp",
        note=_MTP_KEPT,
    ),
    Row(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        "sigmoid, norm, scale",
        _DEEPSEEK | {"q_lora_rank": 32},
        {"scoring_func": "sigmoid", "num_nextn_predict_layers": 1},
        bias=True,
        shared="yes",
        variant="with an MTP block",
        mtp="layer",
        mtp_kept=False,
        note="llama.cpp's converter leaves out the block that predicts further tokens; the exporter says so",
    ),
    Row(
        "Glm4MoeLiteForCausalLM",
        "glm4_moe_lite",
        "sigmoid, norm, scale",
        _DEEPSEEK | {"q_lora_rank": 32, "mlp_layer_types": _DENSE_FIRST},
        {"scoring_func": "sigmoid", "num_nextn_predict_layers": 1},
        bias=True,
        shared="yes",
        variant="with an MTP block",
        mtp="layer",
        note=_MTP_KEPT,
    ),
    Row(
        "GptOssForCausalLM",
        "gpt_oss",
        "top-k, softmax",
        _GPT_OSS,
        variant="in MXFP4",
        packed="mxfp4",
        note="as published: experts stay in 4-bit blocks, with which llama.cpp multiplies 8-bit activations; "
        "that lets the router decide a near tie otherwise now and then: the median of 15 texts",
    ),
    Row(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        "sigmoid, norm, scale",
        _DEEPSEEK | {"q_lora_rank": 32, "num_nextn_predict_layers": 0},
        {"scoring_func": "sigmoid"},
        variant="in FP8",
        bias=True,
        shared="yes",
        packed="fp8",
    ),
    Row(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        "softmax, norm",
        _EXPERTS | {"norm_topk_prob": True},
        variant="in FP8",
        packed="fp8",
    ),
    Row(
        "Llama4ForCausalLM",
        "llama4_text",
        "sigmoid on the input",
        _LLAMA4,
        shared="yes",
        note="novices are added without a weight",
    ),
    Row(
        "Llama4ForConditionalGeneration",
        "llama4",
        "sigmoid on the input",
        _LLAMA4,
        shared="yes",
        note="novices are added without a weight",
        projector=False,
        outer={
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 128,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
                "image_size": 28,
            }
        },
    ),
    Row(
        "DbrxForCausalLM",
        "dbrx",
        "softmax, norm",
        {},
        refused="do not use transformers' experts interface",
    ),
    Row(
        "JetMoeForCausalLM",
        "jetmoe",
        "top-k, softmax",
        {},
        refused="do not use transformers' experts interface",
    ),
    Row(
        "LongcatFlashForCausalLM",
        "longcat_flash",
        "softmax",
        {},
        bias=True,
        refused="do not use transformers' experts interface",
    ),
    Row(
        "Step3p7ForConditionalGeneration",
        "step3p7",
        "sigmoid, norm, scale after the experts",
        {},
        bias=True,
        shared="yes",
        refused="do not use transformers' experts interface",
    ),
    Row(
        "PhimoeForCausalLM",
        "phimoe",
        "sparsemixer; llama.cpp: softmax, norm",
        _LOCAL
        | {"num_experts_per_tok": 2, "intermediate_size": 32, "attention_bias": True, "lm_head_bias": True},
        hub={"architectures": ["PhiMoEForCausalLM"], "original_max_position_embeddings": 512},
        limit=float("inf"),
        as_llama_cpp=_phi_as_llama_cpp,
        note="llama.cpp has RMS norms for layer norms and a softmax for sparsemixer, unpruned as well: the "
        "user is told; with these in the definition the bar of the others holds",
    ),
    Row(
        "KimiLinearForCausalLM",
        "kimi_linear",
        "sigmoid, norm, scale",
        _EXPERTS
        | _LATENT_ATTENTION
        | {
            "num_experts_per_token": TOP_K,
            "num_shared_experts": 1,
            "mlp_layer_types": _DENSE_FIRST,
            "layer_types": _HYBRID,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
        },
        bias=True,
        shared="yes",
        refused="llama.cpp cannot convert",
        saved=True,
        note="transformers saves names that the converter does not know",
    ),
    Row(
        "HYV4ForCausalLM",
        "hy_v4",
        "sigmoid, norm, scale",
        _DEEPSEEK
        | {
            "q_lora_rank": 32,
            "mlp_layer_types": _DENSE_FIRST,
            "layer_types": ["indexed_attention"] * N_LAYER,
            "indexer_types": ["full"] * N_LAYER,
            "index_n_heads": 2,
            "index_head_dim": 64,
            "index_topk": 512,
        },
        bias=True,
        shared="yes",
        refused="llama.cpp cannot convert",
        saved=True,
        note="transformers saves names that the converter does not know",
    ),
    Row(
        "Qwen3_5MoeForConditionalGeneration",
        "qwen3_5_moe",
        "softmax, norm",
        _EXPERTS | _LINEAR_ATTENTION | _MROPE,
        shared="gated",
        outer=_SMALL_VISION,
    ),
    Row(
        "Qwen3VLMoeForConditionalGeneration",
        "qwen3_vl_moe",
        "softmax, norm",
        _LOCAL
        | {
            "moe_intermediate_size": 24,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [3, 3, 2],
                "mrope_interleaved": True,
            },
        },
        note="llama.cpp leaves two slow rotary pairs of the published sections [24, 20, 20] unrotated",
        transposed=True,
        outer={
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 64,
                "deepstack_visual_indexes": [0],
            }
        },
    ),
    Row(
        "Glm4vMoeForConditionalGeneration",
        "glm4v_moe",
        "sigmoid, norm, scale",
        _ROUTED
        | _UNGROUPED
        | _SCALED
        | {
            "first_k_dense_replace": 1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
            },
        },
        {},
        bias=True,
        shared="yes",
        outer=_SMALL_VISION,
    ),
    Row(
        "Dots3NoteForCausalLM",
        "dots3_note_text",
        "sigmoid, norm, scale",
        _DEEPSEEK | {"q_lora_rank": 32, "mlp_layer_types": _DENSE_FIRST},
        {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        bias=True,
        shared="yes",
        refused="llama.cpp cannot convert",
        saved=True,
        note="its converter reads `swa_qk_nope_head_dim`, which transformers drops from the config",
    ),
    Row(
        "Glm5NextForConditionalGeneration",
        "glm5_next",
        "sigmoid, norm, scale",
        _DEEPSEEK | {"qk_rope_head_dim": 0, "q_lora_rank": 32, "mlp_layer_types": _DENSE_FIRST},
        bias=True,
        shared="yes",
        outer=_SMALL_VISION,
        refused="llama.cpp cannot convert",
        saved=True,
        note="its converter knows no name for a bias that transformers' model has",
    ),
    Row(
        "MiniMaxM3SparseForConditionalGeneration",
        "minimax_m3_vl",
        "sigmoid, norm, scale after the experts",
        _LOCAL | {"intermediate_size": 32},
        {"n_shared_experts": 1},
        bias=True,
        shared="yes",
        outer=_SMALL_VISION,
        refused="llama.cpp cannot convert",
        saved=True,
        note="its converter reads `sparse_attention_config`, which transformers drops from the config",
    ),
    Row(
        "MellumForCausalLM",
        "mellum",
        "softmax, norm",
        {
            "num_hidden_layers": 4,
            "layer_types": _WINDOWED,
            "mlp_layer_types": ["sparse"] * 4,
            "norm_topk_prob": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 500000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        variant="with two values of rope_theta",
        refused="where rope_theta depends on the kind of layer",
    ),
    *(
        Row(hf_class, model_type, routing, {}, refused=refused)
        for hf_class, model_type, routing, refused in (
            ("DeepseekV4ForCausalLM", "deepseek_v4", "sqrtsoftplus, norm, scale, hash", "hash routing"),
            ("Qwen4ExpForCausalLM", "qwen4_exp_text", "softmax, norm", "other logits"),
            (
                "Ernie4_5_VLMoeForConditionalGeneration",
                "ernie4_5_vl_moe",
                "softmax, norm",
                "several expert stacks",
            ),
            (
                "Qwen3OmniMoeForConditionalGeneration",
                "qwen3_omni_moe",
                "softmax, norm",
                "as a language model",
            ),
            (
                "DeepseekOcr2ForConditionalGeneration",
                "deepseek_ocr2",
                "softmax, scale",
                "as a language model",
            ),
            ("DiffusionGemmaForBlockDiffusion", "diffusion_gemma", "softmax, norm", "as a language model"),
            (
                "OpenAIPrivacyFilterForTokenClassification",
                "openai_privacy_filter",
                "top-k, softmax",
                "as a language",
            ),
            ("NllbMoeForConditionalGeneration", "nllb-moe", "softmax", "as a language model"),
            (
                "SwitchTransformersForConditionalGeneration",
                "switch_transformers",
                "softmax",
                "as a language model",
            ),
        )
    ),
    *(
        Row(
            hf_class,
            model_type,
            routing,
            {"num_hidden_layers": 6} | _UNGROUPED,
            refused="llama.cpp has no converter",
        )
        for hf_class, model_type, routing in (
            ("AriaTextForCausalLM", "aria_text", "top-k, softmax"),
            ("AXK1ForCausalLM", "axk1", "sigmoid, norm, scale"),
            ("AXK2ForCausalLM", "axk2", "sigmoid, norm, scale"),
            ("BailingHybridForCausalLM", "bailing_hybrid", "sigmoid, norm, scale"),
            ("BeamForCausalLM", "beam", "sigmoid, norm, scale after the experts"),
            ("FlexOlmoForCausalLM", "flex_olmo", "softmax"),
            ("FlintForCausalLM", "flint", "sigmoid"),
            ("Kolibri1ForCausalLM", "kolibri1", "sigmoid of the selected"),
            ("Inkling2ForCausalLM", "inkling2_text", "sigmoid, norm, scale"),
            ("InklingForCausalLM", "inkling_text", "sigmoid, norm with the shared experts, scale"),
            ("MiniMaxForCausalLM", "minimax", "softmax, norm"),
            ("MistralLarge4ForConditionalGeneration", "mistral_large4", "softmax, norm, scale"),
            ("MuseSparkForConditionalGeneration", "muse_spark", "sigmoid, norm, scale"),
            ("UnlimitedOcrForConditionalGeneration", "unlimited_ocr", "softmax, scale"),
            ("Mistral4ForCausalLM", "mistral4", "softmax, norm, scale"),
            ("ZayaForCausalLM", "zaya", "softmax with a skip expert"),
        )
    ),
)
