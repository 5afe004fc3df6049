"""GGUFs of version 2 made by hand: experts of which some became thin, tilts or constants.

Thin experts, and whole ones in a tier of their own, have tensors called `blk.N.ffn_up_exps.tT.weight` and so
on; tilts `blk.N.ffn_tilt_in_exps.tT.weight` and `_out`. Shares no code with the package.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from gguf import GGMLQuantizationType
from gguf_parts import Parts, Stored, key, text_of
from gguf_reference import SCALED, is_numbered, pruned_tensors, values_of

THIN, WHOLE, TILTS = "thin", "whole", "tilts"
RANKS = {2: 32, 4: 64}
N_TIER = 4


@dataclass(frozen=True)
class Fates:
    """What becomes of a layer's experts, by their original numbers: `tiers` are kinds and experts."""

    kept: list[int]
    tiers: list[tuple[str, list[int]]]
    constant: list[int]

    @property
    def order(self) -> list[int]:
        """The original numbers in the order of the slots."""
        return [*self.kept, *(each for _, ids in self.tiers for each in ids), *self.constant]

    def of_kind(self, *kinds: str) -> list[int]:
        """Return the experts in the tiers of a kind."""
        return [each for kind, ids in self.tiers for each in ids if kind in kinds]


def fates_for(parts: Parts) -> dict[int, Fates]:
    """Return a random choice for every layer that has experts and predicts the next token.

    One layer has all four tiers, the next lacks the first tilts, and so on.
    """
    rng, found = np.random.default_rng(0), {}
    for layer in _layers(parts):
        ids = rng.permutation(_integer(parts, "expert_count")).tolist()
        kinds = (THIN, TILTS if len(found) % 2 == 0 else "", WHOLE, TILTS)
        sizes = [2, *(int(kind != "") for kind in kinds[1:])]
        kept, rest = sorted(ids[:2]), ids[2:]
        tiers = []
        for kind, size in zip(kinds, sizes, strict=True):
            tiers.append((kind, sorted(rest[:size])))
            rest = rest[size:]
        found[layer] = Fates(kept, tiers, sorted(rest))
    return found


def tiered(parts: Parts, fates: Mapping[int, Fates], *, tilted: bool = True) -> Parts:
    """Return a file of version 2. Without `tilted` its tilts have matrices of 0 at the end."""
    orders = {layer: (len(each.kept), each.order) for layer, each in fates.items()}
    novices = {
        layer: np.stack([_vector(parts, layer, each) for each in fate.order[len(fate.kept) :]]).tobytes()
        for layer, fate in fates.items()
    }
    tensors = _in_order(parts, dict(pruned_tensors(parts, orders, novices, _slotted(parts, fates))))
    for layer, fate in fates.items():
        slots = {expert: slot for slot, expert in enumerate(fate.order)}
        for part in ("gate", "up"):
            name = f"blk.{layer}.ffn_{part}_exps.bias"
            if name in parts.tensors:
                own, rows = values_of(parts.tensors[name]), values_of(tensors[name]).copy()
                for expert in fate.of_kind(THIN, WHOLE):
                    channels = _channels(parts, layer, expert, fate)
                    rows[slots[expert], : len(channels)] = own[expert, channels]
                tensors[name] = _stored(rows)
        name = f"blk.{layer}.ffn_down_exps.bias"
        rows = values_of(tensors[name]).copy()
        for expert in fate.of_kind(WHOLE):
            rows[slots[expert]] = values_of(parts.tensors[name])[expert] if name in parts.tensors else 0
        tensors[name] = _stored(rows)
        for number, (kind, ids) in enumerate(fate.tiers, start=1):
            if kind == TILTS:
                pairs = [_tilt(parts, layer, expert, RANKS[number]) for expert in ids]
                prefix = f"blk.{layer}.ffn_tilt"
                tensors[f"{prefix}_in_exps.t{number}.weight"] = _stored(np.stack([pair[0] for pair in pairs]))
                outs = np.stack([pair[1] for pair in pairs]) * np.float32(tilted)
                tensors[f"{prefix}_out_exps.t{number}.weight"] = _stored(outs)
            elif kind:
                for part in _matrices(parts, layer):
                    cut = [_cut(parts, layer, part, expert, fate) for expert in ids]
                    tensors[f"blk.{layer}.ffn_{part}_exps.t{number}.weight"] = _stored(np.stack(cut))
    arch, n_layer = _arch(parts), _n_layer(parts)
    sizes = [
        len(fates[layer].tiers[tier][1]) if layer in fates else 0
        for layer in range(n_layer)
        for tier in range(N_TIER)
    ]
    values: dict[str, int | list[int]] = {
        f"{arch}.expert_kept_count": _counts(parts, orders),
        f"{arch}.expert_tier_count": N_TIER,
        f"{arch}.expert_tier_sizes": sizes,
        "mone.format_version": 2,
    }
    keys = {name: key(name, value) for name, value in values.items()}
    return Parts(parts.keys | keys | _order_key(orders), tensors)


