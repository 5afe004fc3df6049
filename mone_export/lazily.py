"""PyTorch, imported when something of it is first used: that takes a second, and a GGUF's dry run needs none.

Where only a type is meant, `Tensor` is no more than `Any` at run time: `torch.Tensor` is the class.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["Tensor", "torch"]

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:

    class _Torch:
        """The module `torch`, as far as its names go."""

        def __getattr__(self, name: str) -> Any:
            return getattr(import_module("torch"), name)

    torch, Tensor = _Torch(), Any
