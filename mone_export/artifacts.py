"""The nouns of the project on one page: what travels from stage to stage, and how it is saved.

Everything is frozen. Tensors live on the CPU; sums are float64. Every saved file names the fingerprints of
what it was made from, so that a stage can refuse what does not belong together.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from mone_export import files
from mone_export.errors import MoneError, first_line
from mone_export.lazily import Tensor, torch
from mone_export.paths import replacing
from mone_export.recipe import Recipe, ScoreName


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """The mixture-of-experts shape of a model, read from its config alone.

    `moe_layers` are the layers (by number) that hold routed experts; `hidden_size` is the width of an
    expert's output, `expert_size` that of its intermediate channels. The experts of a token come from
    `topk_group` of `n_group` groups of equal size, groups of neighbouring numbers. In `numbered` layers an
    expert's number means something else. A model that was pruned before has `kept_before` experts in its
    layers, and constants in the place of the others.
    """

    arch: str
    n_layer: int
    moe_layers: tuple[int, ...]
    n_expert: int
    top_k: int
    n_group: int
    hidden_size: int
    expert_size: int
    topk_group: int = 1
    numbered: tuple[int, ...] = ()
    kept_before: tuple[int, ...] = ()

    @property
    def present(self) -> dict[int, int]:
        """How many experts each layer has; those after them are novices already."""
        counts = self.kept_before or (self.n_expert,) * len(self.moe_layers)
        return dict(zip(self.moe_layers, counts, strict=True))

    def keeps_numbers(self, layer: int) -> bool:
        """Return whether an expert's number means something in a layer, so that its router stays as it is."""
        return self.n_group > 1 or layer in self.numbered


@dataclass(frozen=True, slots=True)
class TextSample:
    """What a text looked like when it was read: pieces from all over it, and how many documents were chats.

    `n_chat` is None where the tokenizer has no chat template.
    """

    pieces: tuple[str, ...]
    n_chat: int | None


class Corpus:
    """Rows of token ids, int64 [n_row, seq_len], and the SHA-256 of their shape and values.

    `tokens` has them as a tensor, `ids` as an array of the same memory. `sources` says how many of the tokens
    each text gave, by name; `origin`, int16 [n_row, seq_len], which of them each token is from. `sample` is
    None where the rows were not read from a text.
    """

    def __init__(
        self,
        tokens: "Tensor | np.ndarray",
        name: str,
        sha256: str,
        sources: Mapping[str, int] | None = None,
        origin: np.ndarray | None = None,
        sample: TextSample | None = None,
    ) -> None:
        """Take rows as either; they become a tensor where one is asked for, as a dry run never does."""
        self.ids: np.ndarray = np.asarray(tokens)
        self.name, self.sha256, self.sources, self.origin = name, sha256, sources or {}, origin
        self.sample = sample

    @property
    def tokens(self) -> Tensor:
        """The rows as a tensor."""
        return torch.from_numpy(self.ids)


