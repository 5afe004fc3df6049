"""The names of transformers that are no stable interface: all of them, in this one file.

They are right for the version that the package pins and tests, `TESTED`. Another version may have moved or
changed them, so `check_version` is called before they are relied on.
"""

import copy
from typing import Any

import transformers

from mone_export.errors import MoneError

TESTED = "5.23.0"
"""The version of transformers that these names were read in; pyproject.toml pins the same."""


def _wrong_version() -> MoneError:
    return MoneError(
        f"transformers {transformers.__version__} is installed, and mone-export uses internals of version "
        f"{TESTED}: pip install transformers=={TESTED}"
    )


try:
    from transformers.integrations.moe import ExpertsInterface
    from transformers.integrations.moe import _grouped_linear as grouped_linear
except ImportError:
    raise _wrong_version() from None

__all__ = ["TESTED", "ExpertsInterface", "check_version", "grouped_linear", "with_experts_forward"]


def check_version() -> None:
    """Raise `MoneError` unless transformers has the version whose internals are used here."""
    if transformers.__version__ != TESTED:
        raise _wrong_version()


def with_experts_forward(config: Any, name: str) -> Any:
    """Return a copy of a model's config by which its experts run under `name` in `ExpertsInterface`.

    A shallow copy: everything else in it is the model's own.
    """
    own = copy.copy(config)
    own._experts_implementation_internal = name
    return own
