"""llama.cpp's converter class for a model, with a seam in it: each tensor can be cut down or edited."""

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mone_export.artifacts import MoeSpec
from mone_export.errors import MoneError, first_line
from mone_export.lazily import Tensor, torch
from mone_export.source.naming import card_folder, completed
from mone_export.source.weights import NOVICE

LARGE = 2**24  # weights of a matrix that is read some rows at a time, a sixteenth of this many
Read = Callable[[int], Tensor]  # original expert id -> its matrix [out, in]; once for each expert


@dataclass(frozen=True, slots=True)
class Rows:
    """What an axis of experts consists of after an edit: entries of the tensor's own, then others of ours.

    `some` names, for the first of the others, an entry of the tensor's own and which of its values begin it.
    """

    own: Sequence[int]
    others: np.ndarray | None = None  # float32 [n, ...]
    some: Sequence[tuple[int, np.ndarray]] = ()

    def filled(self, values: Callable[[], np.ndarray]) -> np.ndarray | None:
        """Return the others, with what they take of the tensor's own values [n_expert, ...]."""
        if self.others is None or not self.some:
            return self.others
        own, found = values(), self.others.copy()
        for row, (expert, places) in zip(found, self.some, strict=False):
            row[: len(places)] = own[expert][places]
        return found


@dataclass(frozen=True, slots=True)
class Derived:
    """A further tensor of experts, made of some of another tensor's: each of `experts` gives a matrix."""

    name: str
    experts: Sequence[int]
    shape: tuple[int, int]  # [out, in] of each
    rows: Callable[[int], np.ndarray] | None  # the rows of the original that an expert keeps as they are
    make: Callable[[int, Tensor], Tensor]  # from an expert's number and its matrix [out, in]


class Packing(Protocol):
    """What rounds tensors to other types while they are written."""

    @property
    def types(self) -> Mapping[str, str]:
        """The type of each tensor of the file, by its name."""

    def packed(
        self, name: str, kind: str, shape: Sequence[int], parts: Iterable[np.ndarray]
    ) -> Iterator[np.ndarray]:
        """Yield the bytes of a tensor in its type.

        `parts` have whole rows of it, of a `shape` in numpy's order: uint8, packed as `kind`, or float32, to
        be packed so first.
        """


class Edits(Protocol):
    """What becomes of a model's tensors, by their GGUF names."""

    @property
    def spec(self) -> MoeSpec:
        """The shape of the model."""

    @property
    def rewrites(self) -> bool:
        """Whether the selected experts are made by `rewrite`, not copied."""

    def select(self, name: str) -> Sequence[int] | None:
        """Return the experts to keep of a tensor of matrices, None for any other tensor.

        Where there are none, one that is `derived` has the tensor's name.
        """

    def derived(self, name: str, shape: Sequence[int]) -> Sequence[Derived]:
        """Return the tensors to add that are made of a tensor of matrices, of a shape [n_expert, out, in]."""

    def rows(self, name: str, shape: Sequence[int]) -> Rows | None:
        """Return what a tensor with an entry for each expert becomes, None for one that stays as it is."""

    def edit(self, name: str, tensor: Tensor) -> Tensor:
        """Return what is written in place of a tensor (lazy) that `select` does not choose from."""

    def rewrite(self, name: str, read: Read) -> Sequence[Callable[[], Tensor]]:
        """Return what makes each expert to write, called once and in order, from the original ones."""


