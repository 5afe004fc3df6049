"""The pruned model in plain PyTorch, by definition: loop over experts, a novice where one was pruned.

Shares no code with the package: it reads the file's own account of itself (keys and novice rows) and
replaces the forward of transformers' expert stacks. `y = sum over selected e of g_e * (novice_e if pruned else E_e(x))`.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Novices = Mapping[int, Mapping[int, Tensor]]  # layer -> original expert id -> vector


def read_novices(gguf_file: Path) -> Novices:
    """Read which experts a file has replaced, by original id, and by what."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    arch = fields["general.architecture"]
    kept, n_expert = fields.get(f"{arch}.expert_kept_count", []), fields[f"{arch}.expert_count"]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    order = iter(fields.get("mone.expert_order", []))
    novices = {}
    for layer, n_kept in enumerate(kept):
        if 0 < n_kept < n_expert:
            ids = [next(order) for _ in range(n_expert)]
            rows = torch.from_numpy(np.array(tensors[f"blk.{layer}.ffn_down_exps.bias"].data))
            novices[layer] = {ids[slot]: rows[slot] for slot in range(n_kept, n_expert)}
    return novices


def install(model: nn.Module, novices: Novices) -> None:
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

    if self.has_gate:
        return linear(self._apply_gate(linear(x, "gate_up_proj")), "down_proj")
    return linear(self.act_fn(linear(x, "up_proj")), "down_proj")
