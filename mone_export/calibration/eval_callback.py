"""The reading seam in llama.cpp: what its eval callback sees of the experts, and may change.

llama.cpp computes a graph of nodes. Before each it asks the callback whether the node matters, computes up to
the first that does, and calls again with the node's values. The experts' outputs before weighting are the
first operand of the product that is called `ffn_moe_weighted`, the routing weights its second; the experts'
numbers are those of the product with `ffn_down_exps` from which these outputs come. The weighting may be done
in place, so the outputs are read, and overwritten by novices, when the callback is asked about it.

Source: `ggml_backend_sched_compute_splits` in `ggml-backend.cpp`, `build_moe_ffn` in `llama-graph.cpp`.
"""

import ctypes
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mone_export.artifacts import InputSums
from mone_export.calibration.input_sums import inputs_name, sums_of_routed, sums_of_rows
from mone_export.errors import MoneError
from mone_export.source.gguf_format import matrix_of, part_of

_DOWN = re.compile(rb"blk\.(\d+)\.ffn_down_exps\.weight")
_WEIGHTED, _LAST_HIDDEN = b"ffn_moe_weighted", b"result_norm"
_N_ROW = 16  # of fewer rows llama.cpp's own importance matrices take no note
_N_CHAINED = 6  # nodes between the experts' last product and their weighting: a scale, a bias
_NUMBERS: Mapping[int, Any] = {0: np.float32, 26: np.int32}  # by ggml_type


class Node(ctypes.Structure):
    """`ggml_tensor` of `ggml.h`: `ne` elements in each dimension, the innermost first, `nb` bytes apart."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )


class Ggml:
    """The few functions of ggml that nodes are read and written by."""

    def __init__(self) -> None:
        """Find the functions; raises `MoneError` where the library's nodes are laid out in another way."""
        from llama_cpp._ggml import libggml

        self._library = libggml
        for name in ("ggml_init", "ggml_new_tensor_2d", "ggml_mul", "ggml_backend_cpu_buffer_type"):
            getattr(libggml, name).restype = ctypes.c_void_p
        libggml.ggml_op_name.restype = ctypes.c_char_p
        libggml.ggml_tensor_overhead.restype = ctypes.c_size_t
        libggml.ggml_backend_buffer_is_host.restype = ctypes.c_bool
        for name in ("ggml_backend_tensor_get", "ggml_backend_tensor_set"):
            getattr(libggml, name).argtypes = (
                ctypes.c_void_p,
                ctypes.c_void_p,
                ctypes.c_size_t,
                ctypes.c_size_t,
            )
        self._check()
        names = {libggml.ggml_op_name(number): number for number in range(64)}
        self.mul, self.repeat, self.mul_mat, self.mul_mat_id = (
            names[name] for name in (b"MUL", b"REPEAT", b"MUL_MAT", b"MUL_MAT_ID")
        )

    def cpu_buffer_type(self) -> int:
        """Return the type of buffers in main memory."""
        return int(self._library.ggml_backend_cpu_buffer_type())

    def values(self, address: int) -> np.ndarray[Any, Any]:
        """Return a node's values, the outermost dimension first: themselves in main memory, else a copy."""
        node = Node.from_address(address)
        dtype = _NUMBERS[node.type]
        if 0 in node.ne:  # a last layer's, of tokens whose logits nobody asked for
            return np.empty(tuple(node.ne)[::-1], dtype)
        n_byte = self._n_byte(node)
        if self.is_host(node):
            buffer: Any = (ctypes.c_char * n_byte).from_address(node.data)
        else:
            buffer = np.empty(n_byte, dtype=np.uint8)
            self._library.ggml_backend_tensor_get(address, buffer.ctypes.data, 0, n_byte)
        return np.ndarray(tuple(node.ne)[::-1], dtype, buffer, strides=tuple(node.nb)[::-1])

    def store(self, address: int, values: np.ndarray[Any, Any]) -> None:
        """Put values that `values` gave, and that were changed, in the node's place."""
        node = Node.from_address(address)
        if not self.is_host(node):
            self._library.ggml_backend_tensor_set(address, values.ctypes.data, 0, self._n_byte(node))

    def is_host(self, node: Node) -> bool:
        """Return whether a node lies in main memory."""
        buffer = Node.from_address(node.view_src).buffer if node.view_src else node.buffer
        return bool(self._library.ggml_backend_buffer_is_host(ctypes.c_void_p(buffer)))

    def _n_byte(self, node: Node) -> int:
        item: int = np.dtype(_NUMBERS[node.type]).itemsize
        return item + sum(int(n - 1) * int(apart) for n, apart in zip(node.ne, node.nb, strict=True))

    def _check(self) -> None:
        """Make a node, and look at it as `Node` says."""
        ggml = self._library

        class Params(ctypes.Structure):
            _fields_ = (
                ("mem_size", ctypes.c_size_t),
                ("mem_buffer", ctypes.c_void_p),
                ("no_alloc", ctypes.c_bool),
            )

        context = ctypes.c_void_p(ggml.ggml_init(Params(8 * ggml.ggml_tensor_overhead(), None, True)))
        sizes = ctypes.c_int64(3), ctypes.c_int64(5)
        one, other = (ctypes.c_void_p(ggml.ggml_new_tensor_2d(context, 26, *sizes)) for _ in range(2))
        product = ctypes.c_void_p(ggml.ggml_mul(context, one, other))
        ggml.ggml_set_name(product, b"product")
        node = Node.from_address(product.value or 0)
        found = (node.type, *node.ne, *node.nb, *node.src[:3], node.data, node.name)
        fits = found == (26, 3, 5, 1, 1, 4, 12, 60, 60, one.value, other.value, None, None, b"product")
        named = fits and ggml.ggml_op_name(node.op) == b"MUL"
        ggml.ggml_free(context)
        if not named:
            raise MoneError(
                "this llama.cpp is not the one that belongs to this mone-export (its nodes are laid out in "
                "another way): run `mone-llama build`"
            )


