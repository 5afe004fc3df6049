"""Systems that prune something else than experts, in PyTorch, to compare the exporter's ways with them.

`without_layers` takes whole layers out (arXiv 2403.17887), `flap` the channels whose activations fluctuate
least (arXiv 2312.11983). Neither is in the exporter.
"""

import copy
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from measuring import with_constants


def without_layers(module: Any, corpus: Any, ratio: float) -> Any:
    """Return the model without the consecutive layers that turn the hidden states least.

    As many as are nearest to a share of `ratio`: attention goes with them, so that the file is smaller than
    where experts go alone, or larger where the layers are few. The angle is the mean over all tokens.
    """
    import torch

    n_layer = len(module.model.layers)
    n_gone = round(ratio * n_layer)
    angles = torch.zeros(n_layer - n_gone + 1, dtype=torch.float64)
    with torch.inference_mode():
        for rows in corpus.tokens.split(8):
            states = module(rows, output_hidden_states=True).hidden_states[:n_layer]
            states = (*states, _last_layers_output(module, rows))
            for first in range(len(angles)):
                alike = torch.cosine_similarity(states[first], states[first + n_gone], dim=-1)
                angles[first] += alike.clamp(-1, 1).acos().double().sum() / math.pi
    first = int(angles.argmin())
    smaller = copy.deepcopy(module)
    del smaller.model.layers[first : first + n_gone]
    smaller.config.num_hidden_layers = len(smaller.model.layers)
    smaller.config.use_cache = False  # the layers that stay have their old numbers in it
    return smaller


def _last_layers_output(module: Any, rows: Any) -> Any:
    """Return what the last layer gives: transformers' last hidden states are normed."""
    found: list[Any] = []

    def keep(_layer: Any, _args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    hook = module.model.layers[-1].register_forward_hook(keep)
    module(rows)
    hook.remove()
    return found[0]


@contextmanager
def flap(model: Any, corpus: Any, ratio: float) -> Iterator[Any]:
    """Yield the model without a share of its experts' channels, the mean of what they gave in their place.

    A channel's score is the variance of its activations times the squared norm of its column in the down
    projection, standardised over a layer and compared over all layers. Attention stays: the bytes are those
    of experts. The mean belongs to an expert, so that no ordinary file could hold it.
    """
    import torch

    from mone_export.artifacts import ChannelStats
    from mone_export.calibration.channels import measure_channels
    from mone_export.calibration.masking import standing_in
    from mone_export.source.shape import expert_modules

    modules, scores, means = dict(expert_modules(model.module)), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        measure_channels(model, corpus, Path(folder))
        for layer, module in modules.items():
            stats = ChannelStats.load(Path(folder), layer)
            weight = stats.weight.clamp(min=1e-12)[:, None]
            means[layer] = stats.first / weight
            variance = stats.second.diagonal(dim1=1, dim2=2).double() / weight - means[layer].square()
            found = variance.clamp(min=0) * module.down_proj.detach().double().square().sum(1)
            scores[layer] = (found - found.mean()) / found.std()
    gone = torch.cat([score.flatten() for score in scores.values()])
    limit = gone.sort().values[round(ratio * len(gone)) - 1]
    before = {layer: module.down_proj.data.clone() for layer, module in modules.items()}
    forwards = {}
    for layer, module in modules.items():
        pruned = (scores[layer] <= limit)[:, None]
        constants = (before[layer].double() * pruned * means[layer][:, None]).sum(2).float()
        module.down_proj.data = before[layer].masked_fill(pruned, 0)
        forwards[module] = partial(with_constants, module, constants)
    try:
        with standing_in(forwards):
            yield model.module
    finally:
        for layer, weights in before.items():
            modules[layer].down_proj.data = weights
