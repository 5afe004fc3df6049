"""inspect(): what kind a file is, and its anatomy."""

from pathlib import Path

from mone_export.errors import MoneError
from mone_export.inspection.anatomy import Anatomy
from mone_export.source.hub import Snapshot, metadata, parse

_GGUF, _MOST_JSON = b"GGUF", 2**26


def examine(name: str, *, n_ctx: int | None = None, revision: str | None = None) -> Anatomy:
    """Return the anatomy of a GGUF, a model folder, a Hugging Face id, `demo`, statistics or a plan.

    `n_ctx` is the number of tokens for which memory is reckoned. Raises `MoneError` for what is none of them.
    """
    from mone_export.inspection.of_checkpoint import of_checkpoint
    from mone_export.inspection.of_gguf import of_gguf

    path = Path(name)
    if path.is_file():
        with path.open("rb") as file:
            beginning = file.read(9)
        if beginning.startswith(_GGUF):
            return of_gguf(path, n_ctx=n_ctx)
        return _of_record(path, beginning)
    if name == "demo" and not path.is_dir():
        path = Path(__file__).parents[1] / "demo"
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise MoneError(f"{name} has no config.json: it is no model's folder")
        return of_checkpoint(Snapshot("", "", path))
    if name.startswith((".", "/", "~")) or name.endswith(".gguf") or not (found := parse(name)):
        raise MoneError(f"there is no {name}: pass a GGUF, a folder, a Hugging Face id, statistics or a plan")
    return of_checkpoint(metadata(found[0], revision or found[1]))


def _of_record(path: Path, beginning: bytes) -> Anatomy:
    from mone_export.inspection.of_records import is_plan, of_plan, of_statistics

    if beginning[8:9] == b"{":  # safetensors: eight bytes of length, then JSON
        return of_statistics(path)
    if beginning[:1] in (b"{", b" ", b"\n") and path.stat().st_size < _MOST_JSON and is_plan(path):
        return of_plan(path)
    raise MoneError(f"{path} is no GGUF, no statistics and no plan of mone-export")