@cache
def ggml() -> Ggml:
    """Return the functions of ggml, found once."""
    return Ggml()


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """What one layer's experts did for a batch of tokens; `outputs` may be no longer there after the call."""

    ids: Tensor  # int64 [n_token, top_k], the experts
    gates: Tensor  # float32 [n_token, top_k], what multiplies their outputs
    outputs: Tensor  # float32 [n_token, top_k, d], before weighting
    channels: Tensor | None = None  # float32 [n_token, top_k, I], what goes into the last product


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """Novices in the place of a layer's pruned experts."""

    gone: np.ndarray[Any, Any]  # bool [n_expert]
    novices: np.ndarray[Any, Any]  # float32 [n_expert, d]

    def apply(self, ids: np.ndarray[Any, Any], outputs: np.ndarray[Any, Any]) -> None:
        """Overwrite the outputs [n_token, top_k, d] of pruned experts, ids [n_token, top_k]."""
        hit = self.gone[ids]
        outputs[hit] = self.novices[ids[hit]]


@dataclass(frozen=True, slots=True, eq=False)
class Tap:
    """What is done with the nodes of a run: layers to see, and where novices stand in after that."""

    layers: Collection[int] = ()
    see: Callable[[int, Routed], None] | None = None  # what `layers` did, by layer number
    masks: Mapping[int, Mask] = field(default_factory=dict)
    inputs: Callable[[str, InputSums], None] | None = None  # of the layers' matrices, by name
    hidden: Callable[[Tensor], None] | None = None  # last hidden states float32 [n_token, d]
    until: int | None = None  # the layer after whose experts the run ends; None: after the last hidden states
    logits: bool = False  # nothing ends the run
    channels: bool = False  # `see` gets them, too
    route: Callable[[int, Tensor], None] | None = None  # in place of `see`: slots int64 [n_token, top_k]


