"""llama.cpp's own converter, opened at one seam: each tensor it yields can be cut down or edited on its way
out.

The only file that imports llama.cpp's `conversion/`, from the pinned tree. The converter's
class for a model is subclassed at run time (`opened`); names, layouts, tokenizer and metadata stay
llama.cpp's business.
"""

import logging
import math
import shlex
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mone_export.errors import MoneError, first_line
from mone_export.lazily import torch
from mone_export.recipe import Mtp
from mone_export.runtime import Progress, tree
from mone_export.source.gguf_types import gguf_library, n_bytes
from mone_export.source.naming import name_of
from mone_export.source.opened import Edits, Opened, Packing, cause, opened_class
from mone_export.source.prediction import blocks_after, reason_to_leave_out, remark
from mone_export.source.remote_code import refuse_remote_code

log = logging.getLogger(__name__)

CONVERTER_TYPES = {
    "auto": "GUESSED",
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
}

# where configs state how many blocks predict further tokens
_BLOCK_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")


class Conversion:
    """A model opened for conversion: every tensor is known by name, shape and type, none is read yet.

    `remark` is a sentence on what the file leaves out of the model, or None.
    """

    opened: type[Opened] = Opened  # what comes before the converter's own class

    def __init__(
        self,
        path: Path,
        edits: Edits,
        *,
        outtype: str,
        mtp: Mtp = "keep",
        name: str = "",
        trust_remote_code: bool = False,
    ) -> None:
        """Open the model in `path`; `MoneError` when llama.cpp cannot convert it.

        `mtp`: whether blocks that predict further tokens are kept, where they can be. `name`: the model's, or
        its id on the hub, `org/model`; the folder's where none is given. Code that comes with the model runs
        only with `trust_remote_code`.
        """
        from mone_export.source.stacking import LazyStack

        if not trust_remote_code:
            refuse_remote_code(path)
        self._path = path
        self._metadata_ready = False
        self._packing: Packing | None = None
        self._gguf, self._conversion = load_converter()
        self._settings = {
            "library": self._gguf,
            "lazy_tensor": self._conversion.LazyTorchTensor,
            "edits": edits,
            "model_id": name or name_of(path),
            "trust_remote_code": trust_remote_code,
        }
        self._ftype = self._gguf.LlamaFileType[CONVERTER_TYPES[outtype]]
        with torch.inference_mode(), LazyStack(self._conversion.LazyTorchTensor):
            try:
                self._model, self.remark = self._opened(mtp)
                self._model.prepare_tensors()
            except MoneError:
                raise
            except (Exception, SystemExit) as error:
                raise _cannot_convert(path, error) from None
        self.block_count: int = self._model.block_count
        self.arch: str = self._gguf.MODEL_ARCH_NAMES[self._model.model_arch]

    def _opened(self, mtp: Mtp) -> tuple[Any, str | None]:
        """Return the converter's model with the blocks it can have, and what to say of those it has not."""
        spec = self._settings["edits"].spec
        names = blocks_after(self._path, spec)
        reason = reason_to_leave_out(self._path, spec, names, mtp) if names else None
        model = self._model_without(names if reason else (), no_mtp=not names or bool(reason))
        if names and not reason and model.block_count == spec.n_layer:
            stated = any(model.hparams.get(key) for key in _BLOCK_COUNTS)
            reason = "llama.cpp's converter does so" if stated else f"the config states no {_BLOCK_COUNTS[0]}"
            model = self._model_without(names, no_mtp=True)
        if reason and model.block_count > spec.n_layer:  # a converter that always counts them
            model.block_count = spec.n_layer
            model.hparams |= dict.fromkeys(_BLOCK_COUNTS, 0)
        return model, remark(names, reason) if reason else None

    def _model_without(self, left_out: Sequence[str], *, no_mtp: bool) -> Any:
        base = converter_class(self._conversion, self._path)
        settings = self._settings | {"left_out": frozenset(left_out), "no_mtp": base.no_mtp or no_mtp}
        opened: type[Opened] = opened_class(self.opened, base, **settings)
        # the file name is only used to derive a model name where the model has none
        return opened(self._path, self._ftype, self._path)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, in numpy's order of dimensions (the reverse of ggml's)."""
        return {name: tuple(info.shape) for name, info in self._model.gguf_writer.tensors[0].items()}

    @property
    def types(self) -> Mapping[str, str]:
        """The type of every tensor, such as `bf16`."""
        return {name: info.dtype.name.lower() for name, info in self._model.gguf_writer.tensors[0].items()}

    def key(self, name: str) -> Any:
        """Return what the file states under a key (with `{arch}` in place of the architecture), or None."""
        self._prepare_metadata()
        value = self._model.gguf_writer.kv_data[0].get(name.format(arch=self.arch))
        return value and value.value

    def add_tensor(self, name: str, values: np.ndarray) -> None:
        """Add a float32 or int32 tensor of our own."""
        self._model.gguf_writer.add_tensor(name, values)

    def write_head(
        self, part: Path, keys: Mapping[str, tuple[str, Any]], packing: Packing | None = None
    ) -> int:
        """Write header, metadata and tensor list to `part`, and return the size the finished file will have.

        The head may be written again elsewhere, once `close` has been called. `keys` maps each key,
        additional or replaced, to (GGUF type, value); a list value makes an array of that type. `packing`
        rounds the tensors when they are written.
        """
        self._packing, self._types = packing, self.types
        self._prepare_metadata()
        writer = self._model.gguf_writer
        writer.state = type(writer.state).NO_FILE  # there may have been another head
        types = self._gguf.GGUFValueType
        for key, (kind, value) in keys.items():
            writer.remove_key(key)  # where the converter has written it, ours holds
            if isinstance(value, list):
                writer.add_key_value(key, value, types.ARRAY, sub_type=types[kind])
            else:
                writer.add_key_value(key, value, types[kind])
        for name, kind in packing.types.items() if packing else ():
            info = writer.tensors[0][name]
            info.dtype, info.nbytes = self._gguf.GGMLQuantizationType[kind.upper()], n_bytes(info.shape, kind)
        writer.write_header_to_file(path=part)
        try:
            writer.write_kv_data_to_file()
        except (struct.error, TypeError, ValueError, AttributeError) as error:
            raise self._cannot_state(error) from None
        writer.write_ti_data_to_file()
        self.head_length = writer.fout[0].tell()
        writer.write_padding(writer.fout[0], self.head_length)
        padded = (writer.ggml_pad(info.nbytes, writer.data_alignment) for info in writer.tensors[0].values())
        return int(writer.fout[0].tell() + sum(padded))

    def write_tensors(self, progress: Progress | None = None) -> None:
        """Write all tensor data after the head, one tensor at a time, and close the file."""
        writer = self._model.gguf_writer
        tensors, file = writer.tensors[0], writer.fout[0]
        total = sum(info.nbytes for info in tensors.values())
        done = 0
        with torch.inference_mode():
            for name, info in tensors.items():
                start = file.tell()
                for data in self._data(name, info):
                    data.tofile(file)
                assert file.tell() - start == info.nbytes, (name, info.shape, file.tell() - start)
                writer.write_padding(file, info.nbytes)
                info.tensor = None  # frees it
                done += info.nbytes
                if progress:
                    progress(done // 2**20, total // 2**20, "writing (MiB)")
        self.close()

    def close(self) -> None:
        """Close the output file, if one is open."""
        self._model.gguf_writer.close()

    def _data(self, name: str, info: Any) -> Iterable[Any]:
        """Return what writes a tensor to a file, part by part: experts one by one, on all cores."""
        tensor, kind, packing = info.tensor, self._types[name], self._packing
        chunked = isinstance(tensor, self._gguf.LazyChunkedTensor)
        if packing and chunked and tensor._qtype is not None:  # the converter's own type, and then the file's
            values = (np.asarray(load(), np.float32) for load in tensor._chunks)
            return packing.packed(name, kind, info.shape, values)
        if not packing or packing.types[name] == kind:
            return [tensor]
        parts = (load() for load in tensor._chunks) if chunked else [self._whole(tensor)]
        return packing.packed(name, kind, info.shape, (part.reshape(-1).view(np.uint8) for part in parts))

    def _whole(self, tensor: Any) -> np.ndarray:
        return np.ascontiguousarray(self._gguf.LazyNumpyTensor.to_eager(tensor))

    def _cannot_state(self, error: Exception) -> MoneError:
        """Return the error for a value that a GGUF cannot hold, with its key."""
        writer = self._model.gguf_writer
        for key, value in writer.kv_data[0].items():
            try:
                writer._pack_val(value.value, value.type, add_vtype=True, sub_type=value.sub_type)
            except (struct.error, TypeError, ValueError, AttributeError) as wrong:
                return _cannot_convert(self._path, wrong, f"a GGUF cannot state {key} = {value.value!r}")
        return _cannot_convert(self._path, error)

    def _prepare_metadata(self) -> None:
        """Have llama.cpp collect all keys, once; all tensors must be known."""
        if self._metadata_ready:
            return
        with torch.inference_mode():
            try:
                self._model.prepare_metadata(vocab_only=False)
            except MoneError:
                raise
            except (Exception, SystemExit) as error:
                raise _cannot_convert(self._path, error) from None
        self._metadata_ready = True


def projector_command(path: Path, outfile: Path) -> str | None:
    """Return the command that converts a model's vision or audio part, None where there is none for it.

    The text part is exported here; what encodes images into its tokens is llama.cpp's business alone, in a
    file of its own beside `outfile`.
    """
    _, conversion = load_converter()
    hparams = conversion.ModelBase.load_hparams(path, False)
    if not (hparams.get("vision_config") or hparams.get("audio_config")):
        return None
    try:
        name = conversion.get_model_architecture(hparams, conversion.ModelType.MMPROJ)
        conversion.get_model_class(name, mmproj=True)
    except (NotImplementedError, ValueError, KeyError):
        return None
    program, projector = tree() / "convert_hf_to_gguf.py", outfile.with_name(f"mmproj-{outfile.name}")
    command = [sys.executable, str(program), "--no-trust-remote-code", "--mmproj", str(path)]
    return shlex.join([*command, "--outfile", str(projector)])


@cache
def load_converter() -> tuple[Any, Any]:
    """Return the modules `gguf` and `conversion` of the pinned tree: they must be of one commit."""
    gguf = gguf_library()
    if (root := str(tree())) not in sys.path:
        sys.path.insert(0, root)
    import conversion

    gguf.utility.LocalTensor.mmap_bytes = _read
    # it would read a tensor to say how many dimensions it has
    conversion.LazyTorchTensor.dim = lambda tensor: len(tensor.shape)
    conversion.LazyTorchTensor.numel = lambda tensor: math.prod(tensor.shape)
    return gguf, conversion


def _read(tensor: Any) -> np.ndarray:
    """Return a tensor's bytes, uint8 [n_byte], read where the converter would map them.

    Whoever cuts a mapped file short ends a process that looks at it, by a signal.
    """
    file, n_byte = tensor.data_range.filename, tensor.data_range.size
    try:
        found = np.fromfile(file, np.uint8, n_byte, offset=tensor.data_range.offset)
    except OSError as error:
        raise MoneError(f"cannot read {file}: {error.strerror}") from None
    if len(found) < n_byte:
        raise MoneError(f"{file} became shorter while it was read: get it again")
    return found


def check_convertible(path: Path) -> None:
    """Raise `MoneError` where llama.cpp has no converter for the model in a folder; reads its config only."""
    converter_class(load_converter()[1], path)


def converter_class(conversion: Any, path: Path) -> Any:
    """Return llama.cpp's class for the model in a folder; `MoneError` where it has none."""
    hparams = conversion.ModelBase.load_hparams(path, False)
    try:
        name = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
        return conversion.get_model_class(name)
    except (NotImplementedError, ValueError, KeyError) as error:
        raise MoneError(
            f"llama.cpp has no converter for the model in {path}: {first_line(error).rstrip('.!')}; "
            "only models that llama.cpp can run can be exported"
        ) from None


def _cannot_convert(path: Path, error: BaseException, what: str = "") -> MoneError:
    incomplete = isinstance(error, FileNotFoundError) or "Unprocessed experts" in str(error)
    hint = "; is the folder complete?" if incomplete else ""
    said = f"{what} ({first_line(error)})" if what else cause(path, error)
    return MoneError(f"llama.cpp cannot convert {path}: {said}{hint}")
