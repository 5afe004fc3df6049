"""Fit a mixture-of-experts model into less memory: experts become novices in a GGUF for llama.cpp."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mone_export.artifacts import Calibration, Corpus, ExpertStats, MoeSpec, Plan, Report, Scores
    from mone_export.calibration.corpus import read_corpus
    from mone_export.calibration.engines import load
    from mone_export.calibration.loading import Model
    from mone_export.deciding import plan_thin
    from mone_export.errors import MoneError
    from mone_export.output.writing import write
    from mone_export.pipeline import export
    from mone_export.pruned_model import load_pruned
    from mone_export.pruning.novices import novices
    from mone_export.pruning.planning import plan
    from mone_export.pruning.scoring import score
    from mone_export.recipe import Recipe
    from mone_export.source import Checkpoint, Source, inspect, open_source
    from mone_export.statistics import calibrate

# loaded on first use (PEP 562), so that `mone-export --help` does not wait for torch
_HOME = {
    **dict.fromkeys(
        ("Calibration", "Corpus", "ExpertStats", "MoeSpec", "Plan", "Report", "Scores"), "artifacts"
    ),
    "MoneError": "errors",
    "Model": "calibration.loading",
    "calibrate": "statistics",
    "export": "pipeline",
    "inspect": "source",
    "open_source": "source",
    "Checkpoint": "source",
    "Source": "source",
    "Recipe": "recipe",
    "load": "calibration.engines",
    "load_pruned": "pruned_model",
    "novices": "pruning.novices",
    "plan": "pruning.planning",
    "plan_thin": "deciding",
    "read_corpus": "calibration.corpus",
    "score": "pruning.scoring",
    "write": "output.writing",
}
__all__ = [
    "Calibration",
    "Checkpoint",
    "Corpus",
    "ExpertStats",
    "Model",
    "MoeSpec",
    "MoneError",
    "Plan",
    "Recipe",
    "Report",
    "Scores",
    "Source",
    "__version__",
    "calibrate",
    "export",
    "inspect",
    "load",
    "load_pruned",
    "novices",
    "open_source",
    "plan",
    "plan_thin",
    "read_corpus",
    "score",
    "write",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
