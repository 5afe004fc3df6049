"""Source: what a model is, in one object. Everything that is read of a model is read through it.

A `Checkpoint` is a folder in Hugging Face's form, a `Download` one on its Hub, a `GgufFile` llama.cpp's own
kind of file. What comes after them does not ask which it has.
"""

import json
import logging
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mone_export import files
from mone_export.architectures import weights_inputs
from mone_export.artifacts import Calibration, InputSums, MoeSpec
from mone_export.errors import MoneError
from mone_export.lazily import torch
from mone_export.recipe import Mtp
from mone_export.runtime import Progress
from mone_export.source.gguf_file import GgufFile
from mone_export.source.gguf_format import part_of
from mone_export.source.hub import Snapshot, metadata, parse, skeleton_folder, weights
from mone_export.source.hub import weight_files as listed_files
from mone_export.source.llamacpp import CONVERTER_TYPES, Conversion, check_convertible, projector_command
from mone_export.source.naming import name_of
from mone_export.source.opened import Edits, Packing
from mone_export.source.prediction import blocks_after
from mone_export.source.pruned_before import PrunedBefore
from mone_export.source.remote_code import refuse_remote_code
from mone_export.source.shape import check_config, expert_modules, packing, read_config, shape_of, skeleton
from mone_export.source.substituted import Substituted, substituted
from mone_export.source.tokenizing import TextReader, load_tokenizer
from mone_export.source.weights import fingerprint, left_out, open_weights, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mone_export.source.tokenizing import TextReader

log = logging.getLogger(__name__)

DEMO = "demo"
_NOT_COMPUTING = frozenset(
    {
        *("_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype", "auto_map"),
        *("use_cache", "output_router_logits", "router_aux_loss_coef", "initializer_range"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "task_specific_params"),
    }
)


class Source(Protocol):
    """A model to prune: what it is called, what shape it has, how it is read and converted."""

    name: str
    id: str
    revision: str

    @property
    def computing_config(self) -> Mapping[str, Any]:
        """What of its config decides what it computes."""

    @property
    def limits(self) -> tuple[int | None, int | None]:
        """How many tokens it has embeddings for, and how long a row it was made for; None: not known."""

    @property
    def not_thin(self) -> str:
        """Why its experts cannot be thin (`pruning.thinning`), empty where they can."""

    @property
    def packed(self) -> str | None:
        """The type of its experts where rounding them once more would round what is rounded already."""

    @property
    def block(self) -> int:
        """How many weights of a row its own type packs together."""

    @property
    def direct_types(self) -> Collection[str]:
        """The types, of `--outtype`, that its conversion writes itself; to the others it is rounded."""

    @property
    def predicts(self) -> bool:
        """Whether it has blocks that predict further tokens."""

    @property
    def files(self) -> list[Path]:
        """Every file that is read of it."""

    @property
    def spec(self) -> MoeSpec:
        """Its shape."""

    @property
    def before(self) -> PrunedBefore | None:
        """What an earlier pruning has left, None where there was none."""

    @property
    def substituted(self) -> Substituted | None:
        """What constants stand in for in a checkpoint, None where they do not."""

    def fetch(self, *, progress: Progress | None = None) -> None:
        """Bring what was left out until now, the weights: from here on, values are read."""

    def sample(self, n_weight: int) -> Iterator[np.ndarray]:
        """Yield rows of matrices all over the model that are not packed, float32, about `n_weight` in all."""

    def fingerprint(self, *, progress: Progress | None = None) -> str:
        """Return the SHA-256 of its tensors."""

    def known_from(self, saved: Calibration | None) -> None:
        """Take the shape from statistics made before, if they are of this model."""

    def named_inputs(self, inputs: Mapping[str, InputSums]) -> dict[str, InputSums]:
        """Return the inputs that a calibration has found, by the names of its GGUF's matrices."""

    def projector_command(self, outfile: Path) -> str | None:
        """Return the command that converts a vision or audio part, None where there is none."""

    def tokenizer(self) -> "PreTrainedTokenizerBase | TextReader":
        """Return its own tokenizer."""

    def check(self, *, known: bool = False) -> None:
        """Refuse weights that would be read wrongly; reads headers only, and fewer if it is `known`."""

    def convert(self, *, edits: Edits, outtype: str, mtp: Mtp) -> "Rewriting":
        """Open it for writing: every tensor of the output is known by name, shape and type, none is read."""


