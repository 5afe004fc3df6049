"""The model families the tests cover, as data: one row each, and nothing else in the package names a family.

A family that is not listed still works when transformers' experts interface and llama.cpp's converter both
know it; it is merely not tested here. `requires` states config values the runtime takes for granted:
llama.cpp hard-codes whether the routing weights of the selected experts are divided by their sum, whatever
the config says (Source: the `norm_w` argument of `build_moe_ffn` in llama.cpp's `src/models/<arch>.cpp`).
`states` are values that the converter reads from config.json and that transformers does not write into it:
without them the file would route differently.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Family:
    """transformers' class, llama.cpp's architecture, an example checkpoint, config values relied upon.

    `after` gives, from the config, the factor by which the model multiplies the output of its experts module.
    `differs` says, from the config, what llama.cpp computes otherwise than the model: nothing if empty.
    `unlike` says it of every model of the family, whose unpruned files are used all the same.
    `weights_inputs` marks a family that weights what goes into its experts, not what comes out.
    """

    hf_class: str
    gguf_arch: str
    example: str
    requires: Mapping[str, object] = field(default_factory=dict)
    states: Mapping[str, object] = field(default_factory=dict)
    after: Callable[[Any], float] | None = None
    weights_inputs: bool = False
    differs: Callable[[Any], str] | None = None
    unlike: str = ""


_NORM: Mapping[str, object] = {"norm_topk_prob": True}
_NO_NORM: Mapping[str, object] = {"norm_topk_prob": False}
_SIGMOID: Mapping[str, object] = {"scoring_func": "sigmoid"}

FAMILIES: tuple[Family, ...] = (
    Family("OlmoeForCausalLM", "olmoe", "allenai/OLMoE-1B-7B-0125", _NO_NORM),
    Family("Qwen2MoeForCausalLM", "qwen2moe", "Qwen/Qwen1.5-MoE-A2.7B", _NO_NORM),
    Family("Qwen3MoeForCausalLM", "qwen3moe", "Qwen/Qwen3-30B-A3B", _NORM),
    Family("Qwen3NextForCausalLM", "qwen3next", "Qwen/Qwen3-Next-80B-A3B-Instruct", _NORM),
    Family("Qwen3_5MoeForCausalLM", "qwen35moe", "Qwen/Qwen3.5-35B-A3B"),
    Family("Qwen3_5MoeForConditionalGeneration", "qwen35moe", "Qwen/Qwen3.5-35B-A3B"),
    Family("Qwen3VLMoeForConditionalGeneration", "qwen3vlmoe", "Qwen/Qwen3-VL-30B-A3B-Instruct"),
    Family(
        "PhiMoEForCausalLM",
        "phimoe",
        "microsoft/Phi-3.5-MoE-instruct",
        unlike="RMS norms for layer norms, and for the weights of sparsemixer shares of a softmax",
    ),
    Family("MixtralForCausalLM", "llama", "mistralai/Mixtral-8x7B-v0.1"),
    Family(
        "DeepseekV2ForCausalLM",
        "deepseek2",
        "deepseek-ai/DeepSeek-V2-Lite",
        # llama.cpp scores a group by its two best experts, this family by the best one
        {**_NO_NORM, "topk_method": "greedy", "n_group": 1},
    ),
    Family("DeepseekV3ForCausalLM", "deepseek2", "moonshotai/Moonlight-16B-A3B", states=_SIGMOID),
    Family("DeepseekV32ForCausalLM", "deepseek32", "deepseek-ai/DeepSeek-V3.2-Exp", states=_SIGMOID),
    Family("Glm4MoeForCausalLM", "glm4moe", "zai-org/GLM-4.5-Air"),
    Family("Glm4MoeLiteForCausalLM", "deepseek2", "zai-org/GLM-4.7-Flash"),
    Family("Glm4vMoeForConditionalGeneration", "glm4moe", "zai-org/GLM-4.5V"),
    Family("GlmMoeDsaForCausalLM", "glm-dsa", "zai-org/GLM-5.2"),
    Family("SolarOpenForCausalLM", "glm4moe", "upstage/Solar-Open-100B"),
    Family("Dots1ForCausalLM", "dots1", "rednote-hilab/dots.llm1.inst", states=_SIGMOID),
    Family("ExaoneMoeForCausalLM", "exaone-moe", "LGAI-EXAONE/K-EXAONE-236B-A23B", states=_SIGMOID),
    Family("Ernie4_5_MoeForCausalLM", "ernie4_5-moe", "baidu/ERNIE-4.5-21B-A3B-PT"),
    Family("GptOssForCausalLM", "gpt-oss", "openai/gpt-oss-20b"),
    Family("GraniteMoeForCausalLM", "granitemoe", "ibm-granite/granite-3.1-3b-a800m-instruct"),
    Family("GraniteMoeSharedForCausalLM", "granitemoe", "ibm-research/moe-7b-1b-active-shared-experts"),
    Family("GraniteMoeHybridForCausalLM", "granitehybrid", "ibm-granite/granite-4.0-h-tiny"),
    Family("GraniteMoeSWAForCausalLM", "granite_swa", "no public example known"),
    Family("HunYuanMoEV1ForCausalLM", "hunyuan-moe", "tencent/Hunyuan-A13B-Instruct"),
    Family("HYV3ForCausalLM", "hy_v3", "tencent/Hy3", {"route_norm": True}),
    Family("JambaForCausalLM", "jamba", "ai21labs/Jamba-v0.1"),
    Family("Lfm2MoeForCausalLM", "lfm2moe", "LiquidAI/LFM2-8B-A1B", {**_NORM, "routed_scaling_factor": 1.0}),
    Family("MiniMaxM2ForCausalLM", "minimax-m2", "MiniMaxAI/MiniMax-M2", states=_SIGMOID),
    Family("NemotronHForCausalLM", "nemotron_h_moe", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"),
    Family("AfmoeForCausalLM", "afmoe", "arcee-ai/Trinity-Mini", states={"route_norm": True}),
    Family(
        "Cohere2MoeForCausalLM",
        "cohere2moe",
        "CohereLabs/North-Mini-Code-1.0",
        _NORM,
        after=lambda config: 0.5 if config.num_shared_experts else 1.0,  # the average with the shared ones
    ),
    Family(
        "LagunaForCausalLM",
        "laguna",
        "poolside/Laguna-XS.2",
        after=lambda config: config.moe_routed_scaling_factor,
    ),
    Family(
        "MellumForCausalLM",
        "mellum",
        "JetBrains/Mellum2-12B-A2.5B-Base",
        _NORM,
        differs=lambda config: (
            "positions, where rope_theta depends on the kind of layer"
            if len({rope["rope_theta"] for rope in config.rope_parameters.values()}) > 1
            else ""
        ),
    ),
    Family("Llama4ForCausalLM", "llama4", "meta-llama/Llama-4-Scout-17B-16E-Instruct", weights_inputs=True),
    Family(
        "Llama4ForConditionalGeneration",
        "llama4",
        "meta-llama/Llama-4-Scout-17B-16E-Instruct",
        weights_inputs=True,
    ),
    Family("Gemma4ForCausalLM", "gemma4", "google/gemma-4-26B-A4B-it"),
    Family("Gemma4ForConditionalGeneration", "gemma4", "google/gemma-4-26B-A4B-it"),
)

# of llama.cpp: their graphs take shared experts to be as wide as `expert_shared_count` of the others together
SHARED_BY_COUNT = ("afmoe", "deepseek2", "deepseek32", "dots1", "glm-dsa", "glm4moe")

# what the MoNE authors call a class in the checkpoints that they prune
RENAMED: Mapping[str, str] = {"OlmoneForCausalLM": "OlmoeForCausalLM"}

# families that would give a wrong file or none, and why
REFUSED: Mapping[str, str] = {
    "DeepseekV4ForCausalLM": (
        "in its first layers a table of tokens names the experts (hash routing), which is not renumbered yet"
    ),
    "Qwen4ExpForCausalLM": "llama.cpp computes other logits for it than transformers, unpruned as well",
    "Qwen4ExpForConditionalGeneration": (
        "llama.cpp computes other logits for it than transformers, unpruned as well"
    ),
    "DbrxForCausalLM": "its experts do not use transformers' experts interface",
    "JetMoeForCausalLM": "its experts do not use transformers' experts interface",
    "LongcatFlashForCausalLM": "its experts do not use transformers' experts interface",
    "Step3p7ForConditionalGeneration": "its experts do not use transformers' experts interface",
}


def family_of(hf_class: str) -> Family | None:
    """Return the row of a transformers class, or None when the tests do not cover it."""
    return next((family for family in FAMILIES if family.hf_class == hf_class), None)


def factor_after_experts(hf_class: str, config: Any) -> float:
    """Return what the model multiplies the output of its experts module by, beyond the routing weights."""
    family = family_of(hf_class)
    return float(family.after(config)) if family and family.after else 1.0


def weights_inputs(hf_class: str) -> bool:
    """Return whether the model weights what goes into its experts, so that their outputs have no weight."""
    family = family_of(hf_class)
    return family is not None and family.weights_inputs