@dataclass(frozen=True, slots=True, eq=False)
class ExpertStats:
    """What calibration measured in one layer: M experts, outputs of width d; float64 except `count` (int64).

    For a token routed to expert e, `f` is the expert's output [d] and `g` the weight that multiplies it.
    `count` is always what was really seen. Every other sum, and the mean, takes each token as often as its
    text weighs (`reweighted`): once, unless files were merged with weights.
    """

    n_token: int  # tokens the layer saw
    count: Tensor  # [M] tokens routed to each expert
    weight: Tensor  # [M] sum of those tokens' weights: `count`, unless files were merged with weights
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

    @classmethod
    def empty(cls, n_expert: int, hidden_size: int, *, device: "torch.device | None" = None) -> "ExpertStats":
        """Return the statistics of no tokens at all, the neutral element of `merge`."""
        shapes = {
            "out_mean": (n_expert, hidden_size),
            "gated_out_sum": (n_expert, hidden_size),
            "gated2_out_sum": (n_expert, hidden_size),
        }
        zeros = {
            name: torch.zeros(
                shapes.get(name, (n_expert,)),
                dtype=torch.int64 if name == "count" else torch.float64,
                device=device,
            )
            for name in _STAT_TENSORS
        }
        return cls(n_token=0, **zeros)

    def merge(self, other: "ExpertStats") -> "ExpertStats":
        """Return the statistics of both token sets together: exact, and order-free up to float64 rounding.

        Source: Chan, Golub, LeVeque (1979), the pairwise update of mean and M2.
        """
        weight = self.weight + other.weight
        share = other.weight / torch.where(weight > 0, weight, 1)  # [M], 0 where neither saw a token
        delta = other.out_mean - self.out_mean
        merged = {
            name: getattr(self, name) + getattr(other, name)
            for name in _STAT_TENSORS
            if name not in ("out_mean", "out_m2", "max_abs")
        }
        return ExpertStats(
            n_token=self.n_token + other.n_token,
            out_mean=self.out_mean + delta * share[:, None],
            out_m2=self.out_m2 + other.out_m2 + delta.square().sum(1) * self.weight * share,
            max_abs=torch.maximum(self.max_abs, other.max_abs),
            **merged,
        )

    def reweighted(self, times: float) -> "ExpertStats":
        """Return the statistics as they are when each token counts `times` times: all sums except `count`.

        `n_token`, `count`, `out_mean` and `max_abs` stay: they say what was seen, or do not depend on it.
        """
        kept = ("count", "out_mean", "max_abs")
        return replace(
            self, **{name: getattr(self, name) * times for name in _STAT_TENSORS if name not in kept}
        )

    def to(self, device: "torch.device | str") -> "ExpertStats":
        """Return the statistics on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _STAT_TENSORS})

    def weighted(self, factor: float) -> "ExpertStats":
        """Return the statistics as they are when a model multiplies all weights by a constant."""
        powers = {
            "gate_sum": 1,
            "gate_sq_sum": 2,
            "gated_out_sum": 1,
            "gated2_out_sum": 2,
            "gated_norm_sum": 1,
            "gated2_norm_sq_sum": 2,
        }
        return replace(self, **{name: getattr(self, name) * factor**n for name, n in powers.items()})


@dataclass(frozen=True, slots=True, eq=False)
class InputSums:
    """What went into a matrix, or into each of a stack of them, for importance matrices; float64."""

    squares: Tensor  # [n_matrix, n_in] sum over rows of each input channel's square
    n_row: Tensor  # rows: [n_matrix] of a stack of experts, else [1]

    def merge(self, other: "InputSums") -> "InputSums":
        """Return the sums of both sets of rows together."""
        return InputSums(self.squares + other.squares, self.n_row + other.n_row)

    def reweighted(self, times: float) -> "InputSums":
        """Return the sums as they are when each row counts `times` times."""
        return InputSums(self.squares * times, self.n_row * times)

    def to(self, device: "torch.device | str") -> "InputSums":
        """Return the sums on another device."""
        return InputSums(self.squares.to(device), self.n_row.to(device))


_VERSION, _READ_VERSIONS = 3, (2, 3)  # of statistics files
_STAT_TENSORS = tuple(field.name for field in fields(ExpertStats) if field.name != "n_token")
_OF_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_\w+_exps\.")
_SQUARES = re.compile(r"(inputs\.(.+))\.squares")


@dataclass(frozen=True, slots=True)
class Part:
    """Text that was calibrated in one go: its rows' fingerprint and its tokens by source.

    Each of its tokens counts `weight` times; 1, unless files were merged with weights.
    """

    corpus_sha256: str
    sources: Mapping[str, int]
    weight: float = 1.0

    @property
    def n_token(self) -> int:
        """Tokens of all sources."""
        return sum(self.sources.values())


@dataclass(frozen=True, slots=True, eq=False)
class Residual:
    """What a layer's pruned experts P add to its output, r_t = sum_{e in S_t and P} g_te f_te; float64.

    The squared error that any novices N leave in the layer, over all its tokens together, follows from it.
    """

    gram: Tensor  # [M, M] sum over tokens of g_e g_e', rows and columns outside P are zero
    cross: Tensor  # [M, d] sum over tokens of g_e r_t
    norm_sq: float  # sum over tokens of ||r_t||^2

    def merge(self, other: "Residual") -> "Residual":
        """Return the residual of both token sets together."""
        return Residual(self.gram + other.gram, self.cross + other.cross, self.norm_sq + other.norm_sq)

    def error(self, novices: Tensor) -> float:
        """Return sum_t ||r_t - sum_e g_te N_e||^2 for `novices` N [M, d]."""
        return float(
            self.norm_sq - 2 * (novices * self.cross).sum() + (novices * (self.gram @ novices)).sum()
        )


@dataclass(frozen=True, slots=True, eq=False)
class ChannelStats:
    """What a second pass measured of a layer's hidden activations h [I], each expert's own tokens; float64.

    An expert's output is its down projection of h. Each token counts with the square of its routing weight g.
    """

    count: Tensor  # int64 [M] tokens routed to each expert
    weight: Tensor  # [M] sum of g^2
    first: Tensor  # [M, I] sum of g^2 h
    second: Tensor  # [M, I, I] sum of g^2 h h'

    @classmethod
    def empty(cls, n_expert: int, size: int) -> "ChannelStats":
        """Return the sums of no tokens at all, the neutral element of `merge`."""
        shapes = ((n_expert,), (n_expert, size), (n_expert, size, size))
        count = torch.zeros(n_expert, dtype=torch.int64)
        return cls(count, *(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def weighted(self, factor: float) -> "ChannelStats":
        """Return the sums as they are when a model multiplies all weights by a constant."""
        times = factor**2
        return replace(self, weight=self.weight * times, first=self.first * times, second=self.second * times)

    def merge(self, other: "ChannelStats") -> "ChannelStats":
        """Return the sums of both token sets together."""
        return ChannelStats(*(getattr(self, name) + getattr(other, name) for name in _CHANNEL_TENSORS))

    def save(self, folder: Path, layer: int) -> None:
        """Write a layer's sums to a safetensors file in a folder, half of the second moments, in float32."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        places = _lower_half(self.second.shape[-1])
        half = torch.empty(len(self.second), len(places), dtype=torch.float32)
        for own, matrix in zip(half, self.second, strict=True):
            own.copy_(matrix.flatten()[places])
        tensors = {name: getattr(self, name) for name in _CHANNEL_TENSORS} | {"second": half}
        file = _channel_file(folder, layer)
        try:
            save_file(tensors, part := file.with_suffix(".part"))
            files.replace(part, file)
        except (OSError, SafetensorError) as error:
            raise MoneError(
                f"cannot write to {folder}: {first_line(error)}; free some space there, set TMPDIR, or pass "
                "--workdir"
            ) from None

    @staticmethod
    def are_in(folder: Path, layers: Iterable[int]) -> bool:
        """Say whether a folder has the sums of all these layers; a file appears when it is complete."""
        return all(_channel_file(folder, layer).exists() for layer in layers)

    @classmethod
    def load(cls, folder: Path, layer: int) -> "ChannelStats":
        """Read what `save` wrote; the second moments stay in float32."""
        from safetensors.torch import load_file

        tensors = load_file(_channel_file(folder, layer), backend="pread")
        half, size = tensors.pop("second"), tensors["first"].shape[1]
        second, places = half.new_zeros(len(half), size, size), _lower_half(size)
        for matrix, own in zip(second, half, strict=True):
            matrix.view(-1)[places] = own
            matrix += matrix.tril(-1).T
        return cls(**tensors, second=second)


