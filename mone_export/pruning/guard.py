"""Super experts: the few whose outputs reach extreme magnitudes, and without which a model falls apart.

They make the massive activations that attention sinks rest on; three of the 6144 experts of Qwen3-30B-A3B
removed, and it repeats itself (arXiv 2507.23279). Scores that average over tokens can rank them low, since
they are extreme for few tokens. The paper takes an expert whose largest |output| is above the model's 99.5th
percentile and above a tenth of its maximum; in a model without any such expert that names a few all the same.
Here the largest |output| must be `FACTOR` times the median of the expert's layer and of the whole model: the
ordinary ones stay within a few times their median, the extreme ones are beyond it by orders of magnitude.
"""

from dataclasses import replace

from mone_export.artifacts import Calibration, Scores
from mone_export.lazily import torch

FACTOR = 10.0


def super_experts(calibration: Calibration) -> dict[int, tuple[int, ...]]:
    """Return the super experts of every layer that has some, by original id."""
    seen = {layer: stats.max_abs[stats.count > 0] for layer, stats in calibration.layers.items()}
    everywhere = torch.cat(list(seen.values()))
    found = {}
    for layer, stats in calibration.layers.items():
        if len(seen[layer]):
            usual = torch.maximum(seen[layer].median(), everywhere.median())
            if ids := torch.nonzero(stats.max_abs > FACTOR * usual)[:, 0].tolist():
                found[layer] = tuple(ids)
    return found


def guard(scores: Scores, calibration: Calibration) -> Scores:
    """Return the scores with super experts above all others, so that they are never pruned."""
    values = scores.values.clone()
    for layer, experts in super_experts(calibration).items():
        values[scores.spec.moe_layers.index(layer), list(experts)] = torch.inf
    return replace(scores, values=values)
