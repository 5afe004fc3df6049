"""What a pruned copy of a GGUF must be, and what its layers compute: by definition, in numpy and PyTorch.

Shares no code with the package. The format is described in `mone_export/source/gguf_format.py`.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from gguf_parts import Parts, Stored, key, put_together, taken_apart
from torch import Tensor

# layer -> (how many experts it keeps, original ids in the file's order)
Orders = dict[int, tuple[int, list[int]]]

_PER_EXPERT = re.compile(
    r"blk\.(\d+)\.(?:"
    r"(?P<matrix>ffn_(?:gate|up|down|gate_up)_exps\.weight)"
    r"|(?P<down>ffn_down_exps\.bias)"
    r"|(?P<bias>ffn_(?:gate|up|gate_up)_exps\.bias)"
    r"|(?P<scale>ffn_(?:gate|up|down|gate_up)_exps\.(?:scale|input_scale))"
    r"|(?P<router>ffn_gate_inp\.(?:weight|bias)|exp_probs_b(?:_vl)?(?:\.bias)?)"
    r"|(?P<table>ffn_gate_tid2eid\.\w+))"
)


def keys_of(file: Path) -> dict[str, Any]:
    """Return a file's keys as Python values."""
    return {name: each.contents() for name, each in GGUFReader(file).fields.items()}


def orders_of(file: Path) -> Orders:
    """Return, for each pruned layer, how many experts it keeps and the original ids in the file's order."""
    keys = keys_of(file)
    arch = keys["general.architecture"]
    n_expert, ids = keys[f"{arch}.expert_count"], iter(keys.get("mone.expert_order", []))
    counts = keys.get(f"{arch}.expert_kept_count", [])
    assert not counts or len(counts) == keys[f"{arch}.block_count"]
    found = {
        layer: (count, [next(ids) for _ in range(n_expert)])
        for layer, count in enumerate(counts)
        if 0 < count < n_expert
    }
    assert next(ids, None) is None, "mone.expert_order is too long"
    for layer, (count, order) in found.items():
        assert sorted(order) == [*range(n_expert)], f"layer {layer}: not every expert once"
        assert order == sorted(order[:count]) + sorted(order[count:]), f"layer {layer}: not ascending"
    return found


def assert_pruned_copy(
    original: Path | Sequence[Path], pruned: Path, kept: Mapping[int, Sequence[int]] | None = None
) -> None:
    """Assert that a file is another with experts left out, every other byte as it was.

    `original` is one file or all parts of a split one. `kept` (layer -> original ids) says what an ordinary
    file of fewer experts holds; without it the file itself says it, and has vectors for the others.
    """
    files = [original] if isinstance(original, Path) else [*original]
    before = taken_apart(files[0])
    for file in files[1:]:
        before.tensors.update(taken_apart(file).tensors)
    after = taken_apart(pruned)
    _check_places(pruned)
    arch = keys_of(files[0])["general.architecture"]
    allowed = {f"{arch}.expert_count"} if kept is not None else {f"{arch}.expert_kept_count"}
    _check_keys(before, after, allowed)
    if kept is not None:
        assert keys_of(pruned)[f"{arch}.expert_count"] in {len(ids) for ids in kept.values()}
        wanted = dict(_smaller(before, kept))
    else:
        orders = orders_of(pruned)
        novices = {layer: _novices(after, layer, count) for layer, (count, _) in orders.items()}
        slotted = {layer for layer in orders if f"blk.{layer}.ffn_exps_slot" in after.tensors}
        assert slotted or not is_numbered(keys_of(files[0])), (
            "no slots where the experts' numbers mean groups"
        )
        wanted = dict(pruned_tensors(before, orders, novices, slotted))
    assert [name for name in after.tensors if name in before.tensors] == [*before.tensors], "tensors' order"
    assert after.tensors.keys() == wanted.keys(), after.tensors.keys() ^ wanted.keys()
    for name, tensor in wanted.items():
        found = after.tensors[name]
        assert found.kind == tensor.kind, f"{name} is {found.kind.name}, not {tensor.kind.name}"
        assert found.shape == tensor.shape, f"{name} is {found.shape}, not {tensor.shape}"
        if found.data != tensor.data:
            one, other = (np.frombuffer(each, np.uint8) for each in (found.data, tensor.data))
            place = int(np.flatnonzero(one != other)[0])
            row = place // (len(tensor.data) // tensor.shape[-1])
            raise AssertionError(f"{name} differs at byte {place}, in row {row}")


