"""Files of version 2 in llama.cpp: experts that became thin, tilts or constants, and what is refused."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf_families import save_wide
from gguf_models import ARCHS, VARIANTS, tiny_gguf
from gguf_parts import Parts, Stored, key, put_together, taken_apart
from gguf_reference import MoeLayer, dequantised
from gguf_tiers import N_TIER, fates_for, tiered, untiered
from llama_logits import logits
from llama_tensors import inside
from programs import complete, run, running_rpc_server
from torch import Tensor

from mone_export.calibration.llama_model import LlamaModel
from mone_export.errors import MoneError
from mone_export.llama_options import LlamaOptions
from mone_export.runtime import path as bin_folder

pytestmark = [pytest.mark.slow, pytest.mark.upstream]

TOKENS = np.random.default_rng(0).integers(0, 128, 40).tolist()
LAYERS = (
    *(("olmoe", 1), ("qwen2moe", 1), ("qwen3moe", 0), ("qwen3moe", 1), ("llama", 0), ("gpt-oss", 0)),
    *(("gpt-oss", 1), ("deepseek2", 1), ("deepseek2 in groups", 1), ("glm4moe in groups", 1)),
    *(("deepseek4 hashed", 0), ("deepseek4 hashed", 2)),
)
# softmax, sigmoid and hashed routers, groups, biases, scales, merged matrices, weighted inputs, ReLU
FAMILIES = (
    *("qwen3moe", "olmoe", "gpt-oss", "llama4", "deepseek2 in groups", "glm4moe", "grovemoe"),
    *("deepseek4 hashed", "smallthinker", "qwen3next", "gemma4"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiers")


def ordinary(name: str, folder: Path) -> Path:
    """Return a whole file: of llama.cpp's tests, or Gemma 4 from transformers."""
    if name != "gemma4":
        return tiny_gguf(name, folder)
    file = folder / name / "model-f32.gguf"
    return file if file.exists() else save_wide("Gemma4ForCausalLM", folder / name)[1]


def with_tiers(name: str, folder: Path, *, tilted: bool = True) -> Path:
    """Return a file of version 2 beside the one it is made of."""
    whole = ordinary(name, folder)
    file = whole.with_name(f"{whole.stem}-{'tilted' if tilted else 'flat'}.gguf")
    if not file.exists():
        parts = taken_apart(whole)
        file.write_bytes(put_together(tiered(parts, fates_for(parts), tilted=tilted)))
    return file


def in_version_1(name: str, folder: Path, *, tilted: bool = False) -> Path:
    """Return a file of version 1 that computes the same."""
    whole = ordinary(name, folder)
    file = whole.with_name(f"{whole.stem}-{'linear' if tilted else 'untiered'}.gguf")
    if not file.exists():
        parts = taken_apart(whole)
        file.write_bytes(put_together(untiered(parts, fates_for(parts), tilted=tilted)))
    return file


