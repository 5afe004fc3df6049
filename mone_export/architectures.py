"""The model families the tests cover, as data: one row each, and nothing else in the package names a family.

A family that is not listed still works when transformers' experts interface and llama.cpp's converter both
know it; it is merely not tested here. `requires` states config values the runtime takes for granted:
llama.cpp hard-codes whether the routing weights of the selected experts are divided by their sum, whatever
the config says (Source: the `norm_w` argument of `build_moe_ffn` in llama.cpp's `src/models/<arch>.cpp`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Family:
    """transformers' class, llama.cpp's architecture, an example checkpoint, config values relied upon."""

    hf_class: str
    gguf_arch: str
    example: str
    requires: Mapping[str, object] = field(default_factory=dict)


FAMILIES: tuple[Family, ...] = (
    Family("OlmoeForCausalLM", "olmoe", "allenai/OLMoE-1B-7B-0125", {"norm_topk_prob": False}),
    Family("Qwen3MoeForCausalLM", "qwen3moe", "Qwen/Qwen3-30B-A3B", {"norm_topk_prob": True}),
    Family("Qwen2MoeForCausalLM", "qwen2moe", "Qwen/Qwen1.5-MoE-A2.7B", {"norm_topk_prob": False}),
    Family("MixtralForCausalLM", "llama", "mistralai/Mixtral-8x7B-v0.1"),
    Family("DeepseekV2ForCausalLM", "deepseek2", "deepseek-ai/DeepSeek-V2-Lite"),
    Family("GptOssForCausalLM", "gpt-oss", "openai/gpt-oss-20b"),
)


def family_of(hf_class: str) -> Family | None:
    """Return the row of a transformers class, or None when the tests do not cover it."""
    return next((family for family in FAMILIES if family.hf_class == hf_class), None)
