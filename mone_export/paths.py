"""Where a run writes: never onto what it reads, never onto a stranger's file, and never half a file.

An output is made in a folder of its own beside the place where it will stand, `NAME.<random>.part`, and takes
that place by a rename when it is complete. The folder holds a lock for as long as its process lives: what a
killed process has left is known by its free lock, and the next run of the same output removes it.
"""

import glob
import json
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mone_export import files
from mone_export.errors import MoneError
from mone_export.locks import NoLocksError, locked, tried
from mone_export.terminal import as_size

Inputs = Mapping[str, Path | Sequence[Path]]

_OUR_KEY = b"mone.format_version"  # `source.gguf_format` says what it means
_HEAD = 2**26  # bytes of a GGUF in which its keys end: a vocabulary of 256k tokens takes a quarter of it
_PAGE_HEAD = 512
_OUR_SIGNS = (
    b'<meta name="generator" content="mone-export">',
    b'{\n "mone_report": ',
    b'{\n "mone_evaluation": ',
)
_N_TRY = 10
RECORD = "report.json"  # what a card's numbers come from
FIGURES = ("fates", "scores", "use", "slots")
CARD_FILES = (RECORD, "README.md", "selection.json", "SHA256SUMS", "fates.svg", "fates.png")


def check_outputs(outputs: Mapping[str, Path], inputs: Inputs, *, overwrite: bool = False) -> dict[str, Path]:
    """Return all outputs of a run, by option, as absolute paths without links; refuse what would destroy.

    `inputs` are all that the run reads, each under a name for the message, such as `-f`; a folder stands for
    the files in it, except GGUFs of ours. Raises MoneError for an output that is an input (by path, link or
    hard link) or another output, that is a folder or a special file, whose folder is missing or not writable,
    and, unless `overwrite`, for an existing file that is no GGUF of ours.
    """
    found = {option: _resolved(path) for option, path in outputs.items()}
    read = [(what, file) for what, given in inputs.items() for file in _files(given)]
    options: dict[str, str] = {}
    for option, path in found.items():
        other = options.setdefault(str(path).casefold(), option)  # some file systems know no case
        if other != option:
            raise MoneError(f"{other} and {option} both name {path}: choose another {option}")
        if what := next((what for what, file in read if _same(path, file)), None):
            raise MoneError(f"{option} {path} would replace what is read as {what}: choose another {option}")
        _check_kind(path, option)
        check_room(path, option=option)
        if path.exists() and not overwrite and not is_ours(path):
            raise MoneError(
                f"{path} exists and is no file of mone-export: choose another {option}, or pass --overwrite"
            )
    return found


def page_outputs(page: Path, *, overwrite: bool = False) -> dict[str, Path]:
    """Return the outputs of a page, by option, as `check_outputs` wants them; its figures lie beside it.

    Raises MoneError for another kind of file, and for figures that a page of ours cannot have left there.
    """
    if page.suffix != ".html":
        raise MoneError(f"--report {page}: name a page, such as {page.with_suffix('.html').name}")
    figures = [page.with_name(f"{page.stem}-{name}.{kind}") for name in FIGURES for kind in ("svg", "png")]
    strange = [file for file in figures if file.exists()]
    if strange and not overwrite and not is_ours(page):
        raise MoneError(f"{strange[0]} exists, --report would replace it: choose another --report")
    return {"--report": page, "--report's record": page.with_suffix(".json")}


def check_card(folder: Path) -> None:
    """Raise MoneError unless a card may be written to a folder: new, ours, or without the files of a card."""
    if folder.exists() and not folder.is_dir():
        raise MoneError(f"--card {folder} is a file: name a folder")
    strange = [name for name in CARD_FILES if (folder / name).exists()]
    if strange and not is_ours(folder / RECORD):
        raise MoneError(f"--card {folder} has a {strange[0]} that is not ours: name another folder")
    check_room(folder / RECORD if folder.exists() else folder, option="--card")


