#!/usr/bin/env python3
"""Write a random BF16 Qwen3-MoE of any size, layer by layer: it never is in memory as a whole.

python tools/models/random_model.py FOLDER --layers 64 --experts 64 --used 2 --hidden 640 --expert-size 384
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mone_export import runtime  # noqa: E402

HEAD_DIM, N_HEAD, N_KV_HEAD = 64, 8, 2
# 6 GB in BF16, few of them used by a token, so that a small machine can calibrate it
SIX_GB = {"n_layer": 64, "n_expert": 64, "top_k": 2, "hidden": 640, "expert": 384}


def main() -> int:
    """Write the model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    names = {"layers": "n_layer", "experts": "n_expert", "used": "top_k", "hidden": "hidden"}
    for option, key in (names | {"expert-size": "expert"}).items():
        parser.add_argument(f"--{option}", dest=key, type=int, default=SIX_GB[key])
    args = parser.parse_args()
    save_random_model(args.folder, {key: getattr(args, key) for key in SIX_GB})
    return 0


def save_random_model(folder: Path, sizes: dict[str, int], *, fused: bool = False) -> None:
    """Write a checkpoint with a file per layer and GPT-2's tokenizer; experts apart, or in one tensor."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, Qwen3MoeConfig

    folder.mkdir()
    # a vocabulary that the converter recognises
    models = runtime.tree(whole=True) / "models"
    tokenizer = AutoTokenizer.from_pretrained(models, gguf_file="ggml-vocab-gpt-2.gguf")
    tokenizer.save_pretrained(folder)
    hidden = sizes["hidden"]
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=sizes["n_layer"],
        num_attention_heads=N_HEAD,
        num_key_value_heads=N_KV_HEAD,
        head_dim=HEAD_DIM,
        num_experts=sizes["n_expert"],
        num_experts_per_tok=sizes["top_k"],
        moe_intermediate_size=sizes["expert"],
        norm_topk_prob=True,
        tie_word_embeddings=True,
    )
    config.architectures, config.dtype = ["Qwen3MoeForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)

    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randint(-100, 100, shape, dtype=torch.int8).to(torch.bfloat16) / 1000

    def norm(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    rest = {"model.embed_tokens.weight": random(len(tokenizer), hidden), "model.norm.weight": norm(hidden)}
    save_file(rest, folder / "model-rest.safetensors")
    files = dict.fromkeys(rest, "model-rest.safetensors")
    for layer in range(sizes["n_layer"]):
        tensors = {
            "input_layernorm.weight": norm(hidden),
            "post_attention_layernorm.weight": norm(hidden),
            "self_attn.q_proj.weight": random(N_HEAD * HEAD_DIM, hidden),
            "self_attn.k_proj.weight": random(N_KV_HEAD * HEAD_DIM, hidden),
            "self_attn.v_proj.weight": random(N_KV_HEAD * HEAD_DIM, hidden),
            "self_attn.o_proj.weight": random(hidden, N_HEAD * HEAD_DIM),
            "self_attn.q_norm.weight": norm(HEAD_DIM),
            "self_attn.k_norm.weight": norm(HEAD_DIM),
            "mlp.gate.weight": random(sizes["n_expert"], hidden),
        } | dict(expert_tensors(random, sizes, fused=fused))
        own = {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()}
        save_file(own, folder / f"model-{layer}.safetensors")
        files |= dict.fromkeys(own, f"model-{layer}.safetensors")
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def expert_tensors(
    random: Callable[..., Any], sizes: dict[str, int], *, fused: bool
) -> Iterator[tuple[str, Any]]:
    """Yield one layer's experts, as one tensor per matrix or one for all experts."""
    n_expert, hidden, expert = (sizes[key] for key in ("n_expert", "hidden", "expert"))
    if fused:
        yield "mlp.experts.gate_up_proj", random(n_expert, 2 * expert, hidden)
        yield "mlp.experts.down_proj", random(n_expert, hidden, expert)
        return
    for number in range(n_expert):
        for name, shape in (("gate", (expert, hidden)), ("up", (expert, hidden)), ("down", (hidden, expert))):
            yield f"mlp.experts.{number}.{name}_proj.weight", random(*shape)


if __name__ == "__main__":
    raise SystemExit(main())
