"""llama.cpp's own converter, opened at one seam: each tensor it yields can be cut down or edited on its way
out.

The only file that imports llama.cpp's `conversion/` and `gguf`, both from the pinned tree. The converter's
class for a model is subclassed at run time; names, layouts, tokenizer and metadata stay llama.cpp's business.
Expert tensors are read, converted and written one expert at a time, so that memory does not grow with the
layer.
"""

import logging
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mone_export.errors import MoneError, first_line
from mone_export.runtime import Progress, tree

log = logging.getLogger(__name__)

Select = Callable[[str], Sequence[int] | None]  # tensor name -> experts to keep, None: not an expert tensor
Read = Callable[[int], Tensor]  # original expert id -> its matrix [out, in]
Rewrite = Callable[[str, Read], Sequence[Callable[[], Tensor]]]  # tensor name, reader -> the experts to write
Edit = Callable[[str, Tensor], Tensor]  # tensor name, the (lazy) tensor -> what is written in its place

CONVERTER_TYPES = {
    "auto": "GUESSED",
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
}

# what the converter raises for a model it cannot handle (NotImplementedError is a RuntimeError)
_CONVERTER_ERRORS = (ValueError, KeyError, RuntimeError, OSError, AssertionError, TypeError, AttributeError)


class Conversion:
    """A model opened for conversion: every tensor is known by name, shape and type, none is read yet."""

    def __init__(
        self,
        path: Path,
        *,
        outtype: str,
        n_expert: int,
        select: Select,
        edit: Edit,
        rewrite: Rewrite | None = None,
        no_mtp: bool = False,
    ) -> None:
        """Open the model in `path`; `MoneError` when llama.cpp has no converter for it.

        `no_mtp`: the checkpoint holds no blocks for multi-token prediction, whatever its config says.
        With `rewrite` the selected experts of a tensor are not copied but made, one when it is to be written.
        """
        self._path = path
        self._metadata_ready = False
        self._gguf, conversion = _load_converter()
        converter = _converter_class(conversion, path)
        opened = _opened_class(
            converter, self._gguf, conversion.LazyTorchTensor, n_expert, select, edit, rewrite
        )
        opened.no_mtp |= no_mtp
        ftype = self._gguf.LlamaFileType[CONVERTER_TYPES[outtype]]
        self._lazy = conversion.LazyTorchTensor.from_eager
        with torch.inference_mode(), _LazyStack(conversion.LazyTorchTensor):
            try:
                # the file name is only used to derive a model name where the model has none
                self._model = opened(path, ftype, path)
                self._model.prepare_tensors()
            except _CONVERTER_ERRORS as error:
                raise _cannot_convert(path, error) from None
        self.block_count: int = self._model.block_count
        self.arch: str = self._gguf.MODEL_ARCH_NAMES[self._model.model_arch]

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

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Add a float32 or int32 tensor of our own."""
        self._model.gguf_writer.add_tensor(name, tensor.numpy())

    def write_head(self, part: Path, keys: Mapping[str, tuple[str, Any]]) -> int:
        """Write header, metadata and tensor list to `part`, and return the size the finished file will have.

        `keys` maps each key, additional or replaced, to (GGUF type, value); a list value makes an array of
        that type.
        """
        self._prepare_metadata()
        writer = self._model.gguf_writer
        types = self._gguf.GGUFValueType
        for key, (kind, value) in keys.items():
            writer.remove_key(key)  # where the converter has written it, ours holds
            if isinstance(value, list):
                writer.add_key_value(key, value, types.ARRAY, sub_type=types[kind])
            else:
                writer.add_key_value(key, value, types[kind])
        writer.write_header_to_file(path=part)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.write_padding(writer.fout[0], writer.fout[0].tell())
        padded = (writer.ggml_pad(info.nbytes, writer.data_alignment) for info in writer.tensors[0].values())
        return int(writer.fout[0].tell() + sum(padded))

    def write_tensors(self, progress: Progress | None = None) -> None:
        """Write all tensor data behind the head, one tensor at a time, and close the file."""
        writer = self._model.gguf_writer
        tensors, file = writer.tensors[0], writer.fout[0]
        total = sum(info.nbytes for info in tensors.values())
        done = 0
        with torch.inference_mode():
            for info in tensors.values():
                info.tensor.tofile(file)
                writer.write_padding(file, info.nbytes)
                info.tensor = None  # frees it
                done += info.nbytes
                if progress:
                    progress(done // 2**20, total // 2**20, "writing (MiB)")
        self.close()

    def close(self) -> None:
        """Close the output file, if one is open."""
        self._model.gguf_writer.close()

    def _prepare_metadata(self) -> None:
        """Have llama.cpp collect all keys, once; all tensors must be known."""
        if self._metadata_ready:
            return
        with torch.inference_mode():
            try:
                self._model.prepare_metadata(vocab_only=False)
            except _CONVERTER_ERRORS as error:
                raise _cannot_convert(self._path, error) from None
        self._metadata_ready = True


class _LazyStack(TorchFunctionMode):
    """Stacks llama.cpp's lazy tensors by the shape alone.

    It would ask PyTorch to stack tensors without data, and for that PyTorch imports its compiler and a
    computer algebra system: a second.
    """

    def __init__(self, lazy: Any) -> None:
        super().__init__()
        self._lazy = lazy

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func is not torch.stack or not all(isinstance(part, self._lazy) for part in args[0]):
            return func(*args, **named)
        shape = list(args[0][0].shape)
        dim = args[1] if len(args) > 1 else named.get("dim", 0)
        shape.insert(dim % (len(shape) + 1), len(args[0]))
        meta = self._lazy.meta_with_dtype_and_shape(args[0][0].dtype, tuple(shape))
        return self._lazy(meta=meta, args=tuple(args), kwargs=named, func=func)


def padded_bytes(shape: Sequence[int], type_name: str) -> int:
    """Return how many bytes of a file a tensor takes, of a shape in elements and a type such as `q4_k`."""
    gguf, _ = _load_converter()
    _, n_block, n_byte = block_of(type_name)
    return int(gguf.GGUFWriter.ggml_pad(math.prod(shape) // n_block * n_byte, gguf.GGUF_DEFAULT_ALIGNMENT))


def block_of(type_name: str) -> tuple[int, int, int]:
    """Return (ggml's number of a type such as `q4_k`, weights in a block of it, bytes of a block)."""
    gguf, _ = _load_converter()
    number = gguf.GGMLQuantizationType[type_name.upper()]
    return int(number), *gguf.GGML_QUANT_SIZES[number]


def dequantize(packed: np.ndarray, type_name: str) -> np.ndarray:
    """Return the float32 weights that rows of blocks of a type stand for."""
    gguf, _ = _load_converter()
    weights: np.ndarray = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[type_name.upper()])
    return weights


