"""The anatomy of a GGUF of any kind: ordinary, pruned, with tiers, split."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mone_export.errors import MoneError
from mone_export.inspection.anatomy import Anatomy, LayerAnatomy
from mone_export.inspection.cache_memory import memory
from mone_export.inspection.savings import Matrix, savings
from mone_export.output.redoing import redo_of
from mone_export.source.gguf_format import (
    INPUTS_KEY,
    METHOD_KEY,
    MOST_TIERS,
    OPTIONS_KEY,
    TIER_COUNT_KEY,
    TIER_SIZES_KEY,
    novice_tensor,
    part_of,
    tier_tensor,
)
from mone_export.source.gguf_header import Header, TensorInfo, read_model
from mone_export.source.gguf_types import gguf_constants
from mone_export.source.pruned_before import kept_counts

_DOWN = "blk.{}.ffn_down_exps.weight"
_MOST_LAYERS = 2**16
_TIER = re.compile(r"blk\.\d+\.ffn_\w+_exps\.t\d+\.weight")
# too long for anybody to read, and what `command` and `--from` say
_UNTOLD = ("mone.expert_order", OPTIONS_KEY, INPUTS_KEY)
_TOLD = ("general.license", "general.base_model.0.repo_url", "general.quantized_by", "quantize.imatrix.file")
_GROUPS = (
    ("shared experts", r"_shexp"),
    ("router", r"ffn_gate_inp|exp_probs_b|ffn_exps_slot"),
    ("attention", r"attn_|ssm_|shortconv|indexer"),
    ("embeddings", r"^(token_embd|output|per_layer_\w+)\.weight|^output\.bias"),
)


def of_gguf(path: Path, *, n_ctx: int | None = None) -> Anatomy:
    """Return a GGUF's anatomy, with the memory it takes at `n_ctx` tokens (what it was made for, if None).

    Raises `MoneError` for what is no GGUF of a language model, or broken.
    """
    header = read_model(path)
    arch = header.value("general.architecture")
    n_block = header.integer(f"{arch}.block_count")
    if not isinstance(arch, str) or not 0 < n_block <= _MOST_LAYERS:
        raise MoneError(f"{path} does not say its architecture and its layers: it is no language model")
    n_layer = n_block - header.integer(f"{arch}.nextn_predict_layers")
    n_expert = header.integer(f"{arch}.expert_count")
    layers = tuple(_layers(header, arch, n_block, n_expert)) if n_expert else ()
    window = header.integer(f"{arch}.context_length") or None
    down = next((header.tensors[_DOWN.format(at.layer)] for at in layers), None)
    replaced = {at.layer: n_expert - _whole(at) for at in layers}
    pruned = any(replaced.values())
    n_novice = sum(replaced.values()) if pruned else n_expert * len(layers)
    width = header.integer(f"{arch}.embedding_length") if down is None else down.shape[1]
    return Anatomy(
        kind="gguf",
        name=str(header.value("general.name", path.stem)),
        arch=arch,
        size=sum(file.stat().st_size for file in header.files),
        n_layer=n_layer,
        n_expert=n_expert,
        top_k=max(header.of_layer(f"{arch}.expert_used_count", layer) for layer in range(n_block)),
        hidden_size=width,
        expert_size=0 if down is None else down.shape[0],
        layers=layers,
        n_ctx_train=window,
        file_type=_file_type(header),
        needs="patched" if pruned else "any",
        n_byte=_by_use(header, replaced, width * 4),
        types=_by_type(header),
        made=_made(header),
        memory=memory(header, arch, n_layer, n_ctx or window or 2048),
        savings=tuple(savings(list(_matrices(header)), n_novice, width, pruned=pruned)),
        command=_command(header),
    )


def _layers(header: Header, arch: str, n_block: int, n_expert: int) -> Iterator[LayerAnatomy]:
    counts = kept_counts(header, n_block)
    n_tier = header.integer(TIER_COUNT_KEY.format(arch=arch))
    sizes = header.value(TIER_SIZES_KEY.format(arch=arch), [])
    if not isinstance(sizes, list) or not 0 <= n_tier <= MOST_TIERS or len(sizes) != n_tier * n_block:
        raise MoneError(
            f"{header.files[0]} is broken: its tiers are not {n_tier} for each of {n_block} layers"
        )
    for layer in range(n_block):
        down = header.tensors.get(name := _DOWN.format(layer))
        if down is None:
            continue
        n_kept = (counts[layer] if counts else 0) or n_expert
        narrow = header.value(METHOD_KEY) == "narrow"  # then none has all its channels
        fates = {f"{down.shape[0]} channels" if narrow else "whole": n_kept}
        tiers = list(enumerate(sizes[layer * n_tier : (layer + 1) * n_tier], start=1))
        thin = [(header.tensors.get(tier_tensor(name, tier)), n) for tier, n in tiers if n]
        if any(info is not None and info.shape[0] == down.shape[0] for info, _ in thin):
            fates = {f"whole {_kind(header, layer)}": n_kept}
        mixed = "whole" not in fates
        for (info, n), (tier, _) in zip(thin, (each for each in tiers if each[1]), strict=True):
            fate = "tilt" if info is None else _fate(info, down, _kind(header, layer, tier) if mixed else "")
            fates[fate] = fates.get(fate, 0) + n
        n_constant = n_expert - sum(fates.values())
        if n_constant < 0:
            raise MoneError(f"{header.files[0]} is broken: layer {layer} has more than {n_expert} experts")
        norms = None
        if n_constant:
            fates["constant"] = n_constant
            norms = _norms(header.tensors.get(novice_tensor(layer)), n_constant)
        yield LayerAnatomy(layer, fates, norms)


def _fate(info: TensorInfo, whole: TensorInfo, kind: str) -> str:
    name = "whole" if info.shape[0] == whole.shape[0] else f"{info.shape[0]} channels"
    return f"{name} {kind}".rstrip()


def _kind(header: Header, layer: int, tier: int = 0) -> str:
    """Return the type of what goes into experts: rows of their own width may be too short for it."""
    for matrix in ("up", "gate_up", "down"):
        name = f"blk.{layer}.ffn_{matrix}_exps.weight"
        if info := header.tensors.get(tier_tensor(name, tier) if tier else name):
            return info.kind
    return ""


def _whole(layer: LayerAnatomy) -> int:
    """Return how many experts of a layer are in its ordinary tensors."""
    return next(iter(layer.fates.values()))


def _norms(bias: TensorInfo | None, n_constant: int) -> tuple[float, float, float] | None:
    """Return the least, the median and the largest norm of the constants, the last rows of a layer's bias."""
    if bias is None or bias.kind != "f32" or len(bias.shape) != 2 or bias.shape[1] < n_constant:
        return None
    rows = bias.values(np.float32)[-n_constant:].astype(np.float64)
    found = sorted(float(norm) for norm in np.linalg.norm(rows, axis=1))
    return found[0], median(found), found[-1]


