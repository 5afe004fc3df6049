"""check_tensors(): do the tensors of a checkpoint fit the model that its config describes?

The files' headers name every tensor and its shape, so this needs no weights: transformers' own loading runs
on tensors without contents, and what it misses, leaves unread or cannot put together is refused in one line,
before anything is read. Left unread, a scale of FP8 weights would silently change the model.

Decoder layers that are alike, in the files and in the model, are compared once.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mone_export.errors import MoneError
from mone_export.source.shape import auto_class, packing
from mone_export.source.weights import NOVICE, open_weights
from mone_export.transformers_internals import (
    AutoHfQuantizer,
    WeightConverter,
    WeightRenaming,
    compare,
    leaves_out,
    reading,
    rename_source_key,
)

_TYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
}  # a file's types: ours, where a conversion asks for them

_LAYER = re.compile(r"^(.*?)\blayers\.(\d+)\.(.*)$")
_SCALE = re.compile(r"(_scale|_scale_inv|_scales|\.scales?|_blocks|\.biases|_zeros|_packed|_scale_2)$")
# blocks that predict further tokens: never run here
_PREDICTS = re.compile(r"(^|\.)mtp(_\w+)?\.")
_JOINS = re.compile(r"\b(eh_proj|enorm|hnorm|shared_head)\b")
# what sees and hears: no loss where a class loads the text part alone
_SENSES = re.compile(
    r"(^|\.)(visual|vision\w*|audio\w*|image\w*|multi_modal_projector|mm_\w+|embed_(vision|audio))\."
)


@dataclass(frozen=True, slots=True)
class Difference:
    """What of a checkpoint and its model does not fit together, by the tensors' names.

    `missing`: the model has them, the files do not. `unread`: the reverse. `shapes`: name, the files' shape,
    the model's. `broken`: what cannot be put together, and why.
    """

    missing: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()
    shapes: frozenset[tuple[str, tuple[int, ...], tuple[int, ...]]] = frozenset()
    broken: Mapping[str, str] | None = None


def check_tensors(path: Path, config: Any) -> None:
    """Raise `MoneError`, naming all causes, unless a checkpoint's tensors fit its config; reads headers only.

    `config` is transformers' own, as `read_config` returns it.
    """
    weights = open_weights(path)
    if any("mlx" in (file.metadata() or {}).get("format", "") for file in set(weights.values())):
        raise MoneError(
            f"{path} was saved by MLX, which lays out experts otherwise and may add 1 to the weights of "
            "norms: pass the model's original checkpoint"
        )
    module, quantizer = without_weights(config)
    holders = (config, config.get_text_config())
    known = any(getattr(holder, "approximate_experts", None) for holder in holders)
    tensors = {
        name: _blank(file.get_slice(name))
        for name, file in weights.items()
        if not (known and name.endswith(NOVICE))
    }
    found = difference(module, tensors, quantizer)
    lost = _lost_scales(tensors) if quantizer else ()
    refuse(path, module, replace(found, missing=found.missing.union(lost)))


def expert_axes(config: Any, fewer: Any, names: Iterable[str]) -> dict[str, int]:
    """Return along which axis tensors of a checkpoint have an entry for each expert, by their names.

    `fewer` is the config of the same model with fewer experts: what has another shape then depends on them.
    Names of single experts' tensors are taken for their stack's.
    """
    module, shorter = without_weights(config)[0], without_weights(fewer)[0].state_dict()
    known = module.state_dict()
    axes = {
        name: axis
        for name, tensor in known.items()
        for axis, (size, less) in enumerate(zip(tensor.shape, shorter[name].shape, strict=True))
        if size != less
    }
    targets = model_names(module, names)
    return {name: axes[target] for name, target in targets.items() if target in axes}


def model_names(module: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Return what a model calls the tensors of a checkpoint, by their names there."""
    known = module.state_dict()
    mapping: Any = reading(module, dtype=module.dtype, device="meta").weight_mapping or ()
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = module.base_model_prefix
    return {name: rename_source_key(name, renamings, converters, prefix, known)[0] for name in names}