def projector_command(path: Path, outfile: Path) -> str | None:
    """Return the command that converts a model's vision or audio part, None where there is none for it.

    The text part is exported here; what encodes images into its tokens is llama.cpp's business alone, in a
    file of its own beside `outfile`.
    """
    _, conversion = _load_converter()
    hparams = conversion.ModelBase.load_hparams(path, False)
    if not (hparams.get("vision_config") or hparams.get("audio_config")):
        return None
    try:
        name = conversion.get_model_architecture(hparams, conversion.ModelType.MMPROJ)
        conversion.get_model_class(name, mmproj=True)
    except (NotImplementedError, ValueError, KeyError):
        return None
    program, projector = tree() / "convert_hf_to_gguf.py", outfile.with_name(f"mmproj-{outfile.name}")
    return shlex.join([sys.executable, str(program), "--mmproj", str(path), "--outfile", str(projector)])


@cache
def _load_converter() -> tuple[Any, Any]:
    """Import `gguf` and `conversion` from the pinned tree: they must be of one commit."""
    root = tree()
    for folder in (str(root), str(root / "gguf-py")):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    import conversion
    import gguf

    _check_origin(gguf)
    return gguf, conversion


def _check_origin(gguf: ModuleType) -> None:
    if not hasattr(gguf, "LazyChunkedTensor"):
        raise MoneError(
            f"the installed gguf package ({gguf.__file__}) is older than the pinned llama.cpp: "
            "run `mone-llama build`, which installs the right one"
        )


