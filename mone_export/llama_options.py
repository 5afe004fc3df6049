"""How llama.cpp runs a model, in llama.cpp's own words."""

from dataclasses import dataclass


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