def error(found: Tensor | np.ndarray, wanted: Tensor | np.ndarray) -> float:
    found, wanted = torch.as_tensor(found), torch.as_tensor(wanted)
    return float((found - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_a_layer_is_what_llama_cpp_computes(name: str, layer: int, folder: Path) -> None:
    file = with_tiers(name, folder)
    names = f"ffn_moe_logits-{layer}", f"ffn_moe_out-{layer}"
    found = inside(file, TOKENS, names)
    x, out = torch.from_numpy(found[f"{names[0]}.input"]), torch.from_numpy(found[names[1]])
    assert error(MoeLayer.of(file, layer).forward(x, torch.tensor(TOKENS)), out) < 1e-11
    whole = MoeLayer.of(tiny_gguf(name, folder), layer)
    assert error(whole.forward(x, torch.tensor(TOKENS)), out) > 1e-3, "a whole layer must not pass"


@pytest.mark.parametrize("name", [*(name for name in (*ARCHS, *VARIANTS) if name != "refact"), "gemma4"])
@pytest.mark.by_day(16)
def test_logits_are_those_of_version_1(name: str, folder: Path) -> None:
    files = with_tiers(name, folder, tilted=False), in_version_1(name, folder), ordinary(name, folder)
    found, wanted, whole = (inside(file, TOKENS, ["result_output"])["result_output"] for file in files)
    print(f"{name}: NMSE {error(found, wanted):.1e}, of the whole file {error(whole, wanted):.1e}")
    # GELU comes from a table of 16-bit numbers
    assert error(found, wanted) < (1e-6 if name == "gemma4" else 1e-9)
    assert error(whole, wanted) > 1e-5, "a whole file must not pass"


@pytest.mark.parametrize("name", FAMILIES)
def test_token_by_token_is_as_in_a_batch(name: str, folder: Path) -> None:
    file = with_tiers(name, folder)
    one, all_ = (logits(file, TOKENS, n_batch=n_batch) for n_batch in (1, len(TOKENS)))
    assert error(one, all_) < 1e-6
    if name == "gpt-oss":  # whose experts can be linear
        wanted = logits(in_version_1(name, folder, tilted=True), TOKENS, n_batch=1)
        assert error(one, wanted) < 1e-6


def test_quantised_files(folder: Path, tmp_path: Path) -> None:
    """Tilts keep their type, thin experts get one that fits their width; the imatrix has both."""
    file = with_tiers("olmoe", folder)
    wanted = inside(file, TOKENS, ["result_output"])["result_output"]
    text, imatrix = tmp_path / "text.txt", tmp_path / "imatrix.gguf"
    text.write_text(" ".join(map(str, range(4000))))
    run(bin_folder() / "llama-imatrix", "-m", file, "-f", text, "-o", imatrix, "-c", 128, "--chunks", 8)
    measured = {tensor.name for tensor in GGUFReader(imatrix).tensors}
    for name in ("ffn_up_exps.t1", "ffn_down_exps.t3", "ffn_tilt_in_exps.t2", "ffn_tilt_out_exps.t4"):
        assert f"blk.0.{name}.weight.in_sum2" in measured
    for outtype, thin, bound in (("Q8_0", "Q8_0", 1e-3), ("F16", "F16", 1e-6), ("Q4_K_M", "Q5_0", 3e-2)):
        options = ("--imatrix", imatrix) if outtype == "Q4_K_M" else ()
        small = tmp_path / f"{outtype}.gguf"
        run(bin_folder() / "llama-quantize", *options, file, small, outtype, 1)
        parts, before = taken_apart(small), taken_apart(file)
        for name, tensor in before.tensors.items():
            if "ffn_tilt_" in name or name.endswith("exps.bias"):
                assert (parts.tensors[name].kind, parts.tensors[name].data) == (tensor.kind, tensor.data), (
                    name
                )
        assert parts.tensors["blk.0.ffn_up_exps.t1.weight"].kind.name == outtype.replace("_M", "")
        assert parts.tensors["blk.0.ffn_down_exps.t1.weight"].kind.name in (thin, "Q8_0")
        found = inside(small, TOKENS, ["result_output"])["result_output"]
        exact = inside(dequantised(small, tmp_path / "exact.gguf"), TOKENS, ["result_output"])
        print(f"{outtype}: {error(found, exact['result_output']):.1e}, of F32 {error(found, wanted):.1e}")
        assert error(found, exact["result_output"]) < bound


def test_layers_can_be_dropped(folder: Path, tmp_path: Path) -> None:
    """What says how many experts a layer has goes with the layer."""
    file, small = with_tiers("olmoe", folder), tmp_path / "small.gguf"
    arch, parts = "olmoe", taken_apart(file)
    counts, sizes = (
        GGUFReader(file).fields[f"{arch}.expert_{name}"] for name in ("kept_count", "tier_sizes")
    )
    kept, tiers = counts.contents(), sizes.contents()
    assert len(kept) == 2 and tiers[:N_TIER] != tiers[N_TIER:], "two layers with other tiers"
    for dropped in (0, 1):
        run(bin_folder() / "llama-quantize", "--prune-layers", dropped, file, small, "copy")
        stay = 1 - dropped
        wanted = parts.having(block_count=1)
        keys = wanted.keys | {
            f"{arch}.expert_kept_count": key(f"{arch}.expert_kept_count", kept[stay : stay + 1]),
            f"{arch}.expert_tier_sizes": key(
                f"{arch}.expert_tier_sizes", tiers[stay * N_TIER : (stay + 1) * N_TIER]
            ),
        }
        tensors = {
            name.replace(f"blk.{stay}.", "blk.0."): each
            for name, each in parts.tensors.items()
            if not name.startswith(f"blk.{dropped}.")
        }
        by_hand = tmp_path / "by_hand.gguf"
        by_hand.write_bytes(put_together(Parts(keys, tensors)))
        one, other = (inside(each, TOKENS, ["result_output"])["result_output"] for each in (small, by_hand))
        assert np.array_equal(one, other)


def test_split_file_loads_and_merges(folder: Path, tmp_path: Path) -> None:
    """A file in parts loads, and merged it is the same."""
    file = with_tiers("gpt-oss", folder)
    run(bin_folder() / "llama-gguf-split", "--split-max-tensors", 10, file, tmp_path / "part")
    first = min(tmp_path.glob("part-*.gguf"))
    one, other = (inside(each, TOKENS, ["result_output"])["result_output"] for each in (file, first))
    assert np.array_equal(one, other)
    run(bin_folder() / "llama-gguf-split", "--merge", first, tmp_path / "merged.gguf")
    before, after = (taken_apart(each).tensors for each in (file, tmp_path / "merged.gguf"))
    assert {name: each.data for name, each in after.items()} == {
        name: each.data for name, each in before.items()
    }


@pytest.mark.parametrize(
    ("options", "experts_on"),
    [((), {"RPC0"}), (("--cpu-moe",), {"CPU"}), (("--n-cpu-moe", 1), {"RPC0", "CPU"})],
)
def test_tiers_on_two_devices(options: tuple[object, ...], experts_on: set[str], folder: Path) -> None:
    """Tilts and thin experts are where the options have the experts, and no word changes."""
    file = with_tiers("gpt-oss", folder)
    with running_rpc_server(bin_folder()) as server:
        found = complete(bin_folder(), file, "--rpc", server, "-ngl", 99, "-fit", "off", *options)
    assert found.experts_on == experts_on
    assert found.text == complete(bin_folder(), file).text


Spoil = Callable[[Parts], Parts]
ARCH = "qwen3moe"


def keyed(name: str, value: int | float | str | list[int], **options: int) -> Spoil:
    return lambda parts: replace(parts, keys=parts.keys | {name: key(name, value, **options)})


def without_key(name: str) -> Spoil:
    return lambda parts: replace(parts, keys={each: parts.keys[each] for each in parts.keys if each != name})


def sizes(*values: int) -> Spoil:
    return keyed(f"{ARCH}.expert_tier_sizes", [*values])


def without(*names: str) -> Spoil:
    return lambda parts: replace(
        parts, tensors={name: each for name, each in parts.tensors.items() if name not in names}
    )


def shaped(name: str, *shape: int) -> Spoil:
    tensor = Stored(GGMLQuantizationType.F32, shape, bytes(4 * int(np.prod(shape))))
    return lambda parts: replace(parts, tensors=parts.tensors | {name: tensor})


def renamed(old: str, new: str) -> Spoil:
    return lambda parts: replace(
        parts, tensors={name.replace(old, new): each for name, each in parts.tensors.items()}
    )


THIN, TILT = "blk.0.ffn_{}_exps.t1.weight", "blk.0.ffn_tilt_{}_exps.t2.weight"
# of two layers with four tiers each; what the one line must say
HOSTILE: dict[str, tuple[Spoil, str]] = {
    "tiers in version 1": (keyed("mone.format_version", 1), "need mone.format_version 2, the file has 1"),
    "no version": (without_key("mone.format_version"), "need mone.format_version 2, the file has 1"),
    "an unknown version": (keyed("mone.format_version", 3), "unknown mone.format_version 3"),
    "eight tiers": (keyed(f"{ARCH}.expert_tier_count", 8), "8 tiers of experts, expected 1 to 7"),
    "no tier": (keyed(f"{ARCH}.expert_tier_count", 0), "0 tiers of experts, expected 1 to 7"),
    "sizes without a count": (without_key(f"{ARCH}.expert_tier_count"), "0 tiers of experts"),
    "a count without sizes": (without_key(f"{ARCH}.expert_tier_sizes"), "key not found.*expert_tier_sizes"),
    "a count that is a text": (keyed(f"{ARCH}.expert_tier_count", "4"), "expert_tier_count.*wrong type str"),
    "too few sizes": (sizes(2, 1, 1, 1), "4 sizes of 4 tiers of experts in 2 layers"),
    "one size for all": (keyed(f"{ARCH}.expert_tier_sizes", 1), "key not found.*expert_tier_sizes"),
    "sizes of another type": (
        keyed(f"{ARCH}.expert_tier_sizes", [*range(8)], integer=6),
        "expert_tier_sizes has wrong array element type f32",
    ),
    "more experts than there are": (sizes(2, 1, 1, 3, 2, 0, 1, 1), "layer 0 keeps 2 of 8 .* 7 more in tiers"),
    "sizes whose sum overflows": (
        sizes(2**32 - 1, 1, 1, 1, 2, 0, 1, 1),
        "layer 0 keeps 2 of 8 experts and has 4294967298 more in tiers",
    ),
    "tiers beside all experts": (
        keyed(f"{ARCH}.expert_kept_count", [0, 2]),
        "layer 0 keeps 8 of 8 experts and has 5 more in tiers",
    ),
    "a tier of unknown kind": (renamed("exps.t1.", "exps.t5."), "tier 1 must have either"),
    "a tier of two kinds": (
        renamed("blk.0.ffn_down_exps.t3.", "blk.0.ffn_down_exps.t2."),
        "tier 2 must have either",
    ),
    "no up projection": (without(THIN.format("up")), "ffn_up_exps.t1.weight' not found"),
    "no gate": (without(THIN.format("gate")), "ffn_gate_exps.t1.weight' not found"),
    "no second half of the tilts": (without(TILT.format("out")), "ffn_tilt_out_exps.t2.weight' not found"),
    "no bias": (without("blk.0.ffn_down_exps.bias"), "ffn_down_exps.bias' not found"),
    "other numbers of experts": (
        sizes(1, 1, 1, 1, 2, 0, 1, 1),
        r"ffn_down_exps.t1.weight' has wrong shape; expected +96, +256, +1, got",
    ),
    "an input of another width": (
        shaped(THIN.format("up"), 128, 96, 2),
        "ffn_up_exps.t1.weight' has wrong shape",
    ),
    "an output of another width": (
        shaped(THIN.format("down"), 96, 128, 2),
        "ffn_down_exps.t1.weight' has wrong shape",
    ),
    "gate and up of two widths": (
        shaped(THIN.format("gate"), 256, 64, 2),
        "ffn_gate_exps.t1.weight' has wrong shape",
    ),
    "a down projection of another width": (
        shaped(THIN.format("down"), 64, 256, 2),
        "(ffn_up|ffn_gate)_exps.t1.weight' has wrong shape",
    ),
    "thin experts that are wider": (shaped(THIN.format("down"), 512, 256, 2), "width 512, expected 1 to 256"),
    "experts of no width": (shaped(THIN.format("down"), 0, 256, 2), "width 0, expected 1 to 256|has wrong"),
    "tilts of two ranks": (
        shaped(TILT.format("out"), 64, 256, 1),
        "ffn_tilt_out_exps.t2.weight' has wrong shape",
    ),
    "tilts of rank 0": (shaped(TILT.format("in"), 256, 0, 1), "tilts of rank 0"),
    "a tensor too many": (shaped("blk.0.ffn_gate_exps.t2.weight", 256, 96, 1), "wrong number of tensors"),
}


@pytest.fixture(scope="module")
def sound(folder: Path) -> Iterator[Parts]:
    """A file of two layers and separate matrices that loads."""
    parts = taken_apart(with_tiers(ARCH, folder))
    assert len(parts.keys[f"{ARCH}.expert_tier_sizes"]) > 4 * 2 * N_TIER
    yield parts


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused(case: str, sound: Parts, tmp_path: Path) -> None:
    spoil, message = HOSTILE[case]
    file = tmp_path / "model.gguf"
    file.write_bytes(put_together(spoil(sound)))
    with pytest.raises(MoneError, match=message) as refused:
        LlamaModel(file, LlamaOptions(n_threads=1))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("make", [in_version_1, with_tiers])
def test_experts_without_an_up_projection_are_refused(
    make: Callable[[str, Path], Path], folder: Path, tmp_path: Path
) -> None:
    """The loader of this architecture does not ask for it."""
    file = tmp_path / "model.gguf"
    parts = taken_apart(make("mimo2", folder))
    gone = [name for name in parts.tensors if "ffn_up_exps.weight" in name]
    assert gone
    file.write_bytes(put_together(without(*gone)(parts)))
    with pytest.raises(MoneError, match=r"layer \d has experts without an up projection"):
        LlamaModel(file, LlamaOptions(n_threads=1))