def _converter_class(conversion: Any, path: Path) -> Any:
    hparams = conversion.ModelBase.load_hparams(path, False)
    try:
        name = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
        return conversion.get_model_class(name)
    except (NotImplementedError, ValueError, KeyError) as error:
        raise MoneError(
            f"llama.cpp has no converter for the model in {path}: {first_line(error)} "
            "Only models that llama.cpp can run can be exported"
        ) from None


def _opened_class(
    base: Any,
    gguf: Any,
    lazy_torch: Any,
    n_expert: int,
    select: Select,
    edit: Edit,
    rewrite: Rewrite | None,
) -> Any:
    """Subclass a converter so that `select` and `edit` see every tensor under its GGUF name."""
    edited: set[str] = set()

    def prepare_tensors(self: Any) -> None:
        """Open the way around `modify_tensors` too: the writer gets experts that stay as they are packed."""
        add_tensor = self.gguf_writer.add_tensor

        def add(name: str, tensor: Any, *args: Any, **named: Any) -> None:
            experts = None if name in edited else select(name)
            add_tensor(name, tensor if experts is None else tensor[list(experts)], *args, **named)

        self.gguf_writer.add_tensor = add
        base.prepare_tensors(self)
        self.gguf_writer.add_tensor = add_tensor

    def modify_tensors(self: Any, data: Any, name: str, bid: int | None) -> Any:
        outputs = list(base.modify_tensors(self, data, name, bid))
        for position, (new_name, tensor) in enumerate(outputs):
            experts = select(new_name)
            edited.add(new_name)
            if experts is None:
                yield new_name, edit(new_name, tensor)
                continue
            read_from = range(n_expert) if rewrite else experts
            if tensor._func is torch.stack:  # a checkpoint with one tensor per expert
                single = {expert: tensor._args[0][expert] for expert in read_from}
            elif (
                data.dim() == 3
                and data.shape[0] == n_expert == tensor.shape[0]
                and name in self.model_tensors
            ):
                single = {expert: one_expert(self, name, bid, position, expert) for expert in read_from}
            else:
                yield new_name, tensor[list(experts)]
                continue
            read = reader(single)
            made = rewrite(new_name, read) if rewrite else [partial(read, expert) for expert in experts]
            yield new_name, chunked(made, tensor)

    def one_expert(self: Any, name: str, bid: int | None, position: int, expert: int) -> Any:
        """Convert a single expert of a fused tensor: what the whole conversion would give, for one slice."""
        data = self.model_tensors[name]()[expert : expert + 1]
        if data.dtype not in (torch.float16, torch.float32):
            data = data.to(torch.float32)
        return list(base.modify_tensors(self, data, name, bid))[position][1][0]

    def reader(experts: dict[int, Any]) -> Read:
        def read(expert: int) -> Tensor:
            # taken out, since an evaluated lazy tensor keeps its data
            tensor: Tensor = lazy_torch.to_eager(experts.pop(expert))
            return tensor

        return read

    def chunked(experts: Sequence[Callable[[], Tensor]], whole: Any) -> Any:
        def chunk(expert: Callable[[], Tensor]) -> Any:
            return expert().to(dtype).contiguous().numpy()

        dtype, shape = whole.dtype, (len(experts), *whole.shape[1:])
        chunks = [partial(chunk, expert) for expert in experts]
        return gguf.LazyChunkedTensor(chunks, shape, lazy_torch._dtype_map[dtype])

    # llama.cpp's classes insist that `model_arch` stands in the class body
    body = {"model_arch": base.model_arch}
    body |= {"modify_tensors": modify_tensors, "prepare_tensors": prepare_tensors}
    return type(f"Opened{base.__name__}", (base,), body)


def _cannot_convert(path: Path, error: Exception) -> MoneError:
    return MoneError(f"llama.cpp cannot convert {path}: {first_line(error)}; is the folder complete?")
