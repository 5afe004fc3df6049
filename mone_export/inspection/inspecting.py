"""inspect(): what kind a file is, and its anatomy."""

from pathlib import Path

from mone_export.errors import MoneError
from mone_export.inspection.anatomy import Anatomy
from mone_export.source.hub import Snapshot, metadata, parse, weight_files

_GGUF, _MOST_JSON = b"GGUF", 2**26


def examine(name: str, *, n_ctx: int | None = None, revision: str | None = None) -> Anatomy:
    """Return the anatomy of a GGUF, a model folder, a Hugging Face id, `demo`, statistics or a plan.

    `n_ctx` is the number of tokens for which memory is reckoned. Raises `MoneError` for what is none of them.
    """
    from mone_export.inspection.of_checkpoint import of_checkpoint
    from mone_export.inspection.of_gguf import of_gguf

    path = Path(name)
    if is_file(path):
        beginning = _beginning(path)
        if beginning.startswith(_GGUF):
            return of_gguf(path, n_ctx=n_ctx)
        return _of_record(path, beginning)
    if name == "demo" and not is_dir(path):
        path = Path(__file__).parents[1] / "demo"
    if is_dir(path):
        if not (path / "config.json").is_file():
            raise MoneError(f"{name} has no config.json: it is no model's folder")
        if missing := [file for file in weight_files(path) if not (path / file).is_file()]:
            raise MoneError(f"{name} has no {missing[0]}: it is no complete model's folder")
        return of_checkpoint(Snapshot("", "", path))
    if name.startswith((".", "/", "~")) or name.endswith(".gguf") or not (found := parse(name)):
        raise MoneError(f"there is no {name}: pass a GGUF, a folder, a Hugging Face id, statistics or a plan")
    return of_checkpoint(metadata(found[0], revision or found[1]))


def is_file(path: Path) -> bool:
    """Say whether there is such a file; a name that cannot be one is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_dir(path: Path) -> bool:
    """Say whether there is such a folder; a name that cannot be one is none."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _beginning(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(9)
    except OSError as error:
        raise MoneError(f"cannot read {path}: {error.strerror}") from None


def _of_record(path: Path, beginning: bytes) -> Anatomy:
    from mone_export.inspection.of_records import is_plan, is_statistics, of_plan, of_statistics

    if beginning[8:9] == b"{":  # safetensors: eight bytes of length, then JSON
        if not is_statistics(path):
            raise MoneError(
                f"{path} holds tensors, no statistics: pass the model's folder to inspect a model"
            )
        return of_statistics(path)
    if beginning[:1] in (b"{", b" ", b"\n") and path.stat().st_size < _MOST_JSON and is_plan(path):
        return of_plan(path)
    raise MoneError(
        f"{path} is no GGUF, no statistics and no plan of mone-export: pass one, or the folder of a model"
    )
