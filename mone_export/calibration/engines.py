"""What runs a model over text: transformers for a checkpoint, llama.cpp for a GGUF. Nobody else asks which.

An engine measures the unpruned model's experts, and what the model does with novices in place of some.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mone_export.artifacts import Calibration, Corpus, ExpertStats, Plan, Residual
from mone_export.calibration import loading, ranks
from mone_export.calibration.channels import measure_channels
from mone_export.calibration.loading import Model, choose, loaded_experts
from mone_export.calibration.masking import Divergence, measure_residuals, recalibrate
from mone_export.calibration.passes import calibrate
from mone_export.calibration.sensitivity import damage_by_layer
from mone_export.calibration.stability import Watch
from mone_export.calibration.through_llamacpp import LlamaEngine
from mone_export.calibration.work_folder import WorkFolder
from mone_export.errors import MoneError
from mone_export.llama_options import LlamaOptions
from mone_export.runtime import Progress
from mone_export.source import GgufFile, Source, open_source
from mone_export.source.shape import Dtype, Stream

if TYPE_CHECKING:
    from pathlib import Path

Pruned = Mapping[int, Sequence[int]]
Novices = Mapping[int, Tensor]
"""By layer: the experts that are pruned, and what each of all experts would be replaced by, [n_expert, d]."""


@dataclass(frozen=True, slots=True)
class InTorch:
    """A checkpoint's engine: transformers' model, observed and masked."""

    model: Model
    memory: int | None = None

    @property
    def source(self) -> Source:
        """The checkpoint."""
        return self.model.source

    def calibrate(
        self,
        corpus: Corpus,
        *,
        model_sha256: str,
        work: WorkFolder | None = None,
        progress: Progress | None = None,
        watch: Watch | None = None,
    ) -> Calibration:
        """Return the statistics of all experts, and of the matrices' inputs, over a text."""
        return calibrate(
            self.model,
            corpus,
            model_sha256=model_sha256,
            work=work,
            memory=self.memory,
            progress=progress,
            watch=watch,
        )

    def damage_by_layer(
        self, tokens: Tensor, pruned: Pruned, novices: Novices, *, progress: Progress | None = None
    ) -> dict[int, float]:
        """Return how much the last hidden states change when one layer is pruned, for each."""
        return damage_by_layer(self.model, tokens, pruned, novices, progress=progress)

    def recalibrate(
        self,
        corpus: Corpus,
        calibration: Calibration,
        decide: Callable[[Calibration], Plan],
        novices_of: Callable[[ExpertStats], Tensor],
        *,
        progress: Progress | None = None,
    ) -> Calibration:
        """Return the statistics of each layer after the pruned layers before it."""
        return recalibrate(
            self.model, corpus, calibration, decide, novices_of, memory=self.memory, progress=progress
        )

    def measure_residuals(
        self, corpus: Corpus, plan: Plan, *, progress: Progress | None = None
    ) -> dict[int, Residual]:
        """Return what each layer's pruned experts add to its output."""
        return measure_residuals(self.model, corpus, plan, memory=self.memory, progress=progress)

    def measure_channels(self, corpus: Corpus, folder: "Path", *, progress: Progress | None = None) -> None:
        """Leave what thin experts are made of in a folder, layer by layer."""
        measure_channels(self.model, corpus, folder, memory=self.memory, progress=progress)

    def divergence(self, rows: Tensor) -> Callable[[Pruned, Novices], float]:
        """Return what measures the mean KL divergence on rows of tokens of the model with novices in it."""
        return Divergence(self.model, rows)

    def experts(self) -> Iterator[tuple[int, Any]]:
        """Yield (layer, transformers' experts module) in ascending order."""
        return loaded_experts(self.model)


class InLlama(LlamaEngine):
    """A GGUF's engine: llama.cpp, observed and masked."""

    def __init__(self, source: GgufFile, options: LlamaOptions) -> None:
        """Load the model; raises `MoneError` where llama.cpp cannot."""
        if ranks.n_rank() > 1:
            raise MoneError(f"torchrun shares out the rows of checkpoints only: run {source.name} without it")
        super().__init__(source.files[0], source.spec, options=options)
        self._source = source

    @property
    def source(self) -> Source:
        """The GGUF."""
        return self._source

    def calibrate(
        self,
        corpus: Corpus,
        *,
        model_sha256: str,
        work: WorkFolder | None = None,
        progress: Progress | None = None,
        watch: Watch | None = None,
    ) -> Calibration:
        """Return the statistics of all experts, and of the matrices' inputs, over a text."""
        return self.observe(
            corpus,
            model_sha256=model_sha256,
            config=self._source.computing_config,
            work=work,
            progress=progress,
            watch=watch,
        )

    def experts(self) -> Iterator[tuple[int, Any]]:
        """Yield (layer, what holds its experts' stacked matrices) in ascending order."""
        return self._source.experts()


Engine = InTorch | InLlama
"""A loaded model as the stages use it; both have the same methods."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Where and how a model runs: the first four are for checkpoints, `llama` is for GGUFs."""

    device: str = "auto"
    dtype: Dtype = "auto"
    stream: Stream = "auto"
    memory: int | None = None
    llama: LlamaOptions = LlamaOptions()


def load(model: "str | Path | Source", **options: Any) -> Model | InLlama:
    """Load a model for calibration: `options` are `loading.load`'s, or of a GGUF those of `LlamaOptions`."""
    source = open_source(model)
    if isinstance(source, GgufFile):
        return InLlama(source, LlamaOptions(**options))
    return loading.load(source, **options)


def engine_of(model: "Model | Engine", *, memory: int | None = None) -> Engine:
    """Return the engine of a loaded model."""
    return InTorch(model, memory) if isinstance(model, Model) else model


def open_engine(source: Source, setup: Setup) -> Engine:
    """Load a model as its kind is run; raises `MoneError` where it cannot be, or does not fit."""
    if isinstance(source, GgufFile):
        return InLlama(source, setup.llama)
    model = loading.load(
        source, device=setup.device, dtype=setup.dtype, stream=setup.stream, memory=setup.memory
    )
    return InTorch(model, setup.memory)


def pinned(source: Source, setup: Setup) -> dict[str, Any]:
    """Return what of a setup decides the sums, by option: what is left to `auto` is decided now."""
    if isinstance(source, GgufFile):
        return {"-ngl": setup.llama.n_gpu_layers, "--n-cpu-moe": setup.llama.n_cpu_moe}
    dtype, streamed = choose(
        source, device=setup.device, dtype=setup.dtype, stream=setup.stream, memory=setup.memory
    )
    return {
        "--device": setup.device.partition(":")[0],
        "--dtype": str(dtype).removeprefix("torch."),
        "--stream": "on" if streamed else "off",
    }
