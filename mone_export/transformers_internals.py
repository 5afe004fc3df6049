"""The names of transformers that are no stable interface: all of them, in this one file.

They are right for the version that the package pins and tests, `TESTED`. Another version may have moved or
changed them, so `check_version` is called before they are relied on.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, modeling_utils
from transformers.utils import logging as transformers_logging

from mone_export.errors import MoneError

TESTED = "5.23.0"
"""The version of transformers that these names were read in; pyproject.toml pins the same."""


def _wrong_version() -> MoneError:
    return MoneError(
        f"transformers {transformers.__version__} is installed, and mone-export uses internals of version "
        f"{TESTED}: pip install transformers=={TESTED}"
    )


try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        Concatenate,
        ConversionOps,
        MergeModulelist,
        WeightConverter,
        WeightRenaming,
        convert_and_load_state_dict_in_model,
        rename_source_key,
    )
    from transformers.integrations.moe import ExpertsInterface
    from transformers.integrations.moe import _grouped_linear as grouped_linear
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.quantizers.auto import AutoHfQuantizer
except ImportError:
    raise _wrong_version() from None

__all__ = [
    "TESTED",
    "AutoHfQuantizer",
    "Concatenate",
    "ConversionOps",
    "ExpertsInterface",
    "LoadStateDictConfig",
    "MergeModulelist",
    "WeightConverter",
    "WeightRenaming",
    "check_version",
    "compare",
    "convert_and_load_state_dict_in_model",
    "grouped_linear",
    "leaves_out",
    "make_buffers",
    "reading",
    "rename_source_key",
    "weights_are_read",
    "with_experts_forward",
]


def check_version() -> None:
    """Raise `MoneError` unless transformers has the version whose internals are used here."""
    if transformers.__version__ != TESTED:
        raise _wrong_version()


def with_experts_forward(config: Any, name: str) -> Any:
    """Return a copy of a model's config by which its experts run under `name` in `ExpertsInterface`.

    A shallow copy: everything else in it is the model's own.
    """
    own = copy.copy(config)
    own._experts_implementation_internal = name
    return own


def reading(
    module: PreTrainedModel, *, dtype: torch.dtype, device: str, quantizer: Any = None
) -> LoadStateDictConfig:
    """Return how `module`'s weights are read: its conversions of names and shapes, types and place."""
    check_version()
    mapping: Any = get_model_conversion_mapping(module, None, quantizer)
    return LoadStateDictConfig(
        weight_mapping=mapping,
        dtype=dtype,
        dtype_plan=module._get_dtype_plan(dtype),
        device_map={"": device},
        hf_quantizer=quantizer,
    )


def make_buffers(module: PreTrainedModel, device: str) -> None:
    """Make the buffers that no file holds, as `from_pretrained` does; all weights stay as they are."""
    module._move_missing_keys_from_meta_to_device(set(), {"": device}, None, None)  # type: ignore[arg-type]
    module.initialize_weights()


def compare(module: PreTrainedModel, tensors: Mapping[str, torch.Tensor], quantizer: Any = None) -> Any:
    """Load tensors without contents into a model without weights; returns what `from_pretrained` finds then.

    That is a `LoadStateDictInfo`. Both are on the meta device, so all conversions cost next to nothing.
    """
    how = reading(module, dtype=module.dtype, device="meta", quantizer=quantizer)
    with _without_bars():
        found, _ = convert_and_load_state_dict_in_model(module, dict(tensors), how)
    module.tie_weights(missing_keys=found.missing_keys, recompute_mapping=False)
    return found


def leaves_out(module: PreTrainedModel, found: Any) -> tuple[set[str], set[str]]:
    """Return what a model's class does without, and what it leaves unread, of the tensors in `found`."""
    missing, unexpected = set(found.missing_keys), set(found.unexpected_keys)
    module._adjust_missing_and_unexpected_keys(found)
    return missing - found.missing_keys, unexpected - found.unexpected_keys


@contextmanager
def weights_are_read() -> Iterator[None]:
    """Let `from_pretrained` read files of weights for the length of the block, not map them.

    Whoever cuts a mapped file short ends a process that looks at it, by a signal. transformers itself reads
    on Windows.
    """
    check_version()
    names = vars(modeling_utils)
    mapped = names["safe_open"]
    names["safe_open"] = lambda *args, **named: mapped(*args, **named | {"backend": "pread"})
    try:
        yield
    finally:
        names["safe_open"] = mapped


@contextmanager
def _without_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
