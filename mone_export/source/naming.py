"""What a file says of the model it was made from: its name, authors, licence, tags and ancestors.

llama.cpp derives all this from the model's card and the name of its folder, which in the hub's cache is the
hash of a commit. Here it is shown a folder of the model's own name.
"""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mone_export.errors import first_line

log = logging.getLogger(__name__)

_READ = ("config.json", "generation_config.json", "README.md")


def name_of(path: Path) -> str:
    """Return a model's id on the hub where its folder is in the hub's cache, else the name of the folder."""
    folder = path if path.name not in ("", "..") else path.resolve()
    if folder.parent.name == "snapshots" and folder.parts[-3].startswith("models--"):
        return folder.parts[-3].removeprefix("models--").replace("--", "/", 1)
    return folder.name


@contextmanager
def card_folder(path: Path, name: str, metadata: Any) -> Iterator[Path]:
    """Yield a folder called as the model `name` with what a GGUF's metadata is derived from.

    `metadata` is gguf's class. A model card that it cannot read is left out, with a warning.
    """
    with tempfile.TemporaryDirectory(prefix="mone-export-") as parent:
        folder = Path(parent) / name.rpartition("/")[2]
        folder.mkdir()
        for file in _READ:
            if (path / file).is_file():
                shutil.copyfile(path / file, folder / file)
        try:
            metadata.load_model_card(folder)
        except Exception as error:  # the YAML library's errors have no base but this
            (folder / "README.md").unlink()
            log.warning(
                "%s: the front matter cannot be read (%s): licence, tags and base model are not in the file",
                path / "README.md",
                first_line(error),
            )
        yield folder


def completed(found: Any, name: str) -> Any:
    """Return gguf's metadata with what the id `org/model` says, and without what a GGUF cannot hold.

    The model itself is the first base model: its own ancestors come after it.
    """
    kinds = {field.name: str(field.type) for field in fields(found)}
    found = replace(found, **{key: _stored(getattr(found, key), kind) for key, kind in kinds.items()})
    organization, slash, model = name.partition("/")
    if not slash:
        return found
    page = f"https://huggingface.co/{name}"
    base = {"name": found.id_to_title(model), "organization": found.id_to_title(organization)}
    return replace(
        found,
        organization=found.organization or base["organization"],
        source_repo_url=found.source_repo_url or page,
        base_models=[base | {"repo_url": page}, *(found.base_models or [])],
    )


def _stored(value: Any, kind: str) -> Any:
    """Return a value of a model card in the form its key has, None where there is none."""
    if value is None or "int" in kind or "float" in kind:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return (int if "int" in kind else float)(value) if is_number else None
    if "dict" in kind:
        entries = [entry for entry in value if isinstance(entry, dict)]
        return [{key: str(text) for key, text in entry.items() if text is not None} for entry in entries]
    if isinstance(value, list):
        texts = [str(part) for part in value if part is not None]
        return texts if "list" in kind else ",".join(texts) or None
    return None if isinstance(value, dict) else str(value)
