"""A file of a size: what becomes of every expert, its type included, where all compete for the same bytes.

What a fate does to the model is estimated from the statistics alone, as a squared error of the layers'
outputs, with E = sum g^2 ||f||^2 of an expert f over its tokens:

- channels that are missing, a constant's all: `MISSING` times the error they leave (`Thinning.errors`,
  `damage.error_left`). Such errors point the same way for many tokens, rounding errors do not: on trained
  models the divergence that the same squared error causes is two to four times as large.
- rounding to a type: (`INPUTS` r + `DOWN` r') E, with r, r' the relative squared error of the types of what
  reads the layer's input and of the down projection (`rounding_errors`). Not 1: an expert's answer is larger
  than rounding noise of the same relative size in its weights would make it.
- the rest of a layer: `REST` times r for each matrix, relative to what all its experts say; `OUTPUT` for the
  embeddings' matrix that gives the logits.

The constants were fitted to the demo and hold on another model to a factor of two (docs/methods.md). They
decide between kinds of fates; among experts the statistics do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from mone_export.artifacts import Candidate, MoeSpec, Plan, Scores
from mone_export.output.rounding import rounding_errors
from mone_export.pruning.damage import error_left
from mone_export.pruning.fates import Option, damage, plan_within
from mone_export.pruning.novices import novices
from mone_export.recipe import Recipe
from mone_export.source import Source
from mone_export.source.gguf_format import matrix_of, part_of
from mone_export.source.gguf_types import block_of, kind_for

KINDS = ("q8_0", "q6_k", "q5_k", "q4_k", "iq4_xs", "q3_k", "q2_k")
MISSING, INPUTS, DOWN, REST, OUTPUT = 3.0, 0.1, 0.4, 0.08, 4.8
_WEIGHTS = {"down": DOWN, "gate_up": INPUTS, "gate": INPUTS / 2, "up": INPUTS / 2}
_LOGITS = ("output.weight", "token_embd.weight")  # the first there is


@dataclass(frozen=True, eq=False)
class Spending:
    """A model's experts, and what each loses: `missing` float64 [M, n_width] per layer at some `widths`.

    Those begin with 0 and end with the experts' own; errors are sums over all tokens.
    """

    source: Source
    scores: Scores
    recipe: Recipe
    widths: Sequence[int]
    missing: Mapping[int, np.ndarray]

    @property
    def spec(self) -> MoeSpec:
        """The shape of the model."""
        return self.scores.spec

    @cached_property
    def rounding(self) -> Mapping[str, float]:
        """The relative squared error of each type."""
        others = ("q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "iq3_s")
        return rounding_errors(self.source, (*KINDS, *others))

    @cached_property
    def _said(self) -> Mapping[int, float]:
        """The squared output of each layer's experts per token."""
        calibration = self.scores.calibration
        assert calibration is not None
        return {
            layer: float(stats.gated2_norm_sq_sum.sum()) / stats.n_token
            for layer, stats in calibration.layers.items()
        }

    def plan(self, item: Candidate, limit: int, *, mixed: bool) -> tuple[Plan, float]:
        """Return the best plan of a candidate's type in a file of `limit` bytes, and its estimated error.

        The error is relative to the squared output of all layers' experts, each taken by itself.
        Where types are `mixed`, experts have any, else the candidate's. Bytes are exact but for alignment,
        and for types that differ from layer to layer.
        """
        of_experts = self._types_of_experts(item)
        kinds = KINDS if mixed else ("",)
        options = [Option(0, 0)]
        options += [
            Option(width, self._bytes(of_experts, width, kind), kind)
            for kind in kinds
            for width in self.widths[1:]
        ]
        options.sort(key=lambda option: option.n_byte)
        errors = {
            layer: np.stack([self._error(layer, option, of_experts) for option in options], axis=1)
            for layer in self.spec.moe_layers
        }
        n_kept = round((1 - item.ratio) * self.spec.n_expert)
        whole = self._bytes(of_experts, self.spec.expert_size, "")
        budget = limit - item.size + n_kept * whole * len(self.spec.moe_layers)
        chosen = plan_within(self.scores, errors, options, budget, self.recipe)
        error = damage(self.scores, errors, options, chosen) + self._rest(item)
        return chosen, error / max(1e-300, sum(self._said.values()))

    def least_step(self, item: Candidate) -> int:
        """Return the bytes of an expert of the least width there is in the candidate's type."""
        return self._bytes(self._types_of_experts(item), self.widths[1], "")

    def _bytes(self, of_experts: Mapping[str, str], width: int, kind: str) -> int:
        total = 0
        for name, own in of_experts.items():
            shape = _shape(self.spec, matrix_of(name), width)
            _, n_block, n_byte = block_of(kind_for(kind or own, shape[1]))
            total += prod(shape) // n_block * n_byte
        return total // len(self.spec.moe_layers)

    def _error(self, layer: int, option: Option, of_experts: Mapping[str, str]) -> np.ndarray:
        """Return what an option costs each expert of a layer, float64 [M]."""
        missing = self.missing[layer][:, self.widths.index(option.width)]
        if not option.width:
            return MISSING * missing
        calibration = self.scores.calibration
        assert calibration is not None
        said = calibration.layers[layer].gated2_norm_sq_sum.numpy() - missing
        rounded = 0.0
        for name, own in of_experts.items():
            if (part_of(name) or (-1, None))[0] == layer:
                matrix = matrix_of(name)
                kind = kind_for(option.kind or own, _shape(self.spec, matrix, option.width)[1])
                rounded += self._relative(kind) * _WEIGHTS[matrix]
        costs: np.ndarray = MISSING * missing + rounded * said.clip(min=0)
        return costs

    def _types_of_experts(self, item: Candidate) -> dict[str, str]:
        own = {(layer, "experts") for layer in self.spec.moe_layers}
        return {name: kind for name, kind in item.types.items() if part_of(name) in own}

    def _rest(self, item: Candidate) -> float:
        """Return what rounding everything but experts costs, per token."""
        total = 0.0
        for layer, said in self._said.items():
            own = [kind for name, kind in item.types.items() if _is_matrix_beside(name, layer)]
            total += REST * said * sum(map(self._relative, own))
        logits = next((name for name in _LOGITS if name in item.types), None)
        if logits:
            mean = sum(self._said.values()) / len(self._said)
            total += OUTPUT * self._relative(item.types[logits]) * mean
        return total

    def _relative(self, kind: str) -> float:
        return self.rounding.get(kind, 0.0)


def missing_without_channels(scores: Scores) -> dict[int, np.ndarray]:
    """Return what experts lose as constants and whole, float64 [M, 2] per layer, from the statistics."""
    assert scores.calibration is not None
    return {
        layer: np.stack([error_left(stats, novices(stats)).numpy(), np.zeros(scores.spec.n_expert)], axis=1)
        for layer, stats in scores.calibration.layers.items()
    }


def _shape(spec: MoeSpec, matrix: str, width: int) -> tuple[int, int]:
    """Return the shape [out, in] of an expert's matrix with so many channels."""
    if matrix == "down":
        return spec.hidden_size, width
    return (2 * width if matrix == "gate_up" else width), spec.hidden_size


def _is_matrix_beside(name: str, layer: int) -> bool:
    """Say whether a tensor is a matrix of a layer, and not of its experts or its router."""
    return name.startswith(f"blk.{layer}.") and not part_of(name) and "norm" not in name
