"""Code that comes with a model: who needs it is found out, before any of it runs.

A config may name classes in Python files of the model's folder, or of another repository (`auto_map`). It
often does so for models that transformers has itself, and then nothing needs them.
"""

import json
from pathlib import Path
from typing import Any

from mone_export.errors import MoneError


def needs_remote_code(path: Path) -> str | None:
    """Return the file and the class it names that transformers cannot do without, or None; runs none of it.

    Asked of transformers itself, with such code forbidden. Anything else that is wrong with the model is for
    others to say.
    """
    from transformers import AutoConfig, AutoTokenizer

    for file, loader in (("config.json", AutoConfig), ("tokenizer_config.json", AutoTokenizer)):
        named = _named(path / file, loader.__name__)
        if named and _refuses(loader, path):
            return f"{file} (auto_map: {named})"
    return None


def refuse_remote_code(path: Path) -> None:
    """Raise `MoneError` for a model that needs code of its own."""
    if named := needs_remote_code(path):
        raise MoneError(
            f"{path} needs code that comes with it, named in {named}: read that code, then allow it with "
            "--trust-remote-code"
        )


def _named(file: Path, loader: str) -> str | None:
    """Return the class that a config names for a loader of transformers."""
    try:
        classes = json.loads(file.read_text(encoding="utf-8"))["auto_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if isinstance(classes, dict):
        classes = classes.get(loader)
    if isinstance(classes, list):  # of a tokenizer: the slow and the fast one
        classes = next((name for name in reversed(classes) if name), None)
    return classes if isinstance(classes, str) else None


def _refuses(loader: Any, path: Path) -> bool:
    try:
        loader.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing more special
        return "trust_remote_code" in str(error)
    return False
