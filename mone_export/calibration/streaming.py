"""A model larger than the memory: its decoder layers come one at a time, and all rows go through each.

No family's forward pass is written again here. To run layer i, the model's own forward pass runs while all
its other decoder layers answer at once: those before i with what layer i - 1 gave for these rows, those
after it with what layer i gives now. So every layer gets the masks, the position embeddings and the rest
that its model makes for it; making them again for every layer costs next to nothing. Only what decoder layers
hand to each other is kept between layers, row by row, so that it can be cut into other batches, written to
disk, and taken up again by another process.

The weights of a layer go through transformers' own conversion (fused experts, renamed keys): these functions
are no stable interface, so the version of transformers is pinned. Only the stacking of experts, which is most
of the bytes, is done here: each is read when its place is known, into memory that an earlier layer had.
"""

import gc
import json
from collections.abc import Iterable, Iterator, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from transformers import PreTrainedModel

from mone_export.errors import MoneError
from mone_export.source.shape import expert_modules
from mone_export.source.weights import open_weights, weight_files
from mone_export.transformers_internals import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    make_buffers,
    reading,
    rename_source_key,
)

_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # a file's types: ours

State = tuple[Any, dict[str, dict[Any, Any]]]  # a layer's output, and what it put into mappings it was given


class LayerFiles:
    """The weights of a checkpoint, read into a model that has none, one decoder layer at a time."""

    def __init__(
        self, path: Path, module: PreTrainedModel, *, device: str, dtype: torch.dtype, quantizer: Any = None
    ) -> None:
        """Take a model built on the meta device; read all of it except the decoder layers."""
        self._path, self._module = path, module
        self._weights = open_weights(path)
        self._places = _places(path)
        self._loading = reading(module, dtype=dtype, device=device, quantizer=quantizer)
        self._memory = _Memory(device)
        self._stacked = _stack_at_once(self._loading.weight_mapping, self._memory)
        list_name, self.layers = decoder_layers(module)
        self._blank = [layer.state_dict() for layer in self.layers]
        self._late: set[str] = set()  # keys that are read while their experts are stacked
        self._keys = self._grouped(list_name)
        make_buffers(module, device)
        self._read(self._keys[-1])

    def load(self, number: int) -> None:
        """Bring layer `number` into memory, on the model's device."""
        self._read(self._keys[number])
        for name, tensor in self.layers[number].state_dict().items():
            if tensor.is_meta:
                raise MoneError(f"{self._path} lacks {name} of layer {number}: get it again")

    def release(self, number: int) -> None:
        """Give the memory of layer `number` back."""
        self._memory.give(self.layers[number].state_dict().values())
        self.layers[number].load_state_dict(self._blank[number], assign=True)
        gc.collect()  # but no `give_back`: the next layer wants the same memory

    def each(self, first: int = 0) -> Iterator[int]:
        """Yield layer numbers from `first`, each loaded; the next one is read meanwhile."""
        numbers = range(first, len(self.layers))
        with _without_old_objects(), ThreadPoolExecutor(max_workers=1) as reader:
            coming = reader.submit(self.load, first) if numbers else None
            gone: Future[None] | None = None
            for number in numbers:
                assert coming is not None
                coming.result()
                coming = reader.submit(self.load, number + 1) if number + 1 in numbers else None
                yield number
                if gone:
                    gone.result()
                gone = reader.submit(self.release, number)  # before the one after the next is read
        self._memory.clear()

    def _grouped(self, list_name: str) -> dict[int, dict[str, list[str]]]:
        """Return for each layer, and at -1 for the rest of the body, the checkpoint's keys by target."""
        mapping = self._loading.weight_mapping or []
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        known, body = self._module.state_dict(), self._module.base_model
        prefix = next(name for name, module in self._module.named_modules() if module is body)
        keys: dict[int, dict[str, list[str]]] = {number: {} for number in range(-1, len(self.layers))}
        for key in self._weights:
            target, pattern = rename_source_key(
                key, renamings, converters, self._module.base_model_prefix, known
            )
            if pattern in self._stacked:
                self._late.add(key)
            if target.startswith(f"{list_name}."):
                number = int(target.removeprefix(f"{list_name}.").split(".")[0])
                # blocks after the last layer, which predict further tokens, have no place in the model
                keys.get(number, {}).setdefault(target, []).append(key)
            elif target.startswith(prefix):
                keys[-1].setdefault(target, []).append(key)
        return keys

    def _read(self, targets: dict[str, list[str]]) -> None:
        for keys in targets.values():  # one at a time: what a conversion needs besides is soon free again
            slices = {key: self._weights[key].get_slice(key) for key in keys}
            for key in self._late.intersection(keys):
                slices[key] = _Unread(slices[key], *self._places[key])
            self._convert(slices)

    def _convert(self, slices: dict[str, Any]) -> None:
        found, _ = convert_and_load_state_dict_in_model(self._module, slices, self._loading)
        if wrong := [*found.mismatched_keys, *found.conversion_errors, *found.error_msgs]:
            raise MoneError(f"cannot read the weights in {self._path}: {wrong[0]} does not fit the model")