def _novices(parts: Parts, layer: int, count: int) -> bytes:
    """Return the rows of the pruned experts, which are any finite numbers."""
    bias = parts.tensors[f"blk.{layer}.ffn_down_exps.bias"]
    assert np.isfinite(np.frombuffer(bias.data, np.float32)).all(), f"novices of layer {layer} are not finite"
    return bias.data[4 * bias.shape[0] * count :]


def _check_places(file: Path) -> None:
    """Every tensor begins where the one before it ends, rounded up, and the file ends where the last does."""
    reader = GGUFReader(file)
    place = reader.data_offset
    assert place % reader.alignment == 0
    for tensor in reader.tensors:
        assert tensor.data_offset == place, f"{tensor.name} begins at {tensor.data_offset}, not {place}"
        place += tensor.n_bytes + -tensor.n_bytes % reader.alignment
    assert file.stat().st_size == place, f"the file has {file.stat().st_size} bytes, not {place}"


def _check_keys(before: Parts, after: Parts, allowed: set[str]) -> None:
    """Keys are as they were and in the same order, except for those that pruning changes and `split.*`."""
    own = [name for name in before.keys if name not in allowed and not re.match(r"split\.|mone\.", name)]
    found = [name for name in after.keys if name not in allowed and not name.startswith("mone.")]
    assert found == own, f"keys: {set(found) ^ set(own) or 'other order'}"
    for name in own:
        assert after.keys[name] == before.keys[name], f"key {name} has another value or type"


def _rows(tensor: Stored, ids: Sequence[int]) -> Stored:
    """Return the entries `ids` of the slowest dimension, byte for byte."""
    size = len(tensor.data) // tensor.shape[-1]
    data = b"".join(tensor.data[size * each : size * (each + 1)] for each in ids)
    return Stored(tensor.kind, (*tensor.shape[:-1], len(ids)), data)


def _smaller(before: Parts, kept: Mapping[int, Sequence[int]]) -> Iterator[tuple[str, Stored]]:
    """Yield what an ordinary file with fewer experts must hold."""
    for name, tensor in before.tensors.items():
        match = _PER_EXPERT.fullmatch(name)
        assert match is None or not match["table"], f"{name} refers to experts that are gone"
        yield name, _rows(tensor, kept[int(match[1])]) if match else tensor


def pruned_tensors(
    before: Parts, orders: Orders, novices: Mapping[int, bytes], slotted: Collection[int]
) -> Iterator[tuple[str, Stored]]:
    """Yield what a file with novices must hold, by layer the rows of the pruned experts in the file's order.

    In the layers `slotted` the number of an expert has a meaning, so that the router stays as it is.
    """
    for name, tensor in before.tensors.items():
        match = _PER_EXPERT.fullmatch(name)
        if match is None or int(match[1]) not in orders:
            yield name, tensor
        elif not match["down"]:
            layer = int(match[1])
            yield name, _changed(tensor, match, *orders[layer], numbered=layer in slotted)
    for layer, (count, order) in orders.items():
        name = f"blk.{layer}.ffn_down_exps.bias"
        n_out = before.tensors[f"blk.{layer}.ffn_down_exps.weight"].shape[1]
        none = Stored(GGMLQuantizationType.F32, (n_out, len(order)), bytes(4 * n_out * len(order)))
        own = before.tensors.get(name, none)
        yield name, own._replace(data=_rows(own, order[:count]).data + novices[layer])
        if layer in slotted:
            slots = np.argsort(order).astype(np.int32)
            shape = (1, len(order))
            yield f"blk.{layer}.ffn_exps_slot", Stored(GGMLQuantizationType.I32, shape, slots.tobytes())


def prune_by_hand(original: Path, outfile: Path, orders: Orders, novices: Mapping[int, bytes]) -> Path:
    """Write what the package should, given the orders and the rows of the pruned experts."""
    parts, keys = taken_apart(original), keys_of(original)
    arch = keys["general.architecture"]
    counts = [orders[layer][0] if layer in orders else 0 for layer in range(keys[f"{arch}.block_count"])]
    added = {
        f"{arch}.expert_kept_count": key(f"{arch}.expert_kept_count", counts),
        "mone.format_version": key("mone.format_version", 1),
        "mone.expert_order": key(
            "mone.expert_order", [each for _, order in orders.values() for each in order], integer=5
        ),
    }
    tensors = dict(pruned_tensors(parts, orders, novices, orders if is_numbered(keys) else ()))
    in_order = {name: tensors.pop(name) for name in parts.tensors} | tensors
    outfile.write_bytes(put_together(Parts(parts.keys | added, in_order)))
    return outfile


