"""Which tensors have an expert axis: all names of the format, and the names made to mislead."""

import pytest

from mone_export.source.gguf_format import KEPT_COUNT_KEY, novice_tensor, part_of, slot_tensor

NAMES = {
    "ffn_gate_exps.weight": "experts",
    "ffn_up_exps.weight": "experts",
    "ffn_down_exps.weight": "experts",
    "ffn_gate_up_exps.weight": "experts",
    "ffn_down_exps.bias": "down bias",
    "ffn_gate_exps.bias": "bias",
    "ffn_up_exps.bias": "bias",
    "ffn_gate_up_exps.bias": "bias",
    "ffn_gate_exps.scale": "scale",
    "ffn_down_exps.scale": "scale",
    "ffn_down_exps.input_scale": "scale",
    "ffn_gate_up_exps.input_scale": "scale",
    "ffn_gate_inp.weight": "router",
    "ffn_gate_inp.bias": "router",
    "exp_probs_b": "router",
    "exp_probs_b.bias": "router",
}
OTHERS = (
    "ffn_gate_inp_shexp.weight",  # the gate of the shared experts: one row
    "ffn_gate_inp.scale",  # a scale of the router's input: hidden_size entries
    "ffn_gate_shexp.weight",
    "ffn_up_shexp.weight",
    "ffn_down_shexp.weight",
    "ffn_gate_chexps.weight",  # GroveMoE's adjugate experts
    "ffn_gate.weight",
    "ffn_down.bias",
    "ffn_norm.weight",
    "ffn_norm_exps.weight",
    "attn_q.weight",
    "ffn_gate_exps.weight.part",
    "ffn_gate_exps",
    "ffn_gate_exps_weight",
    "exp_probs_b.weight",
)


@pytest.mark.parametrize("layer", [0, 7, 123])
@pytest.mark.parametrize("name", NAMES)
def test_tensor_with_an_expert_axis_has_its_part(name: str, layer: int) -> None:
    assert part_of(f"blk.{layer}.{name}") == (layer, NAMES[name])


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_tensor_has_none(name: str) -> None:
    assert part_of(f"blk.0.{name}") is None


@pytest.mark.parametrize("prefix", ["", "blk.", "blk.x.", "blk..", "xblk.0.", "v.blk.0.", "dec.blk.0."])
def test_name_outside_a_block_has_none(prefix: str) -> None:
    assert part_of(f"{prefix}ffn_gate_exps.weight") is None


def test_names_of_our_own() -> None:
    assert novice_tensor(12) == "blk.12.ffn_down_exps.bias"
    assert part_of(novice_tensor(12)) == (12, "down bias")
    assert slot_tensor(12) == "blk.12.ffn_exps_slot" and part_of(slot_tensor(12)) is None
    assert KEPT_COUNT_KEY.format(arch="gpt-oss") == "gpt-oss.expert_kept_count"