def check_folder(path: Path, inputs: Inputs, *, ours: str, option: str = "--hf-out") -> None:
    """Refuse a folder for output that is not new, empty, or a checkpoint of ours and nothing else.

    Ours is one whose config lists its files under the key `ours` (bytes by name, as `listed`), as long as
    they are what lies there. Nothing of `inputs`, those of `check_outputs` and other outputs, may lie in
    the folder.
    """
    folder = _resolved(path)
    check_room(path, option=option)
    for what, given in inputs.items():
        for file in [given] if isinstance(given, Path) else given:
            if _resolved(file).is_relative_to(folder):
                raise MoneError(f"{option} {path} holds what is given as {what}: choose another {option}")
    if folder.exists() and not folder.is_dir():
        raise MoneError(f"{option} {path} is a file: name a folder that is not there yet")
    try:
        known = dict(json.loads((folder / "config.json").read_text(encoding="utf-8"))[ours]["files"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        known = {}
    there = listed(folder) if folder.is_dir() else {}
    strange = [name for name, size in there.items() if size is None or known.get(name) != size]
    if strange:
        raise MoneError(
            f"{path} exists and is no checkpoint of mone-export alone (not ours: {strange[0]}): choose "
            f"another {option}"
        )


def listed(folder: Path) -> dict[str, int | None]:
    """Return what lies in a folder: the bytes of files by name, None for links, folders and the like."""
    found = sorted(folder.iterdir())
    return {
        each.name: each.stat().st_size if each.is_file() and not each.is_symlink() else None for each in found
    }


def on_one_disk(one: Path, other: Path) -> bool:
    """Say whether two files, in folders that exist, take their room from the same disk."""
    return _resolved(one).parent.stat().st_dev == _resolved(other).parent.stat().st_dev


def check_room(path: Path, *, needed: int = 0, option: str = "-o") -> None:
    """Raise MoneError unless files can be made beside `path` and `needed` bytes are free there.

    A link counts as the file it leads to. `option` is what the user should change.
    """
    folder = _resolved(path).parent
    if not folder.is_dir():
        raise MoneError(f"the output folder {folder} does not exist: create it or choose another {option}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MoneError(
            f"the output folder {folder} is not writable ({error.strerror}): choose another {option}"
        ) from None
    available = shutil.disk_usage(folder).free
    if needed > available:
        raise MoneError(
            f"{folder} has {as_size(available)} free, the export needs {as_size(needed)}: "
            f"free some space, choose another {option} or a smaller --outtype"
        )


def check_temporary(needed: int, folder: Path | None = None) -> None:
    """Raise MoneError unless temporary files can be made, with `needed` bytes free there or in `folder`."""
    try:
        place = tempfile.gettempdir() if folder is None else _existing(folder)
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise MoneError(f"cannot write temporary files ({error.strerror}): set TMPDIR to a folder") from None
    if needed > free:
        remedy = "set TMPDIR to a folder with more room" if folder is None else "choose another --workdir"
        raise MoneError(f"{place} has {as_size(free)} free, temporary files need {as_size(needed)}: {remedy}")


def _existing(folder: Path) -> Path:
    """Return the folder, or the one it will be made in."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def is_ours(path: Path) -> bool:
    """Say whether a file is a GGUF with the keys of this program, or a page or record; reads its head."""
    try:
        with path.open("rb") as file:
            beginning = file.read(4)
            if beginning != b"GGUF":
                beginning += file.read(_PAGE_HEAD)
                return any(sign in beginning for sign in _OUR_SIGNS)
            return struct.pack("<Q", len(_OUR_KEY)) + _OUR_KEY in file.read(_HEAD)
    except OSError:
        return False


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield where to make the file that takes the place of `target`, complete, at the end of the block.

    The folder it lies in is of this run alone. When the block fails, nothing is left and `target` stays as
    it was. Of a link, the file it leads to is replaced. Raises MoneError where no file can be made, or the
    disk refuses it in the end; an OSError of the block passes.
    """
    target = _resolved(target)
    sweep(target)
    with _own_folder(target) as folder:
        part = folder / target.name
        yield part
        try:
            files.replace(part, target)
        except OSError as error:
            raise MoneError(
                f"cannot write {target} ({error.strerror}): free some space or choose another place"
            ) from None


@contextmanager
def _own_folder(target: Path) -> Iterator[Path]:
    """Make a folder for a run's temporary files, hold its lock, and remove it at the end."""
    with ExitStack() as stack:
        for _ in range(_N_TRY):
            folder = _new_folder(target)
            stack.callback(_remove, folder, target)
            try:
                stack.enter_context(locked(folder / "lock"))
            except NoLocksError:  # then a sweep never finds it free
                break
            except (MoneError, OSError):  # a sweep came between: another one
                continue
            if (folder / "lock").exists():
                break
        else:
            raise MoneError(f"cannot keep a folder in {target.parent}: choose another")
        yield folder


def _new_folder(target: Path) -> Path:
    try:
        return Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}.", suffix=".part"))
    except OSError as error:
        raise MoneError(
            f"cannot make a file in {target.parent} ({error.strerror}): choose another folder"
        ) from None


def sweep(target: Path) -> None:
    """Remove the temporary folders that killed runs of the same output have left."""
    for folder in target.parent.glob(f"{glob.escape(target.name)}.????????.part"):
        if folder.is_dir():
            with tried(folder / "lock") as taken:
                if taken:
                    _remove(folder, target)
            if taken:
                with suppress(OSError):  # Windows removes no open file: the lock, and with it the folder
                    (folder / "lock").unlink()
                    folder.rmdir()


def _remove(folder: Path, target: Path) -> None:
    """Remove a run's temporary folder, unless it holds the only whole output and that cannot go back."""
    before = files.aside(folder / target.name)
    try:
        if before.is_dir() and not target.exists():  # stopped between two renames
            before.rename(target)
    except OSError:
        return
    shutil.rmtree(folder, ignore_errors=True)


def _resolved(path: Path) -> Path:
    with suppress(OSError, RuntimeError):  # Python before 3.13 raises one; later ones stop at such a link
        found = path.expanduser().resolve()
        if not any(each.is_symlink() for each in (found, *found.parents)):
            return found
    raise MoneError(f"{path} is a link that leads to itself: choose another path")


def _files(given: Path | Sequence[Path]) -> Iterator[Path]:
    for path in [given] if isinstance(given, Path) else given:
        if path.is_dir():
            yield from (file for file in path.iterdir() if file.is_file() and not is_ours(file))
        else:
            yield path


def _same(output: Path, read: Path) -> bool:
    try:
        return output == _resolved(read) or output.samefile(read)
    except OSError:
        return False


def _check_kind(path: Path, option: str) -> None:
    if path.is_dir():
        raise MoneError(f"the output {path} is a folder: name a file, such as {path / 'model.gguf'}")
    if path.exists() and not path.is_file():
        raise MoneError(
            f"{option} {path} is a device or a pipe, not a file: name a file (--dry-run writes nothing)"
        )