def is_numbered(keys: Mapping[str, Any]) -> bool:
    """Tell whether the number of an expert says which group it is in."""
    arch = keys["general.architecture"]
    return arch == "grovemoe" or keys.get(f"{arch}.expert_group_count", 0) > 1


def _changed(tensor: Stored, match: re.Match[str], count: int, order: list[int], *, numbered: bool) -> Stored:
    """Return a tensor with an entry for each expert as a pruned layer must have it."""
    if match["matrix"]:
        return _rows(tensor, order[:count])
    if match["table"]:
        ids = np.frombuffer(tensor.data, np.int32)
        return tensor if numbered else tensor._replace(data=np.argsort(order).astype(np.int32)[ids].tobytes())
    if match["router"]:
        return tensor if numbered else _rows(tensor, order)
    assert tensor.kind == GGMLQuantizationType.F32
    n_value = tensor.shape[0] if match["bias"] else 1
    rest = np.full(n_value * (len(order) - count), 0 if match["bias"] else 1, np.float32)
    return tensor._replace(data=_rows(tensor, order[:count]).data + rest.tobytes())


def values_of(tensor: Stored) -> np.ndarray:
    """Return a tensor's numbers, float32 or int32, in numpy's order of dimensions."""
    if tensor.kind == GGMLQuantizationType.I32:
        return np.frombuffer(tensor.data, np.int32).reshape(tensor.shape[::-1])
    raw = np.frombuffer(tensor.data, np.uint8)
    if tensor.kind == GGMLQuantizationType.F32:
        return raw.view(np.float32).reshape(tensor.shape[::-1])
    rows = raw.reshape(*tensor.shape[:0:-1], -1)
    return np.asarray(dequantize(rows, tensor.kind), np.float32).reshape(tensor.shape[::-1])


def dequantised(file: Path, outfile: Path) -> Path:
    """Write the same file with every tensor's numbers as F32: what its quantised form means exactly."""
    parts = taken_apart(file)
    tensors = {
        name: tensor
        if tensor.kind in (GGMLQuantizationType.I32, GGMLQuantizationType.F32)
        else Stored(GGMLQuantizationType.F32, tensor.shape, values_of(tensor).tobytes())
        for name, tensor in parts.tensors.items()
    }
    outfile.write_bytes(put_together(Parts(parts.keys, tensors)))
    return outfile


# how the architectures route where no key says it: gating, whether the weights of the chosen add up to 1
ROUTING: Mapping[str, tuple[str, bool]] = {
    "olmoe": ("softmax", False),
    "qwen2moe": ("softmax", False),
    "qwen3moe": ("softmax", True),
    "llama": ("softmax", True),
    "gpt-oss": ("softmax of the chosen", False),
}
# where the graph multiplies by `ffn_*_exps.scale`; elsewhere such tensors are loaded and not used
SCALED = {
    *("cohere2moe", "deepseek32", "dots3note", "gemma4", "glm-dsa", "hy_v3", "llama", "mellum", "mistral3"),
    *("nemotron_h_moe", "qwen35moe", "qwen3moe", "qwen3next", "qwen4exp"),
}
_GATING = {1: "softmax", 2: "sigmoid", 3: "softmax of the chosen", 4: "sqrtsoftplus"}
_GATINGS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "softmax of the chosen": lambda logits: logits,
    "sqrtsoftplus": lambda logits: torch.nn.functional.softplus(logits).sqrt(),
}


