"""What goes into the ordinary matrices of a model in PyTorch: those of its attention, of shared experts."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel

from mone_export.calibration.input_sums import sums_of_rows
from mone_export.calibration.rows import Layers, add_to
from mone_export.calibration.streaming import decoder_layers


@contextmanager
def linear_inputs(model: PreTrainedModel, found: Layers) -> Iterator[None]:
    """Add up, inside the block, what goes into every linear module of the decoder layers, in `found`.

    By the name of its weight, as the model's `state_dict` has it.
    """
    prefix, layers = decoder_layers(model)
    hooks = [
        module.register_forward_pre_hook(partial(_add, found, f"{prefix}.{name}.weight"))
        for name, module in layers.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add(found: Layers, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    rows = inputs[0]
    add_to(found, name, sums_of_rows(rows.reshape(1, -1, rows.shape[-1])))