def unpacking(config: Any) -> Any:
    """Return a copy of a model's config by which quantised weights are unpacked when they are loaded."""
    config = copy.deepcopy(config)
    if found := packing(config):
        config.quantization_config = {**found, "dequantize": True}
    return config


def without_weights(config: Any, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, Any]:
    """Return a model on the meta device, and what unpacks its weights: None where they are not quantised."""
    quantizer: Any = None
    config = unpacking(config)
    if packing(config):
        quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
    with torch.device("meta"):
        module: PreTrainedModel = auto_class(config).from_config(config, dtype=dtype or config.dtype).eval()
    if quantizer:
        quantizer.preprocess_model(model=module, dtype=module.dtype, device_map=None)
    return module, quantizer


def difference(module: PreTrainedModel, tensors: Mapping[str, Tensor], quantizer: Any = None) -> Difference:
    """Compare a model without weights and the tensors of a checkpoint, without contents; changes `module`."""
    known = dict(module.state_dict())
    alike = _Alike(tensors, known)
    found = compare(module, {name: tensors[name] for name in tensors if alike.is_first(name)}, quantizer)
    allowed, ignored = leaves_out(module, found)
    missing = {name for name in found.missing_keys - allowed if alike.is_first(name)}
    # a class leaves out whole layers by number, whatever a model of its kind has there: no scale with them
    unread = {name for name in found.unexpected_keys | ignored if name not in ignored or _SCALE.search(name)}
    shapes = {(name, tuple(a), tuple(b)) for name, a, b in found.mismatched_keys}
    return Difference(
        missing=frozenset(each for name in missing for each in alike.all_like(name)),
        unread=frozenset(each for name in unread for each in alike.all_like(name)),
        shapes=frozenset((each, a, b) for name, a, b in shapes for each in alike.all_like(name)),
        broken={
            each: why
            for name, text in found.conversion_errors.items()
            for why in [(text.splitlines() or [""])[-2:][0]]
            for each in alike.all_like(name)
        },
    )


def refuse(path: Path, module: PreTrainedModel, found: Difference) -> None:
    """Raise `MoneError` with all causes in one line, unless what is found may be so."""
    text = module.config.get_text_config()
    causes = list(_Causes(module, int(text.num_hidden_layers), found).each())
    if causes:
        raise MoneError(f"{path} does not fit its config.json: {'; '.join(causes)}")


