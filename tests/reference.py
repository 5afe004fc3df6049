"""The pruned model in plain PyTorch, by definition: loop over experts, a novice where one was pruned.

`y = sum over selected e of g_e * (novice_e if pruned else E_e(x))`. With the methods that take experts out of
the router it is the same model built with fewer experts. Shares no code with the package.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import torch
from gguf import GGUFReader
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel


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


class Thin(NamedTuple):
    """A thin expert: numbers of its channels [w], its down projection [d, w], a constant [d]."""

    channels: Tensor
    down: Tensor
    constant: Tensor


def read_thin(gguf_file: Path, whole: Path) -> dict[int, dict[int, Thin]]:
    """Read a file's thin experts: layer -> original expert id -> what it computes.

    Each of their rows must be a row of the same expert in the `whole` file, bit for bit.
    """
    reader = GGUFReader(gguf_file)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    arch = keys["general.architecture"]
    n_expert, n_tier = keys[f"{arch}.expert_count"], keys.get(f"{arch}.expert_tier_count", 0)
    rows = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    own = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in GGUFReader(whole).tensors}
    order, found = iter(keys.get("mone.expert_order", [])), {}
    for layer, n_kept in enumerate(keys.get(f"{arch}.expert_kept_count", [])):
        if not 0 < n_kept < n_expert:
            continue
        ids, slot = [next(order) for _ in range(n_expert)], n_kept
        found[layer] = {}
        for tier in range(1, n_tier + 1):
            size = keys[f"{arch}.expert_tier_sizes"][layer * n_tier + tier - 1]
            for place in range(size):
                stacks = {
                    part: rows[name][place] if rows[name].dim() == 3 else rows[name]
                    for part in ("gate", "up", "gate_up", "down")
                    if (name := f"blk.{layer}.ffn_{part}_exps.t{tier}.weight") in rows
                }
                inside = {part: stack for part, stack in stacks.items() if part != "down"}
                channels = [
                    _same_rows(stack, own[f"blk.{layer}.ffn_{part}_exps.weight"][ids[slot]], part)
                    for part, stack in inside.items()
                ]
                assert all(torch.equal(each, channels[0]) for each in channels)
                constant = rows[f"blk.{layer}.ffn_down_exps.bias"][slot]
                found[layer][ids[slot]] = Thin(channels[0], stacks["down"], constant)
                slot += 1
    return found


def _same_rows(rows: Tensor, own: Tensor, part: str) -> Tensor:
    """Return which rows of an expert's own matrix some rows are; of both halves the same ones."""
    numbers = (rows[:, None] == own[None]).all(-1).int()
    assert (numbers.sum(1) == 1).all()
    places = numbers.argmax(1)
    if part == "gate_up":
        first, second = places.chunk(2)
        assert torch.equal(first, second - len(own) // 2)
        return first
    return places


def install(
    model: nn.Module,
    novices: Mapping[int, Mapping[int, Tensor]],
    thin: Mapping[int, Mapping[int, Thin]] | None = None,
) -> None:
    """Replace the forward of every expert stack of a transformers model by the definition above."""
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            layer = int(next(part for part in name.split(".") if part.isdecimal()))
            forward = _forward(novices.get(layer, {}), (thin or {}).get(layer, {}))
            module.forward = MethodType(forward, module)


def _forward(novices: Mapping[int, Tensor], thin: Mapping[int, Thin]) -> Any:
    def forward(self: Any, hidden: Tensor, *args: Tensor, **named: Tensor) -> Tensor:
        if not args and not named:  # what goes in is weighted already, for all experts one after the other
            return weighted_before(self, hidden)
        index, weights = (*args, *named.values())  # gpt-oss passes them by names of its own
        out = torch.zeros_like(hidden)
        for expert in range(self.down_proj.shape[0]):
            token, slot = torch.where(index == expert)
            if expert in thin:
                channels = _channels(self, expert, hidden[token])[:, thin[expert].channels]
                y = channels @ thin[expert].down.T + thin[expert].constant
            else:
                y = novices[expert] if expert in novices else _expert(self, expert, hidden[token])
            out.index_add_(0, token, weights[token, slot, None] * y)
        return out

    def weighted_before(self: Any, hidden: Tensor) -> Tensor:
        out = torch.zeros_like(hidden).view(len(self.down_proj), -1, hidden.shape[-1])
        for expert, x in enumerate(hidden.view_as(out)):
            token = x.any(-1)  # all zero: not selected
            out[expert, token] = novices[expert] if expert in novices else _expert(self, expert, x[token])
        return out.view_as(hidden)

    return forward


def _expert(self: Any, e: int, x: Tensor) -> Tensor:
    return _linear(self, e, _channels(self, e, x), "down_proj")


def _channels(self: Any, e: int, x: Tensor) -> Tensor:
    h: Tensor
    if not self.has_gate:
        h = self.act_fn(_linear(self, e, x, "up_proj"))
    elif hasattr(self, "_apply_gate"):
        h = self._apply_gate(_linear(self, e, x, "gate_up_proj"))
    else:
        gate, up = _linear(self, e, x, "gate_up_proj").chunk(2, dim=-1)
        h = self.act_fn(gate) * up
    return h


def _linear(self: Any, e: int, a: Tensor, name: str) -> Tensor:
    weight = getattr(self, name)[e]
    bias = getattr(self, f"{name}_bias")[e] if self.has_bias else 0
    product: Tensor = a @ (weight if self.is_transposed else weight.T) + bias
    return product


def without_experts(model: PreTrainedModel, kept: Mapping[int, Sequence[int]]) -> PreTrainedModel:
    """Build the model anew with the kept experts (layer -> ids) and their rows of the router alone."""
    config = type(model.config).from_dict(model.config.to_dict())
    (key,) = {"num_local_experts", "num_experts", "n_routed_experts"} & config.to_dict().keys()
    (n_kept,) = {len(experts) for experts in kept.values()}
    setattr(config, key, n_kept)
    smaller = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = model.state_dict()
    for name, value in smaller.state_dict().items():
        if state[name].shape != value.shape:
            layer = int(next(part for part in name.split(".") if part.isdecimal()))
            state[name] = state[name][list(kept[layer])]
    smaller.load_state_dict(state)
    return smaller


def set_experts(module: Any, experts: Sequence[Tensor]) -> None:
    """Put segments [n_segment, 3, d] (gate row, up row, down column) in the place of a stack's experts."""
    for expert, segments in enumerate(experts):
        module.gate_up_proj.data[expert] = torch.cat([segments[:, 0], segments[:, 1]])
        module.down_proj.data[expert] = segments[:, 2].T


def set_narrow(module: Any, down: Tensor, channels: Sequence[Tensor]) -> None:
    """Leave a stack's experts their channels alone, with the columns of `down` [n_expert, d, w]."""
    for expert, own in enumerate(channels):
        columns = torch.zeros_like(
            module.down_proj[expert].T if module.is_transposed else module.down_proj[expert]
        )
        columns[:, own] = down[expert]
        module.down_proj.data[expert] = columns.T if module.is_transposed else columns