@contextmanager
def _without_old_objects() -> Iterator[None]:
    """Let Python's collector, which runs after every layer, skip the objects that are there already."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _Unread:
    """A slice of a file that transformers takes for a tensor, and that is read only when it is stacked."""

    def __init__(self, part: Any, file: FileIO, start: int) -> None:
        """Take what is in `file` from byte `start` on."""
        self._part, self._file, self._start = part, file, start
        self._dtype: torch.dtype | None = None
        self.shape = torch.Size(part.get_shape())

    def __getitem__(self, _index: Any) -> "_Unread":
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> "_Unread":
        self._dtype = dtype
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The type it is wanted in."""
        return self._dtype or _TYPES.get(self._part.get_dtype()) or self._part[:0].dtype

    def read_into(self, place: Tensor) -> None:
        """Read from the file to where the tensor belongs, with no copy between if it has the file's type."""
        if self.dtype != _TYPES.get(self._part.get_dtype()) or not place.is_contiguous():
            place.copy_(self._part[...])
            return
        octets: Any = place.view(torch.uint8).numpy()
        view = memoryview(octets).cast("B")
        self._file.seek(self._start)  # one thread reads at a time
        while len(view):
            n_read = self._file.readinto(view)
            if not n_read:
                raise MoneError(f"{self._file.name} ends early: get it again")
            view = view[n_read:]


def _places(path: Path) -> dict[str, tuple[FileIO, int]]:
    """Return each tensor's open file and first byte; safetensors itself reads into new memory only.

    Source: the format, a header of JSON after its length in eight bytes, then the data.
    """
    places: dict[str, tuple[FileIO, int]] = {}
    for name in weight_files(path):
        file = FileIO(name)
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        places |= {
            key: (file, 8 + size + entry["data_offsets"][0])
            for key, entry in header.items()
            if key != "__metadata__"
        }
    return places


class _Memory:
    """Tensors for the experts of layer after layer: fresh memory for each would cost as much as reading."""

    def __init__(self, device: str) -> None:
        self._on_cpu = torch.device(device).type == "cpu"
        self._free: dict[tuple[Any, ...], list[Tensor]] = {}
        self._lent: dict[int, Tensor] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return memory on the CPU; for a GPU always the same, since what it held has been copied."""
        free = self._free.setdefault((shape, dtype), [])
        if not self._on_cpu:
            if not free:
                free.append(torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_available()))
            return free[0]
        tensor = free.pop() if free else torch.empty(shape, dtype=dtype)
        self._lent[tensor.data_ptr()] = tensor
        return tensor

    def give(self, tensors: Iterable[Tensor]) -> None:
        """Take back what a layer does not need any more."""
        for tensor in tensors:
            lent = None if tensor.is_meta else self._lent.pop(tensor.data_ptr(), None)
            if lent is not None:
                self._free[tuple(lent.shape), lent.dtype].append(lent)

    def clear(self) -> None:
        """Give all of it back to the machine."""
        self._free.clear()
        self._lent.clear()


class _Stack(ConversionOps):
    """`MergeModulelist`, and `Concatenate` along `dim` after it, in one copy of each expert."""

    def __init__(self, dim: int, memory: _Memory) -> None:
        self._dim, self._memory = dim, memory

    def __deepcopy__(self, _memo: Any) -> "_Stack":
        return self

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, list[_Unread]],
        source_patterns: list[str],
        target_patterns: list[str],
        **_: Any,
    ) -> dict[str, Tensor]:
        """Return the stack [M, ...] of all experts."""
        groups = [input_dict.pop(pattern) for pattern in source_patterns if pattern in input_dict]
        widths = [group[0].shape[self._dim - 1] for group in groups]
        shape = [len(groups[0]), *groups[0][0].shape]
        shape[self._dim] = sum(widths)
        stack, start = self._memory.take(tuple(shape), groups[0][0].dtype), 0
        for group, width in zip(groups, widths, strict=True):
            part = stack.narrow(self._dim, start, width)
            for expert, unread in enumerate(group):
                unread.read_into(part[expert])
            start += width
        return {target_patterns[0]: stack}


def _stack_at_once(mapping: Any, memory: _Memory) -> set[str]:
    """Let `_Stack` do what it can of a conversion; returns the patterns of the keys it does it for."""
    patterns = set()
    for entry in mapping or ():
        kinds = [type(operation) for operation in getattr(entry, "operations", ())]
        if kinds not in ([MergeModulelist], [MergeModulelist, Concatenate]) or len(entry.target_patterns) > 1:
            continue
        merge, *rest = entry.operations
        dim = rest[0].dim if rest else 1
        if merge.dim == 0 and dim > 0:
            entry.operations, entry.force_cpu = [_Stack(dim, memory)], True
            patterns.update(entry.source_patterns)
    return patterns


def decoder_layers(module: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the list of decoder layers of a model with routed experts, and its name."""
    experts = next(iter(expert_modules(module)))[1]
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and any(part is experts for part in child.modules()):
            return name, child
    raise MoneError(f"{type(module).__name__} has no list of decoder layers: pass --stream off")