class _Alike:
    """Decoder layers whose tensors are alike in the files and in the model: the first stands for all."""

    def __init__(self, tensors: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> None:
        """Compare names, shapes and types."""
        parts: dict[int, list[Any]] = defaultdict(list)
        for side, entries in enumerate((tensors, known)):
            for name, tensor in entries.items():
                if match := _LAYER.match(name):
                    kind = (match[1], match[3], tensor.shape, tensor.dtype)
                    parts[int(match[2])].append((side, kind))
        groups: dict[frozenset[Any], list[int]] = defaultdict(list)
        for number in sorted(parts):
            groups[frozenset(parts[number])].append(number)
        self._groups = {group[0]: group for group in groups.values()}

    def is_first(self, name: str) -> bool:
        """Return whether a tensor is of no layer, or of one that is compared."""
        match = _LAYER.match(name)
        return match is None or int(match[2]) in self._groups

    def all_like(self, name: str) -> Iterator[str]:
        """Yield the names of a tensor in all layers that are like its own."""
        match = _LAYER.match(name)
        for number in self._groups.get(int(match[2]), [int(match[2])]) if match else ():
            assert match
            yield f"{match[1]}layers.{number}.{match[3]}"
        if match is None:
            yield name


class _Causes:
    """Why tensors do not fit, cause by cause: each takes the names that it explains."""

    def __init__(self, module: PreTrainedModel, n_layer: int, found: Difference) -> None:
        """Leave out what may stay unread: blocks that predict further tokens, eyes and ears."""
        self._n_layer = n_layer
        n_block = int(getattr(module.config.get_text_config(), "num_nextn_predict_layers", None) or 0)
        blocks = {_number(name) for name in found.unread if _JOINS.search(name)}
        blocks.update(range(n_layer, n_layer + n_block))
        self._known = list(module.state_dict())
        blind = not any(_SENSES.search(name) for name in self._known)
        self._unread = {
            name
            for name in found.unread
            if not _PREDICTS.search(name)
            and not (blind and _SENSES.search(name))
            and not (_number(name) >= n_layer and _number(name) in blocks)
        }
        self._broken = found.broken or {}
        self._missing = set(found.missing) - self._broken.keys()
        self._shapes = {name: (a, b) for name, a, b in found.shapes}

    def each(self) -> Iterator[str]:
        """Yield a clause for each cause, the most telling first."""
        if scales := self._taken(_SCALE.search):
            yield (
                f"nothing reads {_named(scales)}, and without its scale a weight is another one: "
                "pass the model's BF16 checkpoint"
            )
        if beyond := self._taken(lambda name: _number(name) >= self._n_layer):
            yield f"it has {1 + max(map(_number, beyond))} layers, config.json says {self._n_layer}"
        if absent := self._absent_layers():
            self._missing = {name for name in self._missing if _number(name) not in absent}
            yield f"it lacks {len(absent)} of {self._n_layer} layers, number {min(absent)} the first"
        if apart := self._taken(re.compile(r"\.experts\.\d+\.").search):
            self._missing = {name for name in self._missing if ".experts." not in name}
            yield (
                f"it holds experts apart, {_named(apart)}, where the model reads them stacked: "
                "pass the checkpoint as its makers published it"
            )
        yield from self._expert_counts()
        if self._shapes:
            name, (found, wanted) = min(self._shapes.items())
            yield f"{_named(self._shapes)}: {name} is {list(found)}, by config.json {list(wanted)}"
        if self._missing:
            yield f"it lacks {_named(self._missing)}: get all files again"
        if self._unread:
            yield f"nothing reads {_named(self._unread)}: pass a folder of one model and revision"
        if self._broken:
            why = min(self._broken.items())[1].rstrip(".")
            yield f"{_named(self._broken)}: {why}; pass the model's BF16 checkpoint"

    def _taken(self, is_cause: Callable[[str], object]) -> set[str]:
        taken = {name for name in self._unread if is_cause(name)}
        self._unread -= taken
        return taken

    def _absent_layers(self) -> set[int]:
        """Return the numbers of the layers of which the files hold nothing."""
        present = {_number(name) for name in self._known if name not in self._missing}
        return {number for name in self._missing if (number := _number(name)) not in present}

    def _expert_counts(self) -> Iterator[str]:
        """Explain stacks of too many or too few experts, and the routers that go with them."""
        counts = {
            (a[0], b[0]) for name, (a, b) in self._shapes.items() if ".experts." in name and a[1:] == b[1:]
        }
        for found, wanted in sorted(counts):
            names = {name for name, (a, b) in self._shapes.items() if (a[:1], b[:1]) == ((found,), (wanted,))}
            self._shapes = {name: both for name, both in self._shapes.items() if name not in names}
            yield f"config.json says {wanted} experts, {_named(names)} hold {found}"


def _lost_scales(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the scales that weights in FP8 lack: they would be taken as they are.

    Source: the names that transformers' `quantizer_finegrained_fp8.py` takes for scales.
    """
    for name, tensor in tensors.items():
        if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) and not _PREDICTS.search(name):
            start = name.removesuffix(".weight")
            if not tensors.keys() & {f"{name}_scale_inv", f"{start}.scale", f"{start}.qscale_weight"}:
                yield f"{name}_scale_inv"


def _number(name: str) -> int:
    """Return a tensor's layer; -1 for one of none."""
    match = _LAYER.match(name)
    return int(match[2]) if match else -1


def _named(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return f"{first} and {len(others)} more" if others else first


def _blank(part: Any) -> Tensor:
    """Return a tensor without contents, of the shape and type of a part of a file."""
    return torch.empty(part.get_shape(), dtype=_TYPES.get(part.get_dtype(), torch.uint8), device="meta")
