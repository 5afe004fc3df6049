"""What there is to say about a file, whatever kind it is of: values that a table, a card or JSON shows."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Kind = Literal["gguf", "checkpoint", "statistics", "plan"]


@dataclass(frozen=True, slots=True)
class LayerAnatomy:
    """A layer with routed experts: how many have which fate, named as in `Plan.fates`.

    `norms` are the smallest, the median and the largest Euclidean norm of the layer's novices; None where
    it has none, or the file does not hold them. `seen` is how many experts a calibration saw.
    """

    layer: int
    fates: Mapping[str, int]
    norms: tuple[float, float, float] | None = None
    seen: int | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a model takes while it runs: its weights, and (about) its cache of `n_ctx` tokens.

    `n_layer` layers cache, `n_window` of them only a window. `is_upper` says that some may cache less than is
    counted here: llama.cpp, not the file, says which layers have a window.
    """

    n_ctx: int
    weights: int
    cache: int
    n_layer: int
    n_window: int = 0
    is_upper: bool = False


@dataclass(frozen=True, slots=True)
class Saving:
    """About how large the file would be with a share of its experts replaced by constants, in a type."""

    ratio: float
    outtype: str
    size: int


@dataclass(frozen=True, slots=True)
class Anatomy:
    """A file: what model it is or is of, what is in its layers, where its bytes are, how it was made.

    Sizes are in bytes. `n_byte` and `types` divide the tensors' bytes by what they are for, and by type.
    `needs` says which llama.cpp runs it: `any`, or `patched`; empty for what is no model in llama.cpp's form.
    `command` makes the file again; empty where it does not say.
    """

    kind: Kind
    name: str
    arch: str
    size: int
    n_layer: int
    n_expert: int
    top_k: int
    hidden_size: int
    expert_size: int
    layers: tuple[LayerAnatomy, ...]
    n_ctx_train: int | None = None
    file_type: str = ""
    needs: str = ""
    n_byte: Mapping[str, int] = field(default_factory=dict)
    types: Mapping[str, int] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)
    memory: Memory | None = None
    savings: tuple[Saving, ...] = ()
    command: str = ""

    @property
    def fates(self) -> dict[str, int]:
        """How many experts of the whole model have which fate."""
        total: dict[str, int] = {}
        for layer in self.layers:
            for fate, n in layer.fates.items():
                total[fate] = total.get(fate, 0) + n
        return total

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self) | {"fates": self.fates}
