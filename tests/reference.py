"""The pruned model in plain PyTorch, by definition: loop over experts, a novice where one was pruned.

`y = sum over selected e of g_e * (novice_e if pruned else E_e(x))`. Shares no code with the package.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from gguf import GGUFReader
from torch import Tensor, nn


def read_novices(gguf_file: Path) -> dict[int, dict[int, Tensor]]:
    """Read what a file has put in the place of experts: layer -> original expert id -> vector."""
    reader = GGUFReader(gguf_file)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    n_expert = keys[f"{keys['general.architecture']}.expert_count"]
    rows = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    order, novices = iter(keys.get("mone.expert_order", [])), {}
    for layer, n_kept in enumerate(keys.get(f"{keys['general.architecture']}.expert_kept_count", [])):
        if 0 < n_kept < n_expert:
            ids = [next(order) for _ in range(n_expert)]
            bias = rows[f"blk.{layer}.ffn_down_exps.bias"]
            novices[layer] = {ids[slot]: bias[slot] for slot in range(n_kept, n_expert)}
    return novices


def install(model: nn.Module, novices: Mapping[int, Mapping[int, Tensor]]) -> None:
    """Replace the forward of every expert stack of a transformers model by the definition above."""
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            layer = int(next(part for part in name.split(".") if part.isdecimal()))
            module.forward = MethodType(_forward(novices.get(layer, {})), module)


def _forward(novices: Mapping[int, Tensor]) -> Any:
    def forward(self: Any, hidden: Tensor, *args: Tensor, **named: Tensor) -> Tensor:
        index, weights = (*args, *named.values())  # gpt-oss passes them by names of its own
        out = torch.zeros_like(hidden)
        for expert in range(self.down_proj.shape[0]):
            token, slot = torch.where(index == expert)
            y = novices[expert] if expert in novices else _expert(self, expert, hidden[token])
            out.index_add_(0, token, weights[token, slot, None] * y)
        return out

    return forward


def _expert(self: Any, e: int, x: Tensor) -> Tensor:
    def linear(a: Tensor, name: str) -> Tensor:
        weight = getattr(self, name)[e]
        bias = getattr(self, f"{name}_bias")[e] if self.has_bias else 0
        return a @ (weight if self.is_transposed else weight.T) + bias

    h = self._apply_gate(linear(x, "gate_up_proj")) if self.has_gate else self.act_fn(linear(x, "up_proj"))
    return linear(h, "down_proj")
