"""The nouns of the project on one page: what travels from stage to stage, and how it is saved.

Everything is frozen. Tensors live on the CPU; sums are float64. Every saved file names the fingerprints of
what it was made from, so that a stage can refuse what does not belong together.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mone_export.errors import MoneError


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """The mixture-of-experts shape of a model, read from its config alone.

    `moe_layers` are the layers (by number) that hold routed experts; `hidden_size` is the width of an
    expert's output, `expert_size` that of its intermediate channels.
    """

    arch: str
    n_layer: int
    moe_layers: tuple[int, ...]
    n_expert: int
    top_k: int
    n_group: int
    hidden_size: int
    expert_size: int


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """Rows of token ids, int64 [n_row, seq_len], and the SHA-256 of their shape and values."""

    tokens: Tensor
    name: str
    sha256: str


@dataclass(frozen=True, slots=True, eq=False)
class ExpertStats:
    """What calibration measured in one layer. M experts, outputs of width d; all float64 but `count` (int64).

    For a token routed to expert e, `f` is the expert's output [d] and `g` the weight that multiplies it.
    """

    n_token: int  # tokens the layer saw
    count: Tensor  # [M] tokens routed to each expert
    gate_sum: Tensor  # [M] sum of g
    gate_sq_sum: Tensor  # [M] sum of g^2
    out_mean: Tensor  # [M, d] mean of f
    out_m2: Tensor  # [M] sum over tokens and channels of (f - out_mean)^2
    gated_out_sum: Tensor  # [M, d] sum of g f
    gated2_out_sum: Tensor  # [M, d] sum of g^2 f
    norm_sum: Tensor  # [M] sum of ||f||
    norm_sq_sum: Tensor  # [M] sum of ||f||^2
    gated_norm_sum: Tensor  # [M] sum of g ||f||
    gated2_norm_sq_sum: Tensor  # [M] sum of g^2 ||f||^2
    max_abs: Tensor  # [M] largest |f| over tokens and channels
    gate_gram: Tensor  # [M, M] sum of g_e g_e' over tokens routed to both

    @classmethod
    def empty(cls, n_expert: int, hidden_size: int) -> "ExpertStats":
        """Return the statistics of no tokens at all, the neutral element of `merge`."""
        shapes = {
            "out_mean": (n_expert, hidden_size),
            "gated_out_sum": (n_expert, hidden_size),
            "gated2_out_sum": (n_expert, hidden_size),
            "gate_gram": (n_expert, n_expert),
        }
        zeros = {
            name: torch.zeros(
                shapes.get(name, (n_expert,)), dtype=torch.int64 if name == "count" else torch.float64
            )
            for name in _STAT_TENSORS
        }
        return cls(n_token=0, **zeros)

    def merge(self, other: "ExpertStats") -> "ExpertStats":
        """Return the statistics of both token sets together: exact, and order-free up to float64 rounding.

        Source: Chan, Golub, LeVeque (1979), the pairwise update of mean and M2.
        """
        count = self.count + other.count
        share = other.count.double() / count.clamp(min=1)  # [M], 0 where neither saw a token
        delta = other.out_mean - self.out_mean
        merged = {
            name: getattr(self, name) + getattr(other, name)
            for name in _STAT_TENSORS
            if name not in ("out_mean", "out_m2", "max_abs")
        }
        return ExpertStats(
            n_token=self.n_token + other.n_token,
            out_mean=self.out_mean + delta * share[:, None],
            out_m2=self.out_m2 + other.out_m2 + delta.square().sum(1) * self.count * share,
            max_abs=torch.maximum(self.max_abs, other.max_abs),
            **merged,
        )

    def weighted(self, factor: float) -> "ExpertStats":
        """Return the statistics as they are when a model multiplies all weights by a constant."""
        powers = {
            "gate_sum": 1,
            "gate_sq_sum": 2,
            "gated_out_sum": 1,
            "gated2_out_sum": 2,
            "gated_norm_sum": 1,
            "gated2_norm_sq_sum": 2,
            "gate_gram": 2,
        }
        return replace(self, **{name: getattr(self, name) * factor**n for name, n in powers.items()})


_STAT_TENSORS = tuple(field.name for field in fields(ExpertStats) if field.name != "n_token")


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """The statistics of all mixture-of-experts layers, with what they were measured on."""

    spec: MoeSpec
    model_sha256: str
    corpus_sha256: str
    corpus_name: str
    n_token: int
    layers: Mapping[int, ExpertStats]

    def save(self, path: Path) -> None:
        """Write to a safetensors file whose metadata holds everything that is not a tensor."""
        header = {
            "version": 1,
            "spec": asdict(self.spec),
            "model_sha256": self.model_sha256,
            "corpus_sha256": self.corpus_sha256,
            "corpus_name": self.corpus_name,
            "n_token": self.n_token,
            "layer_n_token": {str(layer): stats.n_token for layer, stats in self.layers.items()},
        }
        tensors = {
            f"layers.{layer}.{name}": getattr(stats, name)
            for layer, stats in self.layers.items()
            for name in _STAT_TENSORS
        }
        part = path.with_name(path.name + ".part")
        try:
            save_file(tensors, part, metadata={"mone_calibration": json.dumps(header)})
            part.replace(path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):  # where the folder is the problem there is nothing to remove
                part.unlink()
            raise MoneError(
                f"cannot write the statistics to {path}: {error}; choose another --stats file"
            ) from None

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Read what `save` wrote; `MoneError` when the file is something else."""
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["mone_calibration"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            if header["version"] != 1:
                raise ValueError(f"version {header['version']}, this mone-export reads version 1")
            spec = MoeSpec(**header["spec"] | {"moe_layers": tuple(header["spec"]["moe_layers"])})
            return cls(
                spec=spec,
                model_sha256=header["model_sha256"],
                corpus_sha256=header["corpus_sha256"],
                corpus_name=header["corpus_name"],
                n_token=header["n_token"],
                layers={layer: _stats_of(layer, header, tensors) for layer in spec.moe_layers},
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise MoneError(
                f"{path} is not a statistics file of mone-export ({error}): remove it or choose another"
            ) from None


def _stats_of(layer: int, header: dict[str, Any], tensors: Mapping[str, Tensor]) -> ExpertStats:
    own = {name: tensors[f"layers.{layer}.{name}"] for name in _STAT_TENSORS}
    return ExpertStats(n_token=header["layer_n_token"][str(layer)], **own)


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """One number per expert, float64 [n_moe_layer, n_expert], layers as in `spec`; larger = keep."""

    spec: MoeSpec
    score: str
    values: Tensor


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Which experts of one layer stay and which become novices: original ids, each ascending."""

    layer: int
    kept: tuple[int, ...]
    pruned: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """The original ids in the order the file numbers them: kept ones first."""
        return self.kept + self.pruned


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole decision: per layer, who stays. `ratio` is what was asked for."""

    spec: MoeSpec
    method: str
    score: str
    ratio: float
    scope: str
    layers: tuple[LayerPlan, ...]

    @property
    def share_pruned(self) -> float:
        """The share of experts replaced, over all mixture-of-experts layers."""
        return sum(len(layer.pruned) for layer in self.layers) / (len(self.layers) * self.spec.n_expert)


@dataclass(frozen=True, slots=True)
class Report:
    """What an export did: sizes in bytes, experts kept per layer, seconds per stage, remarks for the user."""

    outfile: Path
    size: int
    size_unpruned: int
    n_kept: Mapping[int, int]
    seconds: Mapping[str, float]
    remarks: tuple[str, ...]