def untiered(parts: Parts, fates: Mapping[int, Fates], *, tilted: bool = False) -> Parts:
    """Return the same function in version 1: thin experts are whole ones with columns of 0.

    Tilts are constants, or with `tilted` experts of gpt-oss that are linear: without an up projection it
    computes `g * sigmoid(1.702 * g)`, and the difference of that for g and -g is g.
    """
    kinds = (THIN, WHOLE, TILTS) if tilted else (THIN, WHOLE)
    changed, orders, novices = dict(parts.tensors), {}, {}
    for layer, fate in fates.items():
        with_matrices = fate.kept + fate.of_kind(*kinds)
        rest = ([] if tilted else fate.of_kind(TILTS)) + fate.constant
        orders[layer] = len(with_matrices), with_matrices + rest
        novices[layer] = np.stack([_vector(parts, layer, expert) for expert in rest]).tobytes()
        name = f"blk.{layer}.ffn_down_exps.weight"
        down = values_of(parts.tensors[name]).copy()
        for expert in fate.of_kind(THIN):
            gone = np.setdiff1d(np.arange(down.shape[2]), _channels(parts, layer, expert, fate))
            down[expert][:, gone] = 0
        changed[name] = _stored(down)
        if tilted:
            _put_linear(parts, layer, fate, changed)
    slotted = _slotted(parts, fates)
    tensors = _in_order(
        parts, dict(pruned_tensors(replace(parts, tensors=changed), orders, novices, slotted))
    )
    for layer, fate in fates.items():
        name = f"blk.{layer}.ffn_down_exps.bias"
        rows = values_of(tensors[name]).copy()
        for expert in fate.of_kind(THIN, *((TILTS,) if tilted else ())):
            rows[orders[layer][1].index(expert)] = _vector(parts, layer, expert)
        tensors[name] = _stored(rows)
    arch = _arch(parts)
    values: dict[str, int | list[int]] = {
        f"{arch}.expert_kept_count": _counts(parts, orders),
        "mone.format_version": 1,
    }
    keys = {name: key(name, value) for name, value in values.items()}
    return Parts(parts.keys | keys | _order_key(orders), tensors)


def _put_linear(parts: Parts, layer: int, fate: Fates, tensors: dict[str, Stored]) -> None:
    """Make experts of gpt-oss of a layer's tilts."""
    names = {
        f"{part}.{kind}": f"blk.{layer}.ffn_{part}_exps.{kind}"
        for part in ("gate", "up", "down")
        for kind in ("weight", "bias")
    }
    values = {which: values_of(tensors[name]).copy() for which, name in names.items()}
    for number, (kind, ids) in enumerate(fate.tiers, start=1):
        for expert in ids if kind == TILTS else ():
            into, out = _tilt(parts, layer, expert, RANKS[number])
            for each in values.values():
                each[expert] = 0
            values["gate.weight"][expert, : 2 * len(into)] = np.concatenate([into, -into])
            values["down.weight"][expert, :, : 2 * len(into)] = np.concatenate([out, -out], axis=1)
    tensors |= {names[which]: _stored(each) for which, each in values.items()}


