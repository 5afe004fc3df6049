"""The MoNE GGUF format, versions 1 and 2: what it adds to an ordinary GGUF, and the part of each tensor.

`general.architecture` and the model's own keys stay; `{arch}.expert_count` stays M, the router's width. In a
pruned layer the experts are renumbered: the R kept ones are 0..R-1, the pruned ones R..M-1, each group in
ascending order of the original ids (the layer's `order`).

    blk.N.ffn_{gate,up,down,gate_up}_exps.weight   the matrices of order[:R]
    blk.N.ffn_gate_inp.*, blk.N.exp_probs_b*       router and selection bias: M rows or entries, in `order`
    blk.N.ffn_down_exps.bias                       F32, M rows: own bias or 0 for kept, novices for pruned
    blk.N.ffn_{gate,up,gate_up}_exps.bias          M rows in `order`, 0 for pruned
    blk.N.ffn_down_exps.scale                      M entries in `order`, 1 for pruned: novices contain it
    blk.N.ffn_exps_slot                            I32, [M, 1]: only where routing is by groups, see below
    everything else, and every layer with R = M    untouched

With the methods that take experts out of the router no novice exists and no such key is written: the file is
an ordinary one of R experts, with R rows of the router, that any llama.cpp runs. By method `narrow` they have
fewer channels, all as many: `{arch}.expert_feed_forward_length` says so, or `{arch}.feed_forward_length`.

Where a token first chooses groups of experts, an expert's number says which group it is in. There router and
selection bias stay as they were, and `ffn_exps_slot` maps the number of an expert to its place in `order`,
which the runtime uses for matrices, biases and scales only.

A routed id >= R selects no matrix: its product is zero by definition of the runtime's flagged MUL_MAT_ID, the
bias addition gives it its novice, and the router's weight multiplies that as it does any expert's output.

    {arch}.expert_kept_count   u32 [block_count]: R per layer, 0 where all stay; absent in an ordinary model
    mone.format_version        u32, 1, or 2 where there are tiers
    mone.expert_order          i32: the `order`s of all pruned layers, in layer order, concatenated
    mone.*                     provenance, ignored by the runtime
    mone.options, mone.inputs  JSON: the command that made the file, [name, SHA-256] of files it was given
    mone.calibration.measured  SHA-256 of what was measured: same command and this one, same choices

Version 2 has further tiers of experts between the R and the constants: thin ones, with fewer intermediate
channels. `order` then lists the whole experts, those of tier 1, of tier 2 and so on, the constants.

    blk.N.ffn_{gate,up,down,gate_up}_exps.tT.weight   tier T of a layer: the same matrices, narrower inside
    blk.N.ffn_down_exps.bias                          of a thin expert: what is added to its output
    {arch}.expert_tier_count   u32: tiers that a layer has at most
    {arch}.expert_tier_sizes   u32 [block_count x tiers]: their experts, layer by layer
"""

import re
from collections.abc import Iterable
from typing import Literal

KEPT_COUNT_KEY = "{arch}.expert_kept_count"
GGUF_ALIGNMENT = 32  # of tensors, unless a file says otherwise
MOST_TIERS = 7  # of a layer
TIER_COUNT_KEY = "{arch}.expert_tier_count"
TIER_SIZES_KEY = "{arch}.expert_tier_sizes"
COUNT_KEY = "{arch}.expert_count"
WIDTH_KEY = "{arch}.feed_forward_length"  # of experts, too, where no key is theirs alone
EXPERT_WIDTH_KEY = "{arch}.expert_feed_forward_length"
SHARED_WIDTH_KEY = "{arch}.expert_shared_feed_forward_length"
SHARED_COUNT_KEY = "{arch}.expert_shared_count"
GROUP_COUNT_KEY = "{arch}.expert_group_count"  # llama.cpp's own
METHOD_KEY = "mone.method"
OPTIONS_KEY, INPUTS_KEY, MEASURED_KEY = "mone.options", "mone.inputs", "mone.calibration.measured"

Part = Literal["experts", "down bias", "bias", "scale", "router"]

_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)_exps\.(weight|bias|scale|input_scale)")
_HOLDS_IDS = re.compile(r"blk\.(\d+)\.(ffn_gate_tid2eid|ffn_(gate|up|down)_chexps)\..*")
_ROUTER = re.compile(r"blk\.(\d+)\.(ffn_gate_inp\.(weight|bias)|exp_probs_b(_vl)?(\.bias)?)")


def part_of(name: str) -> tuple[int, Part] | None:
    """Return (layer, part) of a tensor that has an expert axis, or None for any other tensor."""
    if match := _ROUTER.fullmatch(name):
        return int(match[1]), "router"
    if match := _EXPERTS.fullmatch(name):
        layer, matrix, kind = int(match[1]), match[2], match[3]
        if kind == "weight":
            return layer, "experts"
        if kind == "bias":
            return layer, "down bias" if matrix == "down" else "bias"
        return layer, "scale"
    return None


def matrix_of(name: str) -> str:
    """Return which of an expert's matrices a tensor holds: gate, up, down or gate_up."""
    match = _EXPERTS.fullmatch(name)
    assert match is not None, name
    return match[2]


def holds_ids(names: Iterable[str]) -> dict[int, str]:
    """Return, for each layer that has one, a tensor that depends on the numbers of experts."""
    return {int(match[1]): name for name in names if (match := _HOLDS_IDS.fullmatch(name))}


def tier_tensor(name: str, tier: int) -> str:
    """Return the name of the tensor that has the experts of a tier, from 1, of what `name` holds."""
    return f"{name.removesuffix('.weight')}.t{tier}.weight"


def novice_tensor(layer: int) -> str:
    """Return the name of the tensor that holds a layer's novices."""
    return f"blk.{layer}.ffn_down_exps.bias"


def slot_tensor(layer: int) -> str:
    """Return the name of the tensor that maps experts' numbers to slots where the router keeps its order."""
    return f"blk.{layer}.ffn_exps_slot"