class Rewriting(Protocol):
    """A model opened for writing, with edits; `remark` says what the file leaves out of the model, if any."""

    arch: str
    block_count: int
    head_length: int  # bytes of the head that was written, without padding
    remark: str | None

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, in numpy's order of dimensions (the reverse of ggml's)."""

    @property
    def types(self) -> Mapping[str, str]:
        """The type of every tensor, such as `bf16`."""

    def key(self, name: str) -> Any:
        """Return what the file states under a key (with `{arch}` in place of the architecture), or None."""

    def add_tensor(self, name: str, values: np.ndarray) -> None:
        """Add a float32 or int32 tensor of our own."""

    def write_head(
        self, part: Path, keys: Mapping[str, tuple[str, Any]], packing: Packing | None = None
    ) -> int:
        """Write all but the tensors' data to `part`, with `keys`; return the size the file will have.

        `packing` rounds the tensors when they are written.
        """

    def write_tensors(self, progress: Progress | None = None) -> None:
        """Write all tensor data after the head, and close the file."""

    def close(self) -> None:
        """Close the output file, if one is open."""


class Checkpoint:
    """A folder in Hugging Face's form: config.json, safetensors files, a tokenizer.

    `model_id` is the model's on Hugging Face, `revision` the commit; both are empty for a user's own folder.
    """

    direct_types = tuple(CONVERTER_TYPES)
    packed = before = None
    block = 1

    def __init__(
        self,
        folder: Path,
        *,
        name: str = "",
        model_id: str = "",
        revision: str = "",
        trust_remote_code: bool = False,
    ) -> None:
        """Take a folder; nothing is read yet."""
        self.folder = folder  # as much of it as has been asked for
        self.name = name or folder.resolve().name
        self.id, self.revision = model_id, revision
        self.trust_remote_code = trust_remote_code
        self._view: tempfile.TemporaryDirectory[str] | None = None
        self._saved: Calibration | None = None
        self._sha256 = ""

    @cached_property
    def config(self) -> Any:
        """transformers' config; raises `MoneError` for one that cannot be read or used."""
        if not self.trust_remote_code:
            refuse_remote_code(self._home)
        config = read_config(self._home, trust_remote_code=self.trust_remote_code)
        check_config(config, self.name, self.stated)
        return config

    @cached_property
    def stated(self) -> Mapping[str, Any]:
        """What config.json says; not to be changed."""
        found: dict[str, Any] = json.loads((self._home / "config.json").read_text(encoding="utf-8"))
        return found

    @cached_property
    def spec(self) -> MoeSpec:
        """The mixture-of-experts shape; statistics of the same config know it, too."""
        config = self.config
        if self._saved and self._saved.config == self.computing_config:
            return self._saved.spec
        return shape_of(config)

    def known_from(self, saved: Calibration | None) -> None:
        """Take the shape from statistics made before, if their config is this one."""
        self._saved = saved

    @cached_property
    def computing_config(self) -> Mapping[str, Any]:
        """config.json without what changes no number: names, versions, ids, training's own."""
        return dict(_computing(self.stated))

    @property
    def files(self) -> list[Path]:
        """The config, the weights, and the tokenizer's files."""
        return [*sorted(self.folder.glob("*.json")), *weight_files(self.folder)]

    @cached_property
    def substituted(self) -> Substituted | None:
        """What constants stand in for, None in an ordinary checkpoint."""
        return substituted(self.folder)

    @property
    def _home(self) -> Path:
        """The folder with a config that transformers and llama.cpp know."""
        return self.view if self.substituted else self.folder

    @cached_property
    def view(self) -> Path:
        """The folder as other libraries should see it: without weights that are no part of the model.

        They would take the weights by rules of their own, and not all by the same. Where constants stand in
        for experts, those are there, as zeros, and no code is.
        """
        strays = left_out(self.folder)
        if self.substituted:
            self._view = tempfile.TemporaryDirectory(prefix="mone-export-")
            self.substituted.complete(Path(self._view.name))
            return Path(self._view.name)
        if not strays:
            return self.folder
        log.warning("%s: not part of the model, and left out: %s", self.name, ", ".join(strays))
        self._view = tempfile.TemporaryDirectory(prefix="mone-export-")
        for file in self.folder.iterdir():
            if file.name not in strays:
                files.link(file.resolve(), Path(self._view.name) / file.name)
        return Path(self._view.name)

    def tensors(self) -> Mapping[str, Any]:
        """Return the open file of every tensor by name; raises `MoneError` where one is missing or broken."""
        return open_weights(self.folder)

    def fetch(self, *, progress: Progress | None = None) -> None:
        """Bring the weights, which are here already."""

    def fingerprint(self, *, progress: Progress | None = None) -> str:
        """Return the SHA-256 of the tensors; raises `MoneError` where one is not finite."""
        self.fetch(progress=progress)
        self._sha256 = self._sha256 or fingerprint(self.folder, progress=progress)
        return self._sha256

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Return the model's own tokenizer."""
        return load_tokenizer(self._home, trust_remote_code=self.trust_remote_code)

    @property
    def not_thin(self) -> str:
        """Why its experts cannot be thin, empty where they can."""
        if weights_inputs(self.spec.arch):
            return "it weights what goes into its experts"
        if packing(self.config).get("quant_method") == "mxfp4":
            return "its experts are packed (those of a GGUF, or of a BF16 checkpoint, can be)"
        modules = [module for _, module in expert_modules(skeleton(self.config))]
        return "it normalises its experts' outputs" if any(m.has_post_expert_norm for m in modules) else ""

    @property
    def limits(self) -> tuple[int | None, int | None]:
        """How many tokens it has embeddings for, and how long a row it was made for; None: not known."""
        config = self.config.get_text_config()
        found = (getattr(config, key, None) for key in ("vocab_size", "max_position_embeddings"))
        n_vocab, window = (value if isinstance(value, int) else None for value in found)
        return n_vocab, window

    @property
    def predicts(self) -> bool:
        """Whether it has blocks that predict further tokens."""
        return bool(blocks_after(self.view, self.spec))

    def sample(self, n_weight: int) -> Iterator[np.ndarray]:
        """Yield rows of matrices all over the model that are not packed, float32, about `n_weight` in all."""
        self.fetch()
        owner = self.tensors()
        names = [name for name in sorted(owner) if _is_matrix(owner[name].get_slice(name))]
        some = names[:: max(1, len(names) // 64)]
        for name in some:
            part = owner[name].get_slice(name)
            *_, height, width = part.get_shape()
            n_row = min(height, max(1, n_weight // len(some) // width))
            rows = part[0, :n_row] if len(part.get_shape()) == 3 else part[:n_row]
            yield rows.float().numpy()

    def check(self, *, known: bool = False) -> None:
        """Raise `MoneError` unless llama.cpp converts the model and transformers unpacks it; reads headers.

        It takes the size of FP8 blocks from the number of scales, which is wrong where the last block is cut.
        Of weights that were calibrated before (`known`), names and shapes are not compared with the config's.
        """
        check_convertible(self._home)
        owner = self.tensors()
        block = packing(self.config).get("weight_block_size") or (1, 1)
        for name in owner:
            shape = owner[name].get_slice(name).get_shape()
            if f"{name}_scale_inv" in owner and any(size % b for size, b in zip(shape, block, strict=False)):
                raise MoneError(
                    f"{self.name}: {name} {shape} does not consist of whole blocks of {list(block)} FP8 "
                    "values: transformers would unpack it wrongly; pass the model's BF16 checkpoint"
                )
        if not known:
            from mone_export.source.expected import check_tensors  # builds a model without weights

            check_tensors(self.view, self.config)

    def convert(self, *, edits: Edits, outtype: str = "auto", mtp: Mtp = "keep") -> Conversion:
        """Open llama.cpp's conversion of the folder; arguments are `Conversion`'s."""
        check_convertible(self._home)
        return Conversion(
            self.view,
            edits,
            outtype=outtype,
            mtp=mtp,
            name=self.id or name_of(self.folder),
            trust_remote_code=self.trust_remote_code,
        )

    def named_inputs(self, inputs: Mapping[str, InputSums]) -> dict[str, InputSums]:
        """Return inputs of its matrices by their names in a GGUF, channels in the order of those there."""
        from mone_export.source.expected import model_names, without_weights
        from mone_export.source.tracing import traced

        targets = model_names(without_weights(self.config)[0], self.tensors())
        origins = {name: inputs[target] for name, target in targets.items() if target in inputs}
        columns = {name: sums.squares.shape[1] for name, sums in origins.items()}
        found = {name: sums for name, sums in inputs.items() if part_of(name)}  # experts'
        made = traced(self.view, self.spec, columns, trust_remote_code=self.trust_remote_code)
        for name, (origin, channels) in made.items():
            sums = origins[origin]
            found[name] = InputSums(sums.squares[0][torch.from_numpy(channels)], sums.n_row)
        return found

    def projector_command(self, outfile: Path) -> str | None:
        """Return the command that converts the vision or audio part, None where there is none."""
        return projector_command(self._home, outfile)


class Download(Checkpoint):
    """A model on the Hugging Face Hub: its small files at first, and the weights when they are wanted.

    Until then its weight files have headers and holes for the data, which is enough for names, shapes, sizes.
    """

    def __init__(self, snapshot: Snapshot, *, trust_remote_code: bool = False) -> None:
        """Take a snapshot whose small files are here; asks the Hub for the headers of its weight files."""
        self._snapshot = snapshot
        self._skeleton = ExitStack()
        folder = self._skeleton.enter_context(skeleton_folder(snapshot))
        super().__init__(
            folder,
            name=snapshot.id.rpartition("/")[2],
            model_id=snapshot.id,
            revision=snapshot.revision,
            trust_remote_code=trust_remote_code,
        )

    def fetch(self, *, progress: Progress | None = None) -> None:
        """Download the weight files that are not in the cache."""
        if self.folder == self._snapshot.folder:
            return
        weights(self._snapshot, listed_files(self._snapshot.folder), progress)
        self.folder = self._snapshot.folder
        self._skeleton.close()
        for name in ("view", "substituted"):
            self.__dict__.pop(name, None)


def _is_matrix(part: Any) -> bool:
    shape, dtype = part.get_shape(), part.get_dtype()
    return len(shape) in (2, 3) and shape[-1] >= 64 and dtype in ("F32", "F16", "BF16")


def _computing(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in sorted(config.items()):
        if key not in _NOT_COMPUTING:
            yield key, dict(_computing(value)) if isinstance(value, dict) else value


def open_source(
    model: "str | Path | Source", *, revision: str | None = None, trust_remote_code: bool = False
) -> "Source":
    """Return the source that a name means: the built-in `demo`, a GGUF, a folder, or a Hugging Face id.

    `revision` is a branch, tag or commit of an id, which may also say it itself: `org/model@revision`. Of an
    id's weights nothing is downloaded yet. Raises `MoneError` for a name that is none of them.
    """
    if not isinstance(model, str | Path):
        return model
    name = str(model)
    if name == DEMO and not isinstance(model, Path):
        return Checkpoint(Path(__file__).parents[1] / "demo", name=DEMO)
    if Path(name).is_file():
        return GgufFile(Path(name))
    if Path(name).is_dir():
        return Checkpoint(Path(name), trust_remote_code=trust_remote_code)
    if name.endswith(".gguf"):
        raise MoneError(f"there is no file {name}: check the spelling")
    if isinstance(model, Path) or name.startswith((".", "/", "~")) or not (found := parse(name)):
        raise MoneError(
            f"{name} is neither a folder, a GGUF nor a Hugging Face id like org/model: check the spelling"
        )
    model_id, own_revision = found
    snapshot = metadata(model_id, revision or own_revision, code=trust_remote_code)
    return Download(snapshot, trust_remote_code=trust_remote_code)


def inspect(model: str | Path | Source) -> MoeSpec:
    """Read the mixture-of-experts shape of a model (folder, Hugging Face id or `demo`) without its weights.

    Raises `MoneError` for a missing or unknown config, a model without routed experts, and the families that
    cannot be exported.
    """
    return open_source(model).spec