class Opened:
    """Comes before a converter's own class, `base`; `opened_class` joins the two.

    Expert tensors are read, converted and written one expert at a time, so that memory does not grow with
    the layer.
    """

    # what opened_class sets
    base: Any
    library: Any  # gguf
    lazy_tensor: Any  # llama.cpp's class of tensors without data
    edits: Edits
    model_id: str  # the model's name, or its id on the hub
    left_out: Collection[str]  # tensors of the checkpoint

    # the converter's own
    dir_model: Path
    dir_model_card: Path
    gguf_writer: Any
    metadata: Any
    model_tensors: dict[str, Callable[[], Any]]

    def __init__(self, *args: Any, **named: Any) -> None:
        """Open the model as the converter does."""
        self._edited: set[str] = set()
        self.base.__init__(self, *args, **named)

    @classmethod
    def filter_tensors(cls, item: tuple[str, Any]) -> Any:
        """Leave tensors out by the names they have in the checkpoint, and constants: they come as edits."""
        out = item[0] in cls.left_out or item[0].endswith(NOVICE)
        return None if out else cls.base.filter_tensors.__func__(cls, item)

    def prepare_tensors(self) -> None:
        """Cut down what goes around `modify_tensors` too: experts that stay as they are packed."""
        add_tensor = self.gguf_writer.add_tensor
        self.gguf_writer.add_tensor = partial(self._add, add_tensor)
        self.base.prepare_tensors(self)
        self.gguf_writer.add_tensor = add_tensor

    def modify_tensors(self, data: Any, name: str, bid: int | None) -> Iterator[tuple[str, Any]]:
        """Give what the converter makes of a tensor, edited, or with the selected experts only."""
        for position, (new_name, tensor) in enumerate(list(self.base.modify_tensors(self, data, name, bid))):
            experts = self.edits.select(new_name)
            self._edited.add(new_name)
            if experts is None:
                edited = self.edits.edit(new_name, tensor)
                yield new_name, self._by_rows(edited) if edited is data else edited
                continue
            one = self._one_by_one(data, tensor, (name, bid, position))
            if experts:
                yield (
                    new_name,
                    self._chunked(new_name, tensor, one, experts) if one else tensor[list(experts)],
                )
            for new in self.edits.derived(new_name, tensor.shape):
                self._edited.add(new.name)
                yield new.name, self._derived(new, tensor, one or tensor.__getitem__)

    def set_vocab(self) -> None:
        """Write the tokenizer; what is wrong with it is said to be wrong with it."""
        try:
            self.base.set_vocab(self)
        except MoneError:
            raise
        except (Exception, SystemExit) as error:  # tokenizers, sentencepiece and upstream's own
            raise MoneError(
                f"llama.cpp cannot convert the tokenizer in {self.dir_model}: "
                f"{cause(self.dir_model, error)}; get the tokenizer's files again"
            ) from None

    def prepare_metadata(self, vocab_only: bool) -> None:
        """Collect all keys, from a folder that is called as the model."""
        with card_folder(self.dir_model, self.model_id, self.library.Metadata) as self.dir_model_card:
            self.base.prepare_metadata(self, vocab_only=vocab_only)

    def set_type(self) -> None:
        """Complete the metadata: the converter calls this when it has them, before it writes them."""
        self.metadata = completed(self.metadata, self.model_id)
        self.base.set_type(self)

    def _add(self, add_tensor: Callable[..., None], name: str, tensor: Any, *args: Any, **named: Any) -> None:
        experts = None if name in self._edited else self.edits.select(name)
        add_tensor(name, tensor if experts is None else tensor[list(experts)], *args, **named)

    def _one_by_one(
        self, data: Any, tensor: Any, source: tuple[str, int | None, int]
    ) -> Callable[[int], Any] | None:
        """Return what gives a single (lazy) expert of a tensor, None where it can only be had whole."""
        if tensor._func is torch.stack:  # a checkpoint with one tensor per expert
            single: Callable[[int], Any] = tensor._args[0].__getitem__
            return single
        n_expert = self.edits.spec.n_expert
        fused = len(data.shape) == 3 and data.shape[0] == n_expert == tensor.shape[0]
        return partial(self._one_expert, *source) if fused and source[0] in self.model_tensors else None

    def _one_expert(self, name: str, bid: int | None, position: int, expert: int) -> Any:
        """Convert a single expert of a fused tensor: what the whole conversion would give, for one slice."""
        whole = self.model_tensors[name]()
        stored = self._stored(whole)
        data = whole[expert : expert + 1] if stored is None else self._slice(stored, expert, expert + 1)
        if data.dtype not in (torch.float16, torch.float32):
            data = data.to(torch.float32)
        return list(self.base.modify_tensors(self, data, name, bid))[position][1][0]

    def _by_rows(self, tensor: Any) -> Any:
        """Return a matrix that is read and written some rows at a time, where it is large and as in its file.

        A vocabulary's embeddings take several times their bytes otherwise.
        """
        if len(tensor.shape) != 2 or math.prod(tensor.shape) < LARGE:
            return tensor
        if not isinstance(tensor, self.lazy_tensor):
            return tensor
        # by identity: two lazy tensors that are compared are read
        cast = len(tensor._args) == 2 and tensor._args[1] is torch.float32
        stored = self._stored(tensor._args[0] if cast else tensor)
        if stored is None:
            return tensor
        n_row, n_column = stored.shape
        step = max(1, LARGE // 16 // n_column)
        parts = {at: self._slice(stored, at, min(at + step, n_row)) for at in range(0, n_row, step)}
        made = [partial(_read, self.lazy_tensor, parts, at) for at in parts]
        return self._lazy(made, tensor.shape, tensor.dtype)

    def _stored(self, tensor: Any) -> Any:
        """Return where a tensor lies in a file, None for one that was made of others."""
        stored = tensor._args[0] if isinstance(tensor, self.lazy_tensor) and tensor._args else None
        return stored if isinstance(stored, self.library.utility.LocalTensor) else None

    def _slice(self, stored: Any, first: int, end: int) -> Any:
        """Return a part of a tensor of a file (lazy) along its first axis: nothing else is read."""
        n_byte = stored.data_range.size // stored.shape[0]
        start, size = stored.data_range.offset + first * n_byte, (end - first) * n_byte
        place = replace(stored.data_range, offset=start, size=size)
        return self.lazy_tensor.from_local_tensor(
            replace(stored, shape=(end - first, *stored.shape[1:]), data_range=place)
        )

    def _chunked(self, name: str, whole: Any, one: Callable[[int], Any], experts: Sequence[int]) -> Any:
        """Return a tensor that is made expert by expert while it is written."""
        rewrites = self.edits.rewrites
        single = {e: one(e) for e in (range(self.edits.spec.n_expert) if rewrites else experts)}
        read = partial(_read, self.lazy_tensor, single)
        made = self.edits.rewrite(name, read) if rewrites else [partial(read, e) for e in experts]
        return self._lazy(made, (len(made), *whole.shape[1:]), whole.dtype)

    def _derived(self, new: Derived, whole: Any, one: Callable[[int], Any]) -> Any:
        """Return a further tensor, made expert by expert while it is written."""
        read = partial(_read, self.lazy_tensor, {expert: one(expert) for expert in new.experts})
        made = [partial(_made, new, read, expert) for expert in new.experts]
        return self._lazy(made, (len(made), *new.shape), whole.dtype)

    def _lazy(self, made: Sequence[Callable[[], Tensor]], shape: Sequence[int], dtype: Any) -> Any:
        chunks = [partial(_chunk, part, dtype) for part in made]
        return self.library.LazyChunkedTensor(chunks, tuple(shape), self.lazy_tensor._dtype_map[dtype])


def opened_class(kind: type[Opened], base: Any, **settings: Any) -> type[Opened]:
    """Join `Opened`, or a kind of it, to a converter's class; `settings` are attributes of both."""
    # llama.cpp's classes insist that `model_arch` stands in the class body
    body = {"model_arch": base.model_arch, "base": base, **settings}
    return type(f"Opened{base.__name__}", (kind, base), body)


def cause(path: Path, error: BaseException) -> str:
    """Return what to say of an error that a foreign library raised over a model's folder."""
    for file in sorted(path.glob("*.json")):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as unreadable:
            return f"{file.name} cannot be read ({first_line(unreadable)})"
    if isinstance(error, KeyError) and error.args and "." not in str(error.args[0]):
        return f"its config states no {first_line(error)}"
    named = type(error) in (Exception, ValueError, RuntimeError, NotImplementedError, OSError)
    return first_line(error) if named else f"{type(error).__name__}: {first_line(error)}"


def _read(lazy: Any, parts: dict[int, Any], part: int) -> Tensor:
    # taken out, since an evaluated lazy tensor keeps its data
    tensor: Tensor = lazy.to_eager(parts.pop(part))
    return tensor


def _made(new: Derived, read: Read, expert: int) -> Tensor:
    return new.make(expert, read(expert))


def _chunk(part: Callable[[], Tensor], dtype: "torch.dtype") -> np.ndarray:
    array: np.ndarray = part().to(dtype).contiguous().numpy()
    return array
