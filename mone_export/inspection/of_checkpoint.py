"""The anatomy of a checkpoint in Hugging Face's form, from its config and the heads of its weight files.

What is an expert is told by the names: `...layers.N....experts.E.<matrix>`, or one stack of all of a layer's
experts, `...experts.down_proj`. An expert that has an `approx_value` and no matrix is a novice. Those of
blocks that predict further tokens are none of the layers', and stay as they are.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mone_export.errors import MoneError, first_line
from mone_export.inspection.anatomy import Anatomy, LayerAnatomy
from mone_export.inspection.savings import Matrix, savings
from mone_export.source.hub import Snapshot, headers, weight_files
from mone_export.source.shape import TOP_K_KEYS
from mone_export.source.substituted import EXPERT_OR_STACK
from mone_export.source.weights import NOVICE

_DOWN = ("down_proj", "w2", "output_linear", "linear_2")
_WIDTHS = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
_PLAIN = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_GROUPS = (
    ("shared experts", r"shared_expert"),
    ("router", r"\.(gate|router)\."),
    ("attention", r"attn|attention|mixer|conv"),
    ("embeddings", r"embed|lm_head"),
)


def of_checkpoint(snapshot: Snapshot) -> Anatomy:
    """Return the anatomy of a model folder, or of a model on the Hub of which only heads are read.

    Raises `MoneError` where config or weights are missing, or cannot be read.
    """
    config = _config(snapshot.folder)
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert text is not None
    found = headers(snapshot, weight_files(snapshot.folder))
    tensors = {name: item for head in found.values() for name, item in head.items() if name != "__metadata__"}
    sizes = {name: item["data_offsets"][1] - item["data_offsets"][0] for name, item in tensors.items()}
    n_layer = _whole(text.get("num_hidden_layers"))
    experts = {
        name: match
        for name in tensors
        if (match := EXPERT_OR_STACK.fullmatch(name)) and (not n_layer or int(match[2]) < n_layer)
    }
    layers = tuple(_layers(tensors, experts))
    n_expert = max((sum(layer.fates.values()) for layer in layers), default=0)
    hidden = _whole(text.get("hidden_size"))
    pruned = any("constant" in layer.fates for layer in layers)
    return Anatomy(
        kind="checkpoint",
        name=snapshot.id or snapshot.folder.resolve().name,
        arch=str((config.get("architectures") or [config.get("model_type", "")])[0]),
        size=sum(sizes.values()),
        n_layer=n_layer,
        n_expert=n_expert,
        top_k=next((_whole(text[key]) for key in TOP_K_KEYS if key in text), 0),
        hidden_size=hidden,
        expert_size=next((_whole(text[key]) for key in _WIDTHS if text.get(key)), 0),
        layers=layers,
        n_ctx_train=_whole(text.get("max_position_embeddings")) or None,
        file_type=str(config.get("dtype") or config.get("torch_dtype") or ""),
        n_byte=_by_use(sizes, experts),
        types=_by_type(tensors, sizes),
        made={"revision": snapshot.revision} if snapshot.revision else {},
        savings=tuple(
            savings(list(_matrices(tensors, sizes, experts)), n_expert * len(layers), hidden, pruned=pruned)
        ),
    )


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError, RecursionError) as error:
        raise MoneError(f"cannot read {folder / 'config.json'}: {first_line(error)}; get it again") from None
    return found


def _layers(tensors: Mapping[str, Any], experts: Mapping[str, re.Match[str]]) -> Iterator[LayerAnatomy]:
    """Yield each layer with how many experts have matrices, and how many a constant in place of them."""
    whole: dict[int, set[int]] = defaultdict(set)
    novices: dict[int, set[int]] = defaultdict(set)
    for name, match in experts.items():
        item, layer, expert, rest = tensors[name], int(match[2]), match[3], match[4]
        if expert is not None and rest == NOVICE[1:]:
            novices[layer].add(int(expert))
        elif expert is not None:
            whole[layer].add(int(expert))
        elif rest.removesuffix(".weight").removesuffix("_blocks") in _DOWN and item["shape"]:
            whole[layer] |= set(range(item["shape"][0]))
    for layer in sorted(whole.keys() | novices.keys()):
        n_constant = len(novices[layer] - whole[layer])
        fates = {"whole": len(whole[layer])} | ({"constant": n_constant} if n_constant else {})
        yield LayerAnatomy(layer, fates)


def _by_use(sizes: Mapping[str, int], experts: Mapping[str, re.Match[str]]) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for name, size in sizes.items():
        if name in experts:
            found["novices" if name.endswith(NOVICE) else "experts"] += size
        else:
            found[next((use for use, like in _GROUPS if re.search(like, name)), "other")] += size
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _by_type(tensors: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for name, item in tensors.items():
        found[str(item["dtype"]).lower()] += sizes[name]
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _matrices(
    tensors: Mapping[str, Any], sizes: Mapping[str, int], experts: Mapping[str, re.Match[str]]
) -> Iterator[Matrix]:
    for name, item in tensors.items():
        shape = item["shape"]
        flat = sum(size > 1 for size in shape) < 2 or re.search(_GROUPS[1][1], name) is not None
        yield Matrix(
            math.prod(shape),
            shape[-1] if shape else 1,
            sizes[name],
            is_expert=name in experts,
            stays=flat,
            is_packed=not flat and item["dtype"] not in _PLAIN,
        )


def _whole(value: Any) -> int:
    """Return a whole number of a config; 0 for what is none."""
    if isinstance(value, list):
        value = next((n for n in value if n), 0)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