@dataclass(frozen=True)
class MoeLayer:
    """A layer's router and experts, dequantised, and how they are used."""

    arch: str
    keys: Mapping[str, Any]  # without the architecture's name
    tensors: Mapping[str, Tensor]  # without `blk.N.`; numpy's order of dimensions

    @staticmethod
    def of(file: Path, layer: int) -> "MoeLayer":
        """Read a layer of a file."""
        keys, prefix = keys_of(file), f"blk.{layer}."
        arch = keys["general.architecture"]
        own = {name.removeprefix(f"{arch}."): value for name, value in keys.items()}
        tensors = {
            name.removeprefix(prefix): torch.from_numpy(values_of(tensor).copy())
            for name, tensor in taken_apart(file).tensors.items()
            if name.startswith(prefix)
        }
        return MoeLayer(arch, own, tensors)

    def route(self, x: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the chosen experts' ids [n_token, top_k] and their weights for inputs [n_token, d].

        `tokens` [n_token] are needed where the token's number chooses.
        """
        gating, norm = ROUTING.get(self.arch, ("", False))
        gating = gating or _GATING[self.keys["expert_gating_func"]]
        logits = x @ self.tensors["ffn_gate_inp.weight"].T + self.tensors.get("ffn_gate_inp.bias", 0)
        probs = _GATINGS[gating](logits)
        bias = self.tensors.get("exp_probs_b.bias", self.tensors.get("exp_probs_b"))
        table = self.tensors.get("ffn_gate_tid2eid.weight")
        if table is not None:
            assert tokens is not None
            ids = table[tokens].long()
        else:
            chosen_by = self._in_groups(probs if bias is None else probs + bias)
            ids = chosen_by.topk(self.keys["expert_used_count"]).indices
        weights = probs.gather(-1, ids)
        if gating == "softmax of the chosen":
            weights = weights.softmax(-1)
        if norm or self.keys.get("expert_weights_norm"):
            weights = weights / weights.sum(-1, keepdim=True)
        return ids, weights * (self.keys.get("expert_weights_scale") or 1)

    def _in_groups(self, scores: Tensor) -> Tensor:
        """Let only experts of the best groups be chosen: by the sum of the two best scores of each."""
        n_group = self.keys.get("expert_group_count") or 1
        if n_group == 1:
            return scores
        grouped = scores.view(len(scores), n_group, -1)
        best = grouped.topk(2).values.sum(-1).topk(self.keys["expert_group_used_count"]).indices
        open_ = torch.zeros(len(scores), n_group, dtype=torch.bool).scatter(1, best, True)
        return grouped.masked_fill(~open_[..., None], -torch.inf).flatten(1)

    def expert(self, slot: int, x: Tensor) -> Tensor:
        """Return the output of the expert in a slot, [n_token, d], before its weight; or the novice there."""
        tier, place = self._place(slot)
        if tier is None:
            return self.tensors["ffn_down_exps.bias"][slot].expand_as(x)
        if f"ffn_tilt_in_exps{tier}.weight" in self.tensors:
            into, out = (self.tensors[f"ffn_tilt_{part}_exps{tier}.weight"][place] for part in ("in", "out"))
            return self.tensors["ffn_down_exps.bias"][slot] + x @ into.T @ out.T
        if f"ffn_gate_up_exps{tier}.weight" in self.tensors:
            gate, up = self._linear("gate_up", slot, x).chunk(2, -1)
        else:
            gate, up = self._linear("gate", slot, x), self._linear("up", slot, x)
        return self._linear("down", slot, _activated(self.arch, gate, up))

    def _place(self, slot: int) -> tuple[str | None, int]:
        """Return the tier of a slot, as the names of its tensors have it, and the place of its matrices."""
        for tier in ("", *(f".t{number}" for number in range(1, 8))):
            parts = (self.tensors.get(f"ffn_{part}_exps{tier}.weight") for part in ("down", "tilt_in"))
            n_matrix = next((len(part) for part in parts if part is not None), 0)
            if slot < n_matrix:
                return tier, slot
            slot -= n_matrix
        return None, slot

    def _linear(self, matrix: str, slot: int, x: Tensor) -> Tensor:
        part = f"ffn_{matrix}_exps"
        tier, place = self._place(slot)
        y = x @ self.tensors[f"{part}{tier}.weight"][place].T
        # the two halves of a merged matrix share the factor of the second
        scale = self.tensors.get(f"{part.replace('gate_up', 'up')}.scale")
        y = y * scale[slot] if scale is not None and self.arch in SCALED else y
        bias = self.tensors.get(f"{part}.bias")
        return y if bias is None else y + bias[slot, : y.shape[-1]]

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Return what the routed experts add for inputs [n_token, d]."""
        ids, weights = self.route(x, tokens)
        slots = self.tensors.get("ffn_exps_slot")
        ids = ids if slots is None else slots.flatten()[ids].long()
        out = torch.zeros(len(x), self.tensors["ffn_down_exps.weight"].shape[1])
        for slot in ids.unique().tolist():
            token, place = torch.where(ids == slot)
            out[token] += weights[token, place, None] * self.expert(slot, x[token])
        return out


def _activated(arch: str, gate: Tensor, up: Tensor) -> Tensor:
    if arch == "gpt-oss":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return torch.nn.functional.silu(gate) * up