def _channel_file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer}.half.safetensors"


def _lower_half(size: int) -> Tensor:
    """Return the places in a flat [size, size] matrix that are not above its diagonal."""
    return torch.ones(size, size, dtype=torch.bool).tril().flatten().nonzero().squeeze(1)


_CHANNEL_TENSORS = tuple(field.name for field in fields(ChannelStats))


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """The statistics of all mixture-of-experts layers, with what they were measured on.

    `parts` names the text: one part, or several where files were merged. `config` is the part of the model's
    config that decides what it computes, and `made_with` says by what it was computed (`dtype`, `device`,
    versions); both are empty in files of earlier versions. `sensitivity` says for each layer how much
    harm an error in it does, as `pruning.allocation` defines it; empty where that was not measured. `inputs`
    are those of the layers' matrices, by the names that `calibration.input_sums` says; empty in files of
    earlier versions.
    """

    spec: MoeSpec
    model_sha256: str
    corpus_sha256: str
    corpus_name: str
    n_token: int
    layers: Mapping[int, ExpertStats]
    parts: tuple[Part, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    made_with: Mapping[str, str] = field(default_factory=dict)
    sensitivity: Mapping[int, float] = field(default_factory=dict)
    inputs: Mapping[str, InputSums] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file whose metadata holds everything that is not a tensor."""
        header = {
            "spec": asdict(self.spec),
            "model_sha256": self.model_sha256,
            "config": self.config,
            "made_with": dict(self.made_with),
            "corpus_sha256": self.corpus_sha256,
            "corpus_name": self.corpus_name,
            "n_token": self.n_token,
            "parts": [asdict(part) for part in self.parts],
            "sensitivity": {str(layer): value for layer, value in self.sensitivity.items()},
        }
        save_found(Path(path), {**self.layers, **self.inputs}, header)

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read what `save` wrote; `MoneError` when the file is something else."""
        path = Path(path)
        header, found = load_found(path)
        layers, inputs = by_layer(found), by_matrix(found)
        try:
            lists = {key: tuple(value) for key, value in header["spec"].items() if isinstance(value, list)}
            spec = MoeSpec(**header["spec"] | lists)
            _check_shapes(spec, layers)
            _check_inputs(spec, inputs)
            return cls(
                spec=spec,
                model_sha256=header["model_sha256"],
                config=header.get("config", {}),
                made_with=header.get("made_with", {}),
                corpus_sha256=header["corpus_sha256"],
                corpus_name=header["corpus_name"],
                n_token=header["n_token"],
                layers={layer: layers[layer] for layer in spec.moe_layers},
                parts=tuple(Part(**part) for part in header["parts"]),
                sensitivity={int(layer): value for layer, value in header.get("sensitivity", {}).items()},
                inputs=inputs,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _not_ours(path, error) from None


def differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values differ, inner ones as `outer.inner`; none where a mapping is empty."""
    keys = []
    for key in sorted({*found, *wanted} if found and wanted else ()):
        one, other = found.get(key), wanted.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            keys += [f"{key}.{inner}" for inner in differing(one, other)]
        elif one != other:
            keys.append(key)
    return keys


Found = Mapping[Any, ExpertStats | InputSums]
"""What a calibration finds: each layer's statistics by its number, inputs of matrices by their names."""


def by_layer(found: Found) -> dict[int, ExpertStats]:
    """Return the layers' statistics among what was found, ascending."""
    layers = sorted((key, value) for key, value in found.items() if isinstance(key, int))
    return {layer: stats for layer, stats in layers if isinstance(stats, ExpertStats)}


def by_matrix(found: Found) -> dict[str, InputSums]:
    """Return the inputs of matrices among what was found, by name."""
    named = sorted((key, value) for key, value in found.items() if isinstance(key, str))
    return {name: sums for name, sums in named if isinstance(sums, InputSums)}


def save_found(path: Path, found: Found, header: Mapping[str, Any]) -> None:
    """Write what was found to a safetensors file, whose metadata holds what is not a tensor as JSON.

    The file appears when it is complete. Raises `MoneError` when it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    layers = by_layer(found)
    n_token = {str(layer): stats.n_token for layer, stats in layers.items()}
    metadata = {"mone_calibration": json.dumps({"version": _VERSION, **header, "layer_n_token": n_token})}
    tensors = {
        f"layers.{layer}.{name}": getattr(stats, name)
        for layer, stats in layers.items()
        for name in _STAT_TENSORS
    }
    for matrix, sums in by_matrix(found).items():
        tensors |= {f"inputs.{matrix}.squares": sums.squares, f"inputs.{matrix}.n_row": sums.n_row}
    try:
        with replacing(path) as part:
            save_file(tensors, part, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise MoneError(
            f"cannot write the statistics to {path}: {first_line(error)}; free some space, or choose another "
            "--stats file or --workdir"
        ) from None


def load_found(path: Path) -> tuple[dict[str, Any], Found]:
    """Read what `save_found` wrote: (header, what was found)."""
    from safetensors import SafetensorError, safe_open

    header = read_layers_head(path)
    try:
        # read, not mapped: Windows would not let the file be replaced
        with safe_open(path, framework="pt", backend="pread") as file:
            found: dict[Any, ExpertStats | InputSums] = {
                int(layer): ExpertStats(
                    n_token=n_token,
                    **{name: file.get_tensor(f"layers.{layer}.{name}") for name in _STAT_TENSORS},
                )
                for layer, n_token in header["layer_n_token"].items()
            }
            for match in filter(None, map(_SQUARES.fullmatch, file.keys())):
                parts = [file.get_tensor(f"{match[1]}.{part}") for part in ("squares", "n_row")]
                found[match[2]] = InputSums(*parts)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise _not_ours(path, error) from None
    return header, found


def _check_shapes(spec: MoeSpec, layers: Mapping[int, ExpertStats]) -> None:
    """Raise `ValueError` unless every tensor is as large as the shape says, and tokens are numbers."""
    wide = {"out_mean", "gated_out_sum", "gated2_out_sum"}
    for layer, stats in layers.items():
        for name in _STAT_TENSORS:
            wanted = (spec.n_expert, spec.hidden_size) if name in wide else (spec.n_expert,)
            if tuple(getattr(stats, name).shape) != wanted:
                raise ValueError(f"layer {layer}: {name} is not of {spec.n_expert} experts")
        if not isinstance(stats.n_token, int):
            raise ValueError(f"layer {layer}: {stats.n_token} tokens".splitlines()[0][:80])


def _check_inputs(spec: MoeSpec, inputs: Mapping[str, InputSums]) -> None:
    """Raise `ValueError` unless inputs are sums of squares, of experts for each of a layer's."""
    for name, sums in inputs.items():
        squares, n_row = sums.squares, sums.n_row
        match = _OF_EXPERTS.match(name)
        n_matrix = spec.present.get(int(match[1]), 0) if match else squares.shape[0]
        shapes = [(n_matrix,)] if match else [(n_matrix,), (1,)]
        if squares.dim() != 2 or len(squares) != n_matrix or not n_matrix or n_row.shape not in shapes:
            raise ValueError(f"the inputs of {name[:60]} are not of {n_matrix} matrices")
        for tensor in (squares, n_row):
            if tensor.dtype != torch.float64 or not bool((tensor >= 0).all() & tensor.isfinite().all()):
                raise ValueError(f"the inputs of {name[:60]} are no sums of squares")


def read_layers_head(path: Path) -> dict[str, Any]:
    """Read what `save_found` wrote besides tensors, without PyTorch."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np", backend="pread") as file:
            header = json.loads((file.metadata() or {})["mone_calibration"])
        if header["version"] not in _READ_VERSIONS:
            raise ValueError(
                f"version {header['version']}, this mone-export reads version {_VERSION} and before"
            )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _not_ours(path, error) from None
    return dict(header)


def _not_ours(path: Path, error: Exception) -> MoneError:
    return MoneError(
        f"{path} is not a statistics file of mone-export ({first_line(error)}): choose another file"
    )


@dataclass(frozen=True, slots=True)
class Protected:
    """The experts that one text needs most: they stay, whatever the text says that was calibrated on.

    At most `n` of each layer, original ids by layer, ascending; fewer where the text used fewer. `n_saved` is
    how many of all would not have stayed whole; None where that is not known.
    """

    name: str
    n: int
    corpus_sha256: str
    n_token: int
    experts: Mapping[int, tuple[int, ...]]
    n_saved: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """One number per expert, float64 [n_moe_layer, n_expert], layers as in `spec`; larger = keep.

    `calibration` is what they follow from; None where they follow from the weights alone, or from nothing.
    Experts that are `protected` score infinity.
    """

    spec: MoeSpec
    score: ScoreName
    values: Tensor
    calibration: Calibration | None = None
    protected: tuple[Protected, ...] = ()


@dataclass(frozen=True, slots=True)
class Tier:
    """Experts of one layer that keep `width` of their intermediate channels: original ids, ascending.

    `kind` is the type of their matrices, such as `q4_k`; empty: the file's.
    """

    width: int
    experts: tuple[int, ...]
    kind: str = ""


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Which experts of one layer stay and which become novices: original ids, each ascending.

    Experts of `tiers`, the largest first, are in between: thin, or rounded more. `kind` is the type of those
    that stay; empty: the file's.
    """

    layer: int
    kept: tuple[int, ...]
    pruned: tuple[int, ...]
    tiers: tuple[Tier, ...] = ()
    kind: str = ""

    @property
    def replaced(self) -> tuple[int, ...]:
        """The experts that are not as they were, in the order the file numbers them: thin ones first."""
        return tuple(expert for tier in self.tiers for expert in tier.experts) + self.pruned

    @property
    def order(self) -> tuple[int, ...]:
        """The original ids in the order the file numbers them: kept ones first."""
        return self.kept + self.replaced


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole decision: per layer, which experts stay, and the recipe that led to it.

    `protected` are those that had to stay for a text of their own. By method `narrow` all that stay have
    `width` channels; 0: their own.
    """

    spec: MoeSpec
    recipe: Recipe
    layers: tuple[LayerPlan, ...]
    protected: tuple[Protected, ...] = ()
    width: int = 0

    @property
    def n_kept(self) -> dict[int, int]:
        """How many experts each layer keeps."""
        return {layer.layer: len(layer.kept) for layer in self.layers}

    @property
    def share_pruned(self) -> float:
        """The share of experts replaced, over all mixture-of-experts layers; of a thin one, the part gone."""
        size = self.spec.expert_size
        thinned = sum((1 - tier.width / size) * len(tier.experts) for at in self.layers for tier in at.tiers)
        if self.width:
            thinned += (1 - self.width / size) * sum(len(layer.kept) for layer in self.layers)
        gone = thinned + sum(len(layer.pruned) for layer in self.layers)
        return gone / (len(self.layers) * self.spec.n_expert)

    @property
    def mixes_types(self) -> bool:
        """Whether experts have types of their own."""
        return any(layer.kind or any(tier.kind for tier in layer.tiers) for layer in self.layers)

    @property
    def has_thin(self) -> bool:
        """Whether some experts are thin."""
        return self.width > 0 or any(
            tier.width < self.spec.expert_size for layer in self.layers for tier in layer.tiers
        )

    @property
    def fates(self) -> dict[int, dict[str, int]]:
        """What became of how many experts of each layer: `whole q6_k`, `96 channels`, `constant`."""
        return {layer.layer: self._fates(layer) for layer in self.layers}

    @property
    def n_tier(self) -> int:
        """How many tiers of experts the layer with most of them has, beside the kept and the pruned."""
        return max((len(layer.tiers) for layer in self.layers), default=0)

    def _fates(self, layer: LayerPlan) -> dict[str, int]:
        size = self.spec.expert_size
        tiers = (Tier(self.width or size, layer.kept, layer.kind), *layer.tiers, Tier(0, layer.pruned))
        names = {size: "whole", 0: "gone" if self.width else "constant"}
        return {
            f"{names.get(tier.width, f'{tier.width} channels')} {tier.kind}".rstrip(): len(tier.experts)
            for tier in tiers
            if tier.experts
        }


def in_order(fates: Iterable[str]) -> list[str]:
    """Return names of fates in order: whole experts, thin ones by their channels, constants, gone."""

    def place(fate: str) -> tuple[int, int]:
        channels = int(fate.split()[0]) if fate[:1].isdigit() else 0
        return 0 if fate.startswith("whole") else 1 if channels else 2, -channels

    return sorted(sorted(fates, reverse=True), key=place)


@dataclass(frozen=True, slots=True)
class Stability:
    """How much of each layer's decision stood when the text was doubled to `n_token`: overlaps, 0 to 1.

    An overlap is the Jaccard index of the experts pruned now and at half the text, or a little before.
    """

    n_token: int
    overlaps: Mapping[int, float]

    @property
    def mean(self) -> float:
        """The mean over the layers."""
        return sum(self.overlaps.values()) / len(self.overlaps)

    @property
    def lowest(self) -> float:
        """The least stable layer's."""
        return min(self.overlaps.values())


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to reach a size: a type, and the share of experts to prune (0: only quantise).

    Sizes are in bytes: of the file, and of the file with all experts.
    `types` are those of its tensors; `error` is the estimate, if known, relative to the squared output of
    the layers' experts. Where types are `mixed`, experts have their own.
    """

    outtype: str
    ratio: float
    size: int
    size_unpruned: int
    types: Mapping[str, str]
    error: float | None = None
    mixed: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """What an export did, by which recipe: sizes in bytes, experts kept per layer, text, seconds, remarks.

    `fates` says for each layer what became of how many experts, as in `Plan.fates`; `spread` how much there
    is to gain in it by treating experts unequally (`damage.spread`), empty without a calibration.
    `stability` is None where no text was read, or too little to compare. `candidates`
    are the ways there were to reach a size that was asked for, the best first. `checkpoint` is the folder
    that was written; where no file was, it is `outfile`, too. `sha256` is that of the file, or of its
    parts one after the other; empty where no file was written.
    """

    outfile: Path
    recipe: Recipe
    size: int
    size_unpruned: int
    n_kept: Mapping[int, int]
    parts: tuple[Part, ...]
    stability: Stability | None
    seconds: Mapping[str, float]
    remarks: tuple[str, ...]
    candidates: tuple[Candidate, ...] = ()
    fates: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    spread: Mapping[int, float] = field(default_factory=dict)
    checkpoint: Path | None = None
    sha256: str = ""