def _by_use(header: Header, replaced: Mapping[int, int], row: int) -> dict[str, int]:
    """Return how many bytes serve what: of a layer's down bias, the rows of experts that are replaced."""
    found: dict[str, int] = {}

    def add(use: str, size: int) -> None:
        if size:
            found[use] = found.get(use, 0) + size

    for info in header.tensors.values():
        part = part_of(info.name)
        if _TIER.fullmatch(info.name):
            add("experts in tiers", info.size)
        elif part and part[1] == "down bias":
            novices = min(replaced.get(part[0], 0) * row, info.size)
            add("novices", novices)
            add("experts", info.size - novices)
        elif part and part[1] != "router":
            add("experts", info.size)
        else:
            add(next((use for use, like in _GROUPS if re.search(like, info.name)), "other"), info.size)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _by_type(header: Header) -> dict[str, int]:
    found: dict[str, int] = {}
    for info in header.tensors.values():
        found[info.kind] = found.get(info.kind, 0) + info.size
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _matrices(header: Header) -> Iterator[Matrix]:
    for info in header.tensors.values():
        part = part_of(info.name)
        flat = sum(size > 1 for size in info.shape) < 2 or not info.name.endswith(".weight")
        experts = _TIER.fullmatch(info.name) or (part and part[1] == "experts")
        yield Matrix(
            math.prod(info.shape),
            info.shape[0],
            info.size,
            is_expert=bool(experts),
            stays=flat or bool(part and not experts),
        )


def _made(header: Header) -> dict[str, Any]:
    """Return what a file says about how it was made."""
    own = [name for name in header.keys if name.startswith("mone.") and name not in _UNTOLD]
    return {name: header.value(name) for name in (*own, *_TOLD) if name in header.keys}


def _command(header: Header) -> str:
    try:
        return redo_of(header).command
    except MoneError:
        return ""


def _file_type(header: Header) -> str:
    number = header.value("general.file_type")
    try:
        return str(gguf_constants().LlamaFileType(number).name).removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return ""
