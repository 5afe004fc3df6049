"""GgufFile: a model that is a GGUF already, as a `Source`. llama.cpp runs it, and copying writes it."""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from mone_export.architectures import weights_inputs
from mone_export.artifacts import Calibration, InputSums, MoeSpec
from mone_export.errors import MoneError
from mone_export.runtime import Progress
from mone_export.source.fingerprints import remembered
from mone_export.source.gguf_conversion import GgufConversion
from mone_export.source.gguf_format import holds_ids, novice_tensor
from mone_export.source.gguf_header import SHARD, Header, TensorInfo, read_model
from mone_export.source.gguf_types import block_of, dequantize
from mone_export.source.opened import Edits
from mone_export.source.pruned_before import PrunedBefore, kept_counts, pruned_before

if TYPE_CHECKING:
    from torch import Tensor

    from mone_export.source.tokenizing import TextReader

_DOWN = re.compile(r"blk\.(\d+)\.ffn_down_exps\.weight")
_SCALE = re.compile(r"blk\.\d+\.ffn_\w+_exps\.(scale|input_scale)")
_EXACT = ("f32", "f16", "bf16", "q8_0")
_CHUNK = 2**24


class GgufFile:
    """A GGUF, in one file or split: keys and tensors from its head, values only where they are copied."""

    direct_types = ("auto",)  # of `--outtype`: what is not rounded on the way
    id = revision = ""
    substituted = None

    def __init__(self, path: Path) -> None:
        """Take a file, the first one where the model is split; nothing is read yet."""
        self.path = path
        match = SHARD.fullmatch(path.name)
        self.name = match[1] if match else path.name.removesuffix(".gguf")

    @cached_property
    def header(self) -> Header:
        """Its keys and tensors; raises `MoneError` for what is no GGUF, or broken."""
        return read_model(self.path)

    @property
    def files(self) -> list[Path]:
        """Every file of the model."""
        return list(self.header.files)

    @cached_property
    def spec(self) -> MoeSpec:
        """The mixture-of-experts shape; raises `MoneError` for a model that has none, or cannot be pruned."""
        return _shape(self.header, self.path)

    @cached_property
    def computing_config(self) -> Mapping[str, Any]:
        """What of its keys decides what it computes: the architecture's own."""
        prefix = f"{self.spec.arch}."
        return {key: self.header.value(key) for key in sorted(self.header.keys) if key.startswith(prefix)}

    @property
    def packed(self) -> str | None:
        """The type of its experts where rounding them once more would round what is rounded already."""
        kinds = (info.kind for name, info in self.header.tensors.items() if _DOWN.fullmatch(name))
        return next((kind for kind in kinds if kind not in _EXACT), None)

    @property
    def block(self) -> int:
        """How many weights of a row the type of its experts' last matrices packs together, at most."""
        return max(block_of(info.kind)[1] for _, info in _matching(_DOWN, self.header))

    @property
    def not_thin(self) -> str:
        """Why its experts cannot be thin, empty where they can."""
        if weights_inputs(self.spec.arch):
            return "it weights what goes into its experts"
        scale = next((name for name in self.header.tensors if _SCALE.fullmatch(name)), None)
        return f"its experts have scales ({scale})" if scale else ""

    @property
    def limits(self) -> tuple[int | None, int | None]:
        """How many tokens it has embeddings for, and how long a row it was made for."""
        embeddings = self.header.tensors.get("token_embd.weight")
        window = self.header.integer(f"{self.spec.arch}.context_length")
        return (embeddings.shape[-1] if embeddings else None), window or None

    @property
    def predicts(self) -> bool:
        """Whether it has blocks that predict further tokens."""
        return self.header.integer(f"{self.spec.arch}.nextn_predict_layers") > 0

    @cached_property
    def before(self) -> PrunedBefore | None:
        """What an earlier pruning has left, None where there was none."""
        return pruned_before(self.header, self.spec)

    def known_from(self, saved: Calibration | None) -> None:
        """Take nothing from statistics made before: the head says it all. Without them, text will be read."""
        if saved is None and self.spec:
            self.tokenizer()  # which is loaded from now on, beside what follows

    def fetch(self, *, progress: Progress | None = None) -> None:
        """Bring the weights, which are here already."""

    def fingerprint(self, *, progress: Progress | None = None) -> str:
        """Return the SHA-256 of the file, or of its files one after the other."""
        return remembered(self.files, lambda: hash_of(self.files, progress))

    def tokenizer(self) -> "TextReader":
        """Return its own tokenizer, which is llama.cpp's."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> "TextReader":
        from mone_export.source.gguf_tokenizing import GgufReader

        return GgufReader(self.files[0])

    def sample(self, n_weight: int) -> Iterator[np.ndarray]:
        """Yield rows of matrices all over the model that are not packed, float32, about `n_weight` in all."""
        infos = [info for info in self.header.tensors.values() if _is_matrix(info)]
        some = infos[:: max(1, len(infos) // 64)]
        for info in some:
            n_row = max(1, n_weight // len(some) // info.shape[0])
            size = info.size // math.prod(info.shape[1:]) * min(n_row, info.shape[1])
            packed = np.frombuffer(info.read(size), np.uint8)
            yield dequantize(packed.reshape(min(n_row, info.shape[1]), -1), info.kind)

    def experts(self) -> Iterator[tuple[int, Any]]:
        """Yield (layer, its experts' stacked matrices, unpacked), named as in transformers, ascending."""
        names = {"ffn_gate_exps": "gate_up_proj", "ffn_gate_up_exps": "gate_up_proj"}
        names |= {"ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
        for layer in self.spec.moe_layers:
            infos = {
                own: self.header.tensors.get(f"blk.{layer}.{name}.weight") for name, own in names.items()
            }
            infos["down_proj_bias"] = self.header.tensors.get(novice_tensor(layer))
            yield layer, SimpleNamespace(**{own: _unpacked(info) for own, info in infos.items() if info})

    def check(self, *, known: bool = False) -> None:
        """Raise `MoneError` unless the file can be pruned; reads its head only."""
        _ = self.spec

    def convert(self, *, edits: Edits, outtype: str = "auto", mtp: Any = "keep") -> GgufConversion:
        """Open it for rewriting; to round it is not its business."""
        assert outtype == "auto", outtype
        return GgufConversion(self.header, edits, mtp=mtp)

    def named_inputs(self, inputs: Mapping[str, InputSums]) -> dict[str, InputSums]:
        """Return inputs of its matrices, which have their names already."""
        return dict(inputs)

    def projector_command(self, outfile: Path) -> str | None:
        """Return no command: the projector of a model with a vision part is a GGUF of its own."""


def _shape(header: Header, path: Path) -> MoeSpec:
    arch = header.value("general.architecture")
    if not isinstance(arch, str) or not arch:
        raise MoneError(f"{path} does not say its architecture: it is no language model, or broken")
    n_expert = header.integer(f"{arch}.expert_count")
    n_layer = header.integer(f"{arch}.block_count") - header.integer(f"{arch}.nextn_predict_layers")
    downs = {int(match[1]): info for match, info in _matching(_DOWN, header) if int(match[1]) < n_layer}
    if not n_expert or not downs:
        raise MoneError(f"{path} ({arch}) has no experts: only mixture-of-experts models can be pruned")
    top_k = header.value(f"{arch}.expert_used_count")
    if not isinstance(top_k, int) or not 1 <= top_k <= n_expert:
        raise MoneError(
            f"{path} says that {str(top_k)[:60]} of {n_expert} experts are used for each token: models whose "
            "layers differ in that, and broken ones, cannot be pruned"
        )
    kept = _kept(header, downs, n_expert, path)
    shapes = {info.shape[:2] for info in downs.values()}
    if len(shapes) > 1:
        raise MoneError(f"{path}: layers with different expert shapes {sorted(shapes)} are not supported")
    expert_size, hidden_size = shapes.pop()
    return MoeSpec(
        arch=arch,
        n_layer=n_layer,
        moe_layers=tuple(sorted(downs)),
        n_expert=n_expert,
        top_k=top_k,
        n_group=max(1, header.integer(f"{arch}.expert_group_count")),
        hidden_size=hidden_size,
        expert_size=expert_size,
        topk_group=max(1, header.integer(f"{arch}.expert_group_used_count")),
        kept_before=kept,
        numbered=tuple(sorted(holds_ids(header.tensors).keys() & downs.keys())),
    )


def _matching(pattern: re.Pattern[str], header: Header) -> Iterator[tuple[re.Match[str], TensorInfo]]:
    for name, info in header.tensors.items():
        if match := pattern.fullmatch(name):
            yield match, info


def _kept(header: Header, downs: Mapping[int, TensorInfo], n_expert: int, path: Path) -> tuple[int, ...]:
    """Return how many experts each layer has, if it was pruned before; the tensors must hold as many."""
    counts = kept_counts(header, header.integer(f"{header.value('general.architecture')}.block_count"))
    kept = {layer: (counts[layer] if counts else 0) or n_expert for layer in downs}
    for layer, info in downs.items():
        if (found := (*info.shape, 1, 1)[2]) != kept[layer] or kept[layer] > n_expert:
            raise MoneError(
                f"{path} is broken: layer {layer} has {found} experts, {kept[layer]} of {n_expert} are "
                "announced"
            )
    return tuple(kept[layer] for layer in sorted(kept)) if counts else ()


def _unpacked(info: TensorInfo) -> "Tensor":
    """Return the weights of a stack of matrices, float32 [n_expert, n_out, n_in]."""
    import torch

    packed = np.frombuffer(info.read(info.size), np.uint8)
    *outer, _ = info.shape[::-1]
    return torch.from_numpy(dequantize(packed.reshape(*outer, -1), info.kind).copy())


def _is_matrix(info: TensorInfo) -> bool:
    return len(info.shape) in (2, 3) and info.shape[0] >= 64 and info.kind in _EXACT


def hash_of(files: Sequence[Path], progress: Progress | None = None) -> str:
    """Return the SHA-256 of files one after the other; raises `MoneError` where one cannot be read."""
    digest, done = hashlib.sha256(), 0
    total = sum(file.stat().st_size for file in files)
    try:
        for path in files:
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    done += len(chunk)
                    if progress:
                        progress(done // 2**20, total // 2**20, "reading the model (MiB)")
    except OSError as error:
        raise MoneError(f"cannot read {files[0]}: {error.strerror}") from None
    return digest.hexdigest()
