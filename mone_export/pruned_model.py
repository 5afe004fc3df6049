"""load_pruned(): a checkpoint with constants in the place of experts, as a model of transformers.

transformers builds and loads the model; between the two its experts modules are made as short as the
checkpoint's, and afterwards each gets a forward that numbers the kept experts as they lie in memory and adds
the constants. No family has code of its own here, and none that comes with a checkpoint runs.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mone_export.architectures import weights_inputs
from mone_export.artifacts import LayerPlan
from mone_export.calibration.observer import run_experts
from mone_export.errors import MoneError, first_line
from mone_export.source import Checkpoint, open_source
from mone_export.source.shape import expert_modules, skeleton
from mone_export.source.weights import NOVICE
from mone_export.transformers_internals import check_version, weights_are_read


def load_pruned(model: str | Path, **options: Any) -> PreTrainedModel:
    """Load a checkpoint with novices, a folder or a Hugging Face id, for use with transformers.

    Kept experts alone take memory. `options` are those of transformers' `from_pretrained`, such as `dtype`
    and `device_map`; the type is the checkpoint's own by default. Raises `MoneError` for a checkpoint without
    novices, which `from_pretrained` loads, and one that is not complete.
    """
    check_version()
    source = open_source(model)
    if not isinstance(source, Checkpoint):
        raise MoneError(f"{model} is a GGUF: llama_cpp loads it; this loads folders that --hf-out wrote")
    if not (source.folder / "config.json").is_file():
        raise MoneError(f"{model} has no config.json: it is no checkpoint's folder")
    if source.substituted is None:
        raise MoneError(f"{model} has no novices: load it with transformers' from_pretrained")
    if weights_inputs(source.spec.arch):
        raise MoneError(
            f"{source.spec.arch} weights what goes into its experts: novices cannot stand in for them"
        )
    source.fetch()
    plan = {layer.layer: layer for layer in source.substituted.plan(source.spec).layers if layer.pruned}
    blank = skeleton(source.config)  # of a model that sees, too, transformers may load the text part alone
    own = type(blank)
    short = _shortened(own, plan)
    try:
        with weights_are_read():
            module: PreTrainedModel = short.from_pretrained(
                source.folder, config=blank.config, **{"dtype": "auto", **options}
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise MoneError(f"cannot load {model}: {first_line(error)}; is it complete?") from None
    module.__class__ = own
    novices = source.substituted.novices(source.spec)
    for layer, experts in expert_modules(module):
        if layer in plan:
            _put_in(experts, plan[layer], torch.from_numpy(novices[layer]))
    module.eval()
    vars(module)["save_pretrained"] = MethodType(refuse_to_save, module)
    return module


def refuse_to_save(module: Any, *_: Any, **__: Any) -> None:
    """Stand in for `save_pretrained`, which would leave the constants out; raises `MoneError`."""
    raise MoneError(
        f"save_pretrained would lose the novices: copy {module.name_or_path}, the folder it was loaded from"
    )


def substituted_forward(module: Any, hidden: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
    """Run an experts module that has the kept experts: hidden [n_token, d], ids and weights [n_token, top_k].

    An id beyond them selects nothing, as where experts lie on several devices, and brings its constant. There
    is no new normalisation.
    """
    ids, weights = (*routing, *named.values())
    slots, n_kept = module.novice_slots[ids], len(module.down_proj)
    gone = slots >= n_kept
    nothing = n_kept if hasattr(module, "_is_expert_parallel") else 0
    kept: Tensor = run_experts(module, hidden, slots.masked_fill(gone, nothing), weights.masked_fill(gone, 0))
    spread = module.novices.new_zeros(len(ids), len(module.novices))
    spread.scatter_add_(1, (slots - n_kept).clamp(min=0), (weights * gone).to(spread.dtype))
    constants: Tensor = spread @ module.novices
    return kept + constants.to(kept.dtype)


def _shortened(own: type[PreTrainedModel], plan: Mapping[int, LayerPlan]) -> Any:
    """Return a model's class whose experts modules are made for the kept experts only."""

    def init(self: Any, *args: Any, **named: Any) -> None:
        own.__init__(self, *args, **named)
        for layer, experts in expert_modules(self):
            if layer in plan:
                _shorten(experts, len(plan[layer].kept))

    ignored = [*(own._keys_to_ignore_on_load_unexpected or ()), f"{re.escape(NOVICE)}$"]
    body = {"__init__": init, "__module__": own.__module__, "_keys_to_ignore_on_load_unexpected": ignored}
    return type(own.__name__, (own,), body)


def _shorten(experts: Any, n_kept: int) -> None:
    """Leave room for fewer experts in a module without weights."""
    n_expert = len(experts.down_proj)
    for name, parameter in list(experts.named_parameters(recurse=False)):
        if len(parameter) == n_expert:
            shape = (n_kept, *parameter.shape[1:])
            setattr(experts, name, nn.Parameter(parameter.new_empty(shape), requires_grad=False))
    experts.num_experts = n_kept
    if hasattr(experts, "_is_expert_parallel"):
        experts._is_expert_parallel = True  # ids beyond the last expert are allowed, and cost nothing


def _put_in(experts: Any, layer: LayerPlan, novices: Tensor) -> None:
    """Give an experts module the constants of its layer, [n_expert, d], and the forward that adds them."""
    slots = torch.tensor(layer.order).argsort()
    for name, values in (("novice_slots", slots), ("novices", novices[list(layer.pruned)])):
        experts.register_buffer(name, values.to(experts.down_proj.device), persistent=False)
    experts.forward = MethodType(substituted_forward, experts)
