"""A layer's explicit gates and outputs, and its statistics: what scores and novices are tested on."""

import torch

from mone_export.artifacts import ExpertStats, MoeSpec
from mone_export.calibration.sums import expert_stats

N_EXPERT, WIDTH, N_TOKEN = 6, 5, 40
SPEC = MoeSpec("TinyForCausalLM", 2, (1,), N_EXPERT, 2, 1, WIDTH, 4)


class Layer:
    """`gates[e]` [n_e] and `outputs[e]` [n_e, WIDTH], float64, of `counts[e]` tokens each."""

    def __init__(self, counts: tuple[int, ...], seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        scale = torch.rand(len(counts), dtype=torch.float64, generator=random) + 0.5
        self.counts = counts
        self.gates = [torch.rand(n, dtype=torch.float64, generator=random) + 0.01 for n in counts]
        self.outputs = [
            torch.randn(n, WIDTH, dtype=torch.float64, generator=random) * s + 1
            for n, s in zip(counts, scale, strict=True)
        ]
        self.unseen = counts.index(0) if 0 in counts else -1

    def stats(self) -> ExpertStats:
        return expert_stats(
            torch.cat(self.outputs), torch.cat(self.gates), torch.tensor(self.counts), n_token=N_TOKEN
        )


LAYER = Layer(counts=(12, 7, 1, 20, 0, 3))