@contextmanager
def only_layer(layers: nn.ModuleList, number: int) -> Iterator["Turn"]:
    """Let layer `number` compute, and all others pass on."""
    turn = Turn(layers[number].forward)
    try:
        for other, layer in enumerate(layers):
            layer.forward = turn.compute if other == number else turn.pass_on
        yield turn
    finally:
        for layer in layers:
            del layer.forward


class Turn:
    """What the decoder layers do while it is one layer's turn."""

    def __init__(self, forward: Any) -> None:
        """Take the forward pass of the layer whose turn it is."""
        self._forward = forward
        self.state: State | None = None  # what the layer before gave, then what this one does

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer, and keep what it hands on; stands in for its forward pass."""
        shared = {name: value for name, value in kwargs.items() if isinstance(value, MutableMapping)}
        carried = self.state[1] if self.state else {}
        for name, entries in carried.items():
            shared[name].update(entries)
        before = {name: dict(value) for name, value in shared.items()}
        output = self._forward(*args, **kwargs)
        for name, value in shared.items():
            news = {key: entry for key, entry in value.items() if before[name].get(key) is not entry}
            if news:
                carried = carried | {name: carried.get(name, {}) | news}
        self.state = output, carried
        return output

    def pass_on(self, *_args: Any, **_kwargs: Any) -> Any:
        """Return at once what was handed on; stands in for the other layers' forward passes."""
        assert self.state is not None
        return self.state[0]


class RowStates:
    """What decoder layers hand on, row by row: kept in memory, or in a folder, one file per row and layer."""

    def __init__(self, folder: Path | None = None) -> None:
        """Keep states in memory, or in `folder`, where those of an earlier process are found again."""
        self._folder = folder
        self._kept: dict[tuple[int, int], State] = {}
        if folder:
            folder.mkdir(parents=True, exist_ok=True)

    def put(self, layer: int, start: int, state: State) -> None:
        """Keep what layer `layer` gave for the rows from `start` on; replaces what memory holds for them."""
        leaves, shape = tree_flatten(tree_map(_to_cpu, state))
        n_row = max(len(leaf) for leaf in leaves if isinstance(leaf, Tensor))
        for row in range(n_row):
            own = [leaf[row : row + 1] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            if self._folder:
                own = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in own]
                torch.save(tree_unflatten(own, shape), self._file(layer, start + row))
            else:
                self._kept.pop((layer - 1, start + row), None)
                self._kept[layer, start + row] = tree_unflatten(own, shape)

    def get(self, layer: int, rows: range, device: torch.device) -> State | None:
        """Return what layer `layer` gave for `rows`, on `device`; None for the layer before the first."""
        if layer < 0:
            return None
        trees = [tree_flatten(self._row(layer, row)) for row in rows]
        leaves = [
            torch.cat(parts).to(device) if isinstance(parts[0], Tensor) else parts[0]
            for parts in zip(*(leaves for leaves, _ in trees), strict=True)
        ]
        state: State = tree_unflatten(leaves, trees[0][1])
        return state

    def copy(self) -> "RowStates":
        """Return the same states, to go on with otherwise; for states in memory, which is not copied."""
        assert self._folder is None
        other = RowStates()
        other._kept = dict(self._kept)
        return other

    def drop(self, layer: int) -> None:
        """Forget what layer `layer` gave."""
        for file in self._folder.glob(f"{layer}-*") if self._folder else ():
            file.unlink()

    def _row(self, layer: int, row: int) -> State:
        state: State = torch.load(self._file(layer, row)) if self._folder else self._kept[layer, row]
        return state

    def _file(self, layer: int, row: int) -> Path:
        assert self._folder
        return self._folder / f"{layer}-{row}.pt"


def _to_cpu(leaf: Any) -> Any:
    return leaf.cpu() if isinstance(leaf, Tensor) else leaf
