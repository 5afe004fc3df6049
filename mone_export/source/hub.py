"""Models on the Hugging Face Hub, in the order of what they cost: a name, the small files, headers, weights.

huggingface_hub does the transfers, into its own cache: what is there already, whole files, is not asked for
again, and with HF_HUB_OFFLINE nothing is. A connection that breaks off in the middle of a file is taken up
again where it broke; a file whose download is killed begins again.
"""

import json
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

from mone_export.errors import MoneError, first_line
from mone_export.runtime import Progress
from mone_export.terminal import as_size

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

LICENCES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*")
SMALL = ("*.json", "tokenizer*", "*.model", "*.tiktoken", "*.jinja", "*.txt", "README.md", *LICENCES)
_ELSEWHERE = ("*/*", "*.safetensors", "consolidated*")  # other copies of the weights lie in folders
_PATIENCE = 10.0  # seconds until a Hub that says nothing counts as not there; huggingface_hub waits for ever
_AT_ONCE = 8  # requests for headers
_WORD = re.compile(r"[A-Za-z0-9](?:[\w.-]*\w)?", re.ASCII)
_REVISION = re.compile(r"\w[\w./-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A model at one commit: `revision` is the commit's SHA, `folder` holds what of it is here."""

    id: str
    revision: str
    folder: Path


def parse(name: str) -> tuple[str, str | None] | None:
    """Return (id, revision or None) of `org/model` or `org/model@revision`; None for a single word.

    Raises MoneError for all else: it may be meant for a path, or for an id, and is none.
    """
    model, at, revision = name.partition("@")
    words = model.split("/")
    if len(words) == 2 and all(_WORD.fullmatch(word) and not re.search(r"--|\.\.", word) for word in words):
        if not at or _REVISION.fullmatch(revision):
            return model, revision or None
        raise MoneError(f"{name}: name a branch, tag or commit after the @, or leave the @ out")
    if _WORD.fullmatch(name):
        return None
    raise MoneError(
        f"{name!r} is neither a folder nor a Hugging Face id like org/model or org/model@revision: check the "
        "spelling"
    )


def metadata(model: str, revision: str | None = None, *, code: bool = False) -> Snapshot:
    """Bring config, tokenizer, README and index, no weights, of a model at a branch, tag or commit.

    `code`: bring the Python files beside them, too. The config comes first. Raises MoneError where the model
    is not, where this user may not read it, or where it has no config; where the Hub does not answer, the
    cache does, if it can.
    """
    from huggingface_hub import HfApi

    unreachable: Exception | None = None
    try:
        HfApi().model_info(model, revision=revision, timeout=_PATIENCE)
    except Exception as error:
        unreachable = error
    try:
        folder = _small_files(model, revision, ["config.json"], cached=unreachable is not None)
        if (folder / "config.json").is_file():
            patterns = [*SMALL, *["*.py"] * code]
            folder = _small_files(model, folder.name, patterns, cached=unreachable is not None)
    except Exception as error:
        raise _refusal(unreachable or error, model, revision) from None
    if not (folder / "config.json").is_file():
        raise MoneError(f"{model} on the Hub has no config.json: pass a model in Hugging Face's format")
    return Snapshot(model, folder.name, folder)


def weight_files(folder: Path) -> tuple[str, ...]:
    """Return the names of a model's weight files: those its index lists, else `model.safetensors`.

    Raises MoneError for an index that cannot be read, or that names files elsewhere.
    """
    index = folder / INDEX
    if not index.is_file():
        return (SINGLE,)
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not files or any(Path(name).name != name or name in ("", "..") for name in files):
            raise ValueError("it names no files of its own folder")
        for name in files:
            (folder / name).exists()  # raises for names that no system takes
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MoneError(f"cannot read {index}: {first_line(error)}; get the model again") from None
    return tuple(files)


def headers(
    snapshot: Snapshot, files: Sequence[str], progress: Progress | None = None
) -> dict[str, dict[str, Any]]:
    """Return the header of each weight file as safetensors has it, by range requests where it is not here.

    A header maps each tensor to its `dtype`, `shape` and `data_offsets`, and may have `__metadata__`.
    """
    found = {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for name, header in zip(files, pool.map(partial(_header, snapshot), files), strict=True):
            found[name] = header
            if progress:
                progress(len(found), len(files), "reading the headers (files)")
    return found


@contextmanager
def skeleton_folder(snapshot: Snapshot, progress: Progress | None = None) -> Iterator[Path]:
    """Yield a folder that is the model in all except the values of its weights, and takes next to no disk.

    Its weight files have the true headers and holes for the data, which read as zeros: for everything that
    needs names, shapes and types only. Where all weights are here it is the snapshot's own folder.
    """
    files = weight_files(snapshot.folder)
    if all((snapshot.folder / name).is_file() for name in files):
        yield snapshot.folder
        return
    found = headers(snapshot, files, progress)
    with tempfile.TemporaryDirectory(prefix="mone-export-") as parent:
        folder = Path(parent) / snapshot.id.rpartition("/")[2]
        try:
            folder.mkdir()
            for file in snapshot.folder.iterdir():
                if file.is_file() and file.suffix != ".safetensors":
                    shutil.copyfile(file, folder / file.name)
            for name, header in found.items():
                write_hollow(folder / name, header)
        except OSError as error:
            raise MoneError(
                f"cannot write to {folder} ({error.strerror}): free some space, or set TMPDIR"
            ) from None
        yield folder


def weights(snapshot: Snapshot, files: Sequence[str], progress: Progress | None = None) -> None:
    """Bring weight files into the snapshot's folder: exactly those named, and none that is there already.

    Raises MoneError when the disk of the cache has too little space, and as `metadata` does.
    """
    missing = [name for name in files if not (snapshot.folder / name).is_file()]
    if not missing:
        return
    from huggingface_hub import hf_hub_download

    try:
        count = _Count(_size(snapshot, missing), progress)
        bar = count.bar_class()
        for name in missing:
            hf_hub_download(snapshot.id, name, revision=snapshot.revision, tqdm_class=bar)
    except MoneError:
        raise
    except Exception as error:
        raise _refusal(error, snapshot.id, snapshot.revision) from None


def _small_files(model: str, revision: str | None, patterns: list[str], *, cached: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    with disable_progress_bars():
        folder = snapshot_download(
            model,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=list(_ELSEWHERE),
            local_files_only=cached,
        )
    return Path(folder)


def _size(snapshot: Snapshot, files: Sequence[str]) -> int:
    """Return the bytes that files will take; MoneError where the cache has no room for them."""
    from huggingface_hub import HfApi

    listed = HfApi().get_paths_info(snapshot.id, list(files), revision=snapshot.revision)
    sizes = {item.path: getattr(item, "size", 0) for item in listed}
    if lacking := [name for name in files if name not in sizes]:
        raise MoneError(
            f"{snapshot.id} lacks {len(lacking)} of its weight files, such as {lacking[0]}: only models with "
            "complete .safetensors weights can be exported"
        )
    needed, free = sum(sizes.values()), shutil.disk_usage(snapshot.folder).free
    if needed > free:
        raise MoneError(
            f"the weights of {snapshot.id} take {as_size(needed)}, {as_size(free)} are free in "
            f"{snapshot.folder}: free some space, or set HF_HOME to a folder elsewhere"
        )
    return needed


def _header(snapshot: Snapshot, name: str) -> dict[str, Any]:
    file = snapshot.folder / name
    return local_header(file) if file.is_file() else _remote_header(snapshot, name)


def local_header(file: Path) -> dict[str, Any]:
    """Return the header of a safetensors file here, in the form of `headers`; `MoneError` for another."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError("it is no safetensors file")
            header: dict[str, Any] = json.loads(stream.read(length))
    except (OSError, ValueError, struct.error) as error:
        raise MoneError(f"cannot read {file}: {first_line(error)}; download it again") from None
    return header


def _remote_header(snapshot: Snapshot, name: str) -> dict[str, Any]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    try:
        found = HfApi().parse_safetensors_file_metadata(snapshot.id, name, revision=snapshot.revision)
    except EntryNotFoundError:
        raise MoneError(
            f"{snapshot.id} has no {name}: only models with complete .safetensors weights can be exported"
        ) from None
    except Exception as error:
        raise _refusal(error, snapshot.id, snapshot.revision) from None
    tensors = {
        key: {"dtype": item.dtype, "shape": list(item.shape), "data_offsets": list(item.data_offsets)}
        for key, item in found.tensors.items()
    }
    return ({"__metadata__": found.metadata} if found.metadata else {}) | tensors


def write_hollow(file: Path, header: Mapping[str, Any]) -> None:
    """Write a safetensors file of this header, with a hole for the data, which reads as zeros."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    end = max((item["data_offsets"][1] for key, item in header.items() if key != "__metadata__"), default=0)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(stream.tell() + end)


class _Count:
    """The bytes of several files on their way, as one stage."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress, self._done = total, progress, 0

    def add(self, n_byte: float | None) -> None:
        self._done += int(n_byte or 0)
        if self._progress:
            self._progress(self._done // 2**20, self._total // 2**20, "downloading (MiB)")

    def bar_class(self) -> Any:
        """Return a class of tqdm's bars that draw nothing and count here: bytes on disk, by HTTP or Xet."""
        from tqdm import tqdm

        body = {
            "__init__": partialmethod(tqdm.__init__, disable=True),
            "update": lambda _bar, n_byte=1: self.add(n_byte),
            "update_transfer": lambda _bar, _n_byte: None,
            "set_transfer_postfix_str": lambda _bar, *_text, **_named: None,
        }
        return type("SilentBar", (tqdm,), body)


def _refusal(error: Exception, model: str, revision: str | None) -> MoneError:
    """Say in one line what huggingface_hub's error means for the user, and what to do."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # what happened before it looked into the cache
    page = f"{constants.ENDPOINT}/{model}"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.GatedRepoError):
        text = f"{model} is gated: accept its licence on {page} and log in with `hf auth login`"
    elif isinstance(error, errors.RevisionNotFoundError):
        text = f"{model} has no revision {revision}: choose one of {page}/commits, or leave it out"
    elif isinstance(error, errors.RepositoryNotFoundError):
        text = (
            f"{model} is neither a folder nor a model on {constants.ENDPOINT} that you may see: check the "
            "spelling, and if it is private, log in with `hf auth login`"
        )
    elif status in (401, 403):
        text = f"{constants.ENDPOINT} refuses {model} (status {status}): log in again with `hf auth login`"
    elif status:
        text = f"{constants.ENDPOINT} answers for {model} with status {status}: try again later"
    elif constants.is_offline_mode():
        text = (
            f"{model} is not complete in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: unset it, or "
            "pass a folder"
        )
    elif isinstance(error, OSError) and error.errno is not None:
        text = (
            f"cannot write to {constants.HF_HUB_CACHE} ({error.strerror}): free some space there, or set "
            "HF_HOME to a folder elsewhere"
        )
    else:
        text = (
            f"cannot download {model} from {constants.ENDPOINT} ({first_line(error)}): check the connection "
            "and run the same command again, which keeps the files that are complete; or pass a folder"
        )
    return MoneError(text)
