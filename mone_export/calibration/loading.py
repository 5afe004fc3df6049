"""load(): a model's weights for calibration, all of them or, where they do not fit, a layer at a time."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from mone_export.artifacts import MoeSpec
from mone_export.calibration import ranks
from mone_export.calibration.streaming import LayerFiles
from mone_export.errors import MoneError, first_line
from mone_export.memory import free_memory, give_back
from mone_export.source import Checkpoint, Source, open_source
from mone_export.source.expected import Difference, check_tensors, refuse, unpacking, without_weights
from mone_export.source.shape import (
    Dtype,
    Stream,
    auto_class,
    expert_modules,
    read_config,
    resolve_device,
    skeleton,
)
from mone_export.transformers_internals import weights_are_read

log = logging.getLogger(__name__)

_WITH_WORK = 1.3  # times its weights: what a model in memory takes with statistics and a batch
_LAYERS = 5  # a streamed one: a layer, the next one, copies while experts are stacked, statistics


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A model to calibrate: the one value between stages that is never saved.

    `files` is None when all weights are in memory, else what brings each decoder layer in its turn.
    """

    source: Source
    module: PreTrainedModel
    files: LayerFiles | None = None

    @property
    def spec(self) -> MoeSpec:
        """The model's shape."""
        return self.source.spec


def load(
    model: str | Path | Source,
    *,
    device: str = "auto",
    dtype: Dtype = "auto",
    stream: Stream = "auto",
    memory: int | None = None,
) -> Model:
    """Load weights for calibration.

    `device` auto means CUDA when there is one; `dtype` auto means the checkpoint's own, except on a CPU with
    room for float32, where float32 is both faster and more exact; `stream` auto brings the decoder layers one
    at a time when they do not fit together. `memory` is what may be used, in bytes (default: what is free).
    """
    give_back()  # what the stages before have used
    source = _checkpoint(open_source(model))
    source.fetch()
    path = source.view
    check_tensors(path, source.config)
    device = resolve_device(device)
    torch_dtype, streamed = choose(source, device=device, dtype=dtype, stream=stream, memory=memory)
    options: dict[str, Any] = {"device": device, "dtype": torch_dtype}
    module, files = open_streamed(path, **options) if streamed else (load_module(path, **options), None)
    log.info(
        "loaded %s as %s on %s%s", source.name, torch_dtype, device, ", layer by layer" if streamed else ""
    )
    return Model(source=source, module=module, files=files)


def loaded_experts(model: Model) -> Iterator[tuple[int, Any]]:
    """Yield (layer number, experts module) in ascending order, each with its weights in memory."""
    experts = dict(expert_modules(model.module))
    for layer in model.files.each() if model.files else sorted(experts):
        if layer in experts:
            yield layer, experts[layer]


def choose(
    source: Source, *, device: str, dtype: Dtype, stream: Stream, memory: int | None = None
) -> tuple[torch.dtype, bool]:
    """Return (precision, whether the layers are streamed) as `load` would use them.

    Of several processes the first decides for all: sums of different precisions do not belong together.
    """
    source = _checkpoint(source)
    room = free_memory(device) if memory is None or device != "cpu" else memory
    model = skeleton(source.config)
    own, size = model.dtype, sum(parameter.numel() for parameter in model.parameters())
    wanted = [own] if dtype == "auto" else [getattr(torch, dtype)]
    if dtype == "auto" and device == "cpu":
        wanted = [torch.float32, own]
    chosen = None
    for each in wanted if stream != "on" else ():
        if chosen is None and size * each.itemsize * _WITH_WORK < room * (0.6 if each != wanted[-1] else 1):
            chosen = each, False
    if chosen is None and stream == "off":
        chosen = wanted[-1], False
    layer = size / source.spec.n_layer
    fits = (each for each in wanted if layer * each.itemsize * _LAYERS < room / 2)
    return ranks.from_first(chosen or (next(fits, wanted[-1]), True))


def _checkpoint(source: Source) -> Checkpoint:
    if isinstance(source, Checkpoint) and source.substituted:
        raise MoneError(f"{source.name} has novices already: mone_export.load_pruned loads it")
    if isinstance(source, Checkpoint):
        return source
    raise MoneError(f"{source.name} is no checkpoint, which is what transformers loads: pass its folder")


def load_module(path: Path, *, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load all weights, unpacked where the checkpoint is quantised."""
    config = unpacking(read_config(path))
    try:
        with weights_are_read():
            loaded: Any = auto_class(config).from_pretrained(
                path,
                config=config,
                dtype=dtype,
                # to a GPU at once: the whole model need not fit into the machine's memory besides
                device_map={"": device} if device.startswith("cuda") else None,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
    except torch.OutOfMemoryError:
        raise MoneError(f"{path} does not fit the memory of {device}: pass --stream on") from None
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise MoneError(
            f"cannot load the weights in {path}: {first_line(error)}; is the folder complete?"
        ) from None
    module, found = loaded
    refuse(
        path,
        module,
        Difference(
            missing=frozenset(found["missing_keys"]),
            unread=frozenset(found["unexpected_keys"]),
            shapes=frozenset(found["mismatched_keys"]),
        ),
    )
    try:
        moved: PreTrainedModel = module.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise MoneError(
            f"cannot move the model to --device {device}: {first_line(error)}; "
            "try --stream on or --device cpu"
        ) from None
    return moved


def open_streamed(path: Path, *, device: str, dtype: torch.dtype) -> tuple[PreTrainedModel, LayerFiles]:
    """Return a model without its decoder layers' weights, and what brings them in their turn."""
    # oneDNN, and PyTorch above it, keep code for every number of rows an expert has seen: 0.5 GB of it; too
    # late where either has run before
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, "16")
    # one thread reads already: transformers' own four would take turns with it, and each keep memory
    os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
    module, quantizer = without_weights(read_config(path), dtype)
    return module, LayerFiles(path, module, device=device, dtype=dtype, quantizer=quantizer)