def _layers(parts: Parts) -> list[int]:
    n_predicting = _integer(parts, "nextn_predict_layers")
    layers = range(_n_layer(parts) - n_predicting)
    return [layer for layer in layers if f"blk.{layer}.ffn_down_exps.weight" in parts.tensors]


def _matrices(parts: Parts, layer: int) -> list[str]:
    names = ("gate", "up", "gate_up", "down")
    return [part for part in names if f"blk.{layer}.ffn_{part}_exps.weight" in parts.tensors]


def _channels(parts: Parts, layer: int, expert: int, fate: Fates) -> np.ndarray:
    """Return the inner channels of an expert that stay: an odd number of 32 of a thin one."""
    n_ff = parts.tensors[f"blk.{layer}.ffn_down_exps.weight"].shape[0]
    if expert not in fate.of_kind(THIN):
        return np.arange(n_ff)
    width = 32 * (max(1, n_ff // 64 - 1) | 1)
    return np.sort(np.random.default_rng([1, layer, expert]).permutation(n_ff)[:width])


def _cut(parts: Parts, layer: int, part: str, expert: int, fate: Fates) -> np.ndarray:
    """Return a matrix of an expert with the channels that stay, and its scale in its numbers."""
    name = f"blk.{layer}.ffn_{part}_exps"
    matrix = values_of(parts.tensors[f"{name}.weight"])[expert]
    channels = _channels(parts, layer, expert, fate)
    scale = parts.tensors.get(f"{name.replace('gate_up', 'up')}.scale")
    if scale is not None and _arch(parts) in SCALED:
        matrix = matrix * values_of(scale)[expert]
    if part == "down":
        return matrix[:, channels]
    return matrix[[*channels, *(len(matrix) // 2 + channels)] if part == "gate_up" else channels]


def _tilt(parts: Parts, layer: int, expert: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random matrices [rank, n_in] and [n_out, rank]; the last eighth of the rank is columns of 0."""
    first = parts.tensors[f"blk.{layer}.ffn_{_matrices(parts, layer)[0]}_exps.weight"]
    n_out = parts.tensors[f"blk.{layer}.ffn_down_exps.weight"].shape[1]
    rng = np.random.default_rng([2, layer, expert])
    into = rng.standard_normal((rank, first.shape[0]), np.float32) / 20
    out = rng.standard_normal((n_out, rank), np.float32) / 10
    out[:, -rank // 8 :] = 0
    return into, out


def _vector(parts: Parts, layer: int, expert: int) -> np.ndarray:
    n_out = parts.tensors[f"blk.{layer}.ffn_down_exps.weight"].shape[1]
    return np.random.default_rng([3, layer, expert]).standard_normal(n_out, np.float32) / 10


def _slotted(parts: Parts, fates: Mapping[int, Fates]) -> list[int]:
    arch = _arch(parts)
    values = {
        "general.architecture": arch,
        f"{arch}.expert_group_count": _integer(parts, "expert_group_count"),
    }
    return [*fates] if is_numbered(values) else []


def _in_order(parts: Parts, tensors: dict[str, Stored]) -> dict[str, Stored]:
    return {name: tensors.pop(name) for name in parts.tensors} | tensors


def _order_key(orders: Mapping[int, tuple[int, list[int]]]) -> dict[str, bytes]:
    name = "mone.expert_order"
    return {name: key(name, [each for _, order in orders.values() for each in order], integer=5)}


def _counts(parts: Parts, orders: Mapping[int, tuple[int, list[int]]]) -> list[int]:
    return [orders[layer][0] if layer in orders else 0 for layer in range(_n_layer(parts))]


def _arch(parts: Parts) -> str:
    return text_of(parts.keys["general.architecture"])


def _n_layer(parts: Parts) -> int:
    return _integer(parts, "block_count")


def _integer(parts: Parts, name: str) -> int:
    stored = parts.keys.get(f"{_arch(parts)}.{name}")
    return int.from_bytes(stored[-4:], "little") if stored else 0


def _stored(values: np.ndarray) -> Stored:
    return Stored(
        GGMLQuantizationType.F32, values.shape[::-1], np.ascontiguousarray(values, np.float32).tobytes()
    )
