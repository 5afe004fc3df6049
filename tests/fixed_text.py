"""Text that no commit of this project changes, for calibration and for vocabularies of the tests.

It is taken from transformers, of which `pyproject.toml` names the one version: the same characters with every
Python and on every system. What experts do with it moves with that version only, not with each edit of ours.
"""

import functools
from importlib.util import find_spec
from pathlib import Path

MODULES = (
    "generation/stopping_criteria",
    "trainer_callback",
    "optimization",
    "audio_utils",
    "image_transforms",
)


@functools.cache
def fixed_text() -> str:
    """Return 240,000 characters of prose and code, found without importing transformers."""
    spec = find_spec("transformers")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    return "\n\n".join((folder / f"{module}.py").read_text(encoding="utf-8") for module in MODULES)