class EvalCallback:
    """Does what a `Tap` says while llama.cpp computes; to be called as its `cb_eval`.

    An exception ends the run and stays in `error`. A run ends by breaking off the part of the graph that is
    being computed; of every later part one node is run, which is made to do nothing.
    """

    def __init__(self) -> None:
        """Begin with a tap that does nothing."""
        self._ggml = ggml()
        self._layers: dict[bytes, int | None] = {}  # by the name of their matrix
        self.begin(Tap())

    def begin(self, tap: Tap) -> None:
        """Get ready for a batch."""
        self._tap = tap
        self.error: BaseException | None = None
        self.seen: list[int] = []  # layers whose experts came by
        self._ended = self.interrupted = False
        self._copied = False  # experts go from main memory to a device, by ids that must have been computed
        self._inputs_weighted = False
        self._channels: Tensor | None = None  # of the layer whose outputs come next
        self._pending: tuple[int, int, np.ndarray[Any, Any]] | None = None  # layer, address, ids
        self._silenced: tuple[Node, int] | None = None  # a node, and what it would have done

    def interrupt(self) -> None:
        """End the run from another thread."""
        self.interrupted = True

    def __call__(self, address: int, ask: bool, _: object) -> bool:
        """Say whether a node matters or, after it was computed, whether to go on."""
        node = Node.from_address(address)
        try:
            self._ended = self._ended or self.interrupted
            if not self._ended:
                matters = self._asked(address, node) if ask else self._computed(address, node)
            if not self._ended:
                return matters
        except BaseException as error:
            self.error, self._ended = error, True
        return self._after_end(node, ask)

    def _asked(self, address: int, node: Node) -> bool:
        name: bytes = node.name
        if node.op == self._ggml.mul and name.startswith(_WEIGHTED):
            self._weighted(node)
        if self._pending:
            return True
        if self._hears(node):
            return True
        if node.op == self._ggml.mul_mat_id:
            return self._wanted_layer(node) is not None
        return name == _LAST_HIDDEN and not self._tap.logits

    def _computed(self, address: int, node: Node) -> bool:
        if self._tap.inputs and self._hears(node):
            self._hear_inputs(node, self._tap.inputs)
        if node.op == self._ggml.mul_mat_id and (layer := self._wanted_layer(node)) is not None:
            # read now: nothing keeps them until the outputs are weighted
            ids = self._ggml.values(node.src[2])[0, 0].astype(np.int64)
            if self._tap.route:
                self.seen.append(layer)
                self._tap.route(layer, torch.from_numpy(ids))
                return True
            if self._tap.channels:
                self._channels = torch.from_numpy(self._ggml.values(node.src[1])[0].copy())
            if self._inputs_weighted:
                self._take(layer, ids, np.ones(ids.shape, dtype=np.float32), address)
            else:
                self._pending = layer, address, ids
        elif node.name == _LAST_HIDDEN:
            if self._tap.hidden:
                self._tap.hidden(torch.from_numpy(self._ggml.values(address)[0, 0]))
            self._ended = True
        return True

    def _hears(self, node: Node) -> bool:
        """Return whether the inputs of a product are wanted: those of experts' gates are of their ups."""
        if self._tap.inputs is None or node.op not in (self._ggml.mul_mat, self._ggml.mul_mat_id):
            return False
        name, inputs = _name_of(node), Node.from_address(node.src[1])
        if node.op == self._ggml.mul_mat_id:
            return not part_of(name) or matrix_of(name) != "gate"
        return name.startswith("blk.") and inputs.type == 0 and inputs.ne[1] >= _N_ROW

    def _hear_inputs(self, node: Node, hear: Callable[[str, InputSums], None]) -> None:
        name = inputs_name(_name_of(node))
        matrix, inputs = Node.from_address(node.src[0]), torch.from_numpy(self._ggml.values(node.src[1]))
        if node.op == self._ggml.mul_mat_id:
            ids = torch.from_numpy(self._ggml.values(node.src[2])[0, 0].astype(np.int64))
            hear(name, sums_of_routed(inputs[0], ids, matrix.ne[2]))
        else:
            hear(name, sums_of_rows(inputs.flatten(0, 1), matrix.ne[2] * matrix.ne[3]))

    def _weighted(self, node: Node) -> None:
        """Take the layer whose outputs are weighted here; or note that the inputs of the next are."""
        address = node.src[0]
        self._inputs_weighted = Node.from_address(address).op == self._ggml.repeat
        if self._pending:
            layer, down, ids = self._pending
            outputs = address
            for _ in range(_N_CHAINED):
                if address == down:
                    self._pending = None
                    self._take(layer, ids, self._ggml.values(node.src[1])[0, :, :, 0], outputs)
                    return
                address = Node.from_address(address).src[0]
                if not address:
                    return

    def _take(self, layer: int, ids: np.ndarray[Any, Any], gates: np.ndarray[Any, Any], address: int) -> None:
        values, tap = self._ggml.values(address), self._tap
        outputs = values[0]
        self.seen.append(layer)
        if tap.see and layer in tap.layers:
            own = [torch.from_numpy(each) for each in (ids, gates, outputs)]
            tap.see(layer, Routed(own[0], own[1], own[2], self._channels))
        if layer in tap.masks:
            tap.masks[layer].apply(ids, outputs)
            self._ggml.store(address, values)
        self._inputs_weighted = False
        self._ended = layer == tap.until

    def _wanted_layer(self, node: Node) -> int | None:
        """Return the layer of a product with its experts' last matrices, if that layer is wanted."""
        name: bytes = Node.from_address(node.src[0]).name
        if name not in self._layers:
            found = _DOWN.search(name)
            self._layers[name] = int(found[1]) if found else None
        layer = self._layers[name]
        self._copied = self._copied or b"#" in name
        return layer if layer in self._tap.layers or layer in self._tap.masks else None

    def _after_end(self, node: Node, ask: bool) -> bool:
        """Let nothing more be computed; or all, where the next part's inputs could not be copied without."""
        if self._copied:
            return not ask
        if ask:
            self._silenced = node, node.op
            node.op = 0  # GGML_OP_NONE; the graph may be used again
        elif self._silenced:
            silenced, op = self._silenced
            silenced.op = op
            self._silenced = None
        return ask


def _name_of(node: Node) -> str:
    """Return the name of the matrix of a product; copies on a device are called `CUDA0#name#0`."""
    name: bytes = Node.from_address(node.src[0]).name
    return (name.split(b"#")[1] if b"#" in name else name).decode()
