"""How llama.cpp runs a model, in llama.cpp's own words: as values, and as options of the commands."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaOptions:
    """llama.cpp's own options; None leaves one to llama.cpp, of threads as many as this process has cores.

    `exact` keeps attention's keys and values in float32, and computes it as PyTorch does; that is slower.
    """

    n_gpu_layers: int | None = None  # -ngl
    n_cpu_moe: int = 0  # --n-cpu-moe
    n_threads: int | None = None  # -t
    n_batch: int = 2048  # -b
    n_ubatch: int = 512  # -ub
    exact: bool = False

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "LlamaOptions":
        """Return those among the values of a command's options, which have their names."""
        return cls(**{name: values[name] for field in fields(cls) if (name := field.name) in values})


def add_llama_options(add: Callable[..., Any]) -> None:
    """Add how llama.cpp runs a GGUF to a command: `add` is called as `add_argument` of argparse."""
    add(
        "-ngl",
        "--n-gpu-layers",
        type=int,
        metavar="N",
        help="of a GGUF: layers that llama.cpp runs on the GPU (default: its own choice)",
    )
    add(
        "--n-cpu-moe",
        type=int,
        default=0,
        metavar="N",
        help="so many of them keep their experts on the CPU",
    )
    add("-t", "--n-threads", "--threads", type=int, metavar="N", help="of a GGUF: threads of llama.cpp")
    add("-b", "--n-batch", "--batch-size", type=int, default=2048, metavar="N", help="tokens of a batch")
    add(
        *("-ub", "--n-ubatch", "--ubatch-size"),
        type=int,
        default=512,
        metavar="N",
        help="tokens that llama.cpp computes at a time (default 512)",
    )
