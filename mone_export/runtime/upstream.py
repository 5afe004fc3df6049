"""The source of llama.cpp: which release is pinned, how it is downloaded, and the patched tree made from it.

The download goes through pip, the one client that already knows the user's mirrors, proxies and certificates.
pip insists on asking an sdist for its metadata, which for this one means a build environment and a minute;
`_STUB_BACKEND` answers instead.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from mone_export import locks
from mone_export.errors import MoneError

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all or 0 when unknown, what is being done)."""

_STUB_BACKEND = """
from pathlib import Path

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = Path(metadata_directory, "{name}-{version}.dist-info")
    folder.mkdir()
    text = "Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n"
    folder.joinpath("METADATA").write_text(text, encoding="utf-8")
    return folder.name
"""

# Half of the tree's bytes, of use only to upstream's tokenizer tests and its table of supported operations;
# the vocabularies of GPT stay, our own tests build models with one.
_LEFT_OUT = (
    "vendor/llama.cpp/models/ggml-vocab-[!g]*.gguf",
    "vendor/llama.cpp/models/ggml-vocab-gemma*.gguf",
    "vendor/llama.cpp/docs/ops/*.csv",
)


def quiet(_done: int, _total: int, _what: str) -> None:
    """Report no progress."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """The pinned release, as written in `patches/UPSTREAM` (key=value lines)."""

    package: str
    version: str
    sdist: str
    sha256: str
    tree: str
    llama_cpp_commit: str

    @staticmethod
    def load(file: Path) -> "Upstream":
        """Read an UPSTREAM file; a MoneError names the keys that are missing."""
        lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
        values = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
        values = {key.strip(): value.strip() for key, value in values.items()}
        wanted = Upstream.__dataclass_fields__
        if missing := [key for key in wanted if key not in values]:
            raise MoneError(f"{file} lacks {', '.join(missing)}: restore it from version control")
        return Upstream(**{key: values[key] for key in wanted})


@dataclass(frozen=True, slots=True)
class Source:
    """One source state: the pinned release and the patches on top of it (none for the stock one)."""

    upstream: Upstream
    patches: tuple[Path, ...]
    patched: bool

    @property
    def key(self) -> str:
        """Names the state: a digest of the sdist, of what is unpacked of it, and of the patches."""
        digest = hashlib.sha256(f"{self.upstream.sha256} {_LEFT_OUT}".encode())
        for patch in self.patches:
            digest.update(patch.name.encode() + b"\0" + patch.read_bytes() + b"\0")
        return ("mone-" if self.patched else "stock-") + digest.hexdigest()[:12]

    @property
    def folder(self) -> Path:
        """Where this state and its builds live in the cache."""
        return cache_dir() / "llama.cpp" / f"{self.upstream.version}-{self.key}"

    @property
    def package(self) -> Path:
        """The unpacked sdist (llama-cpp-python's own files)."""
        return self.folder / "source"

    @property
    def tree(self) -> Path:
        """The llama.cpp tree inside it."""
        return self.package / self.upstream.tree

    @property
    def packaged(self) -> Path | None:
        """What the installed wheel has of this state, laid out as `folder` is; None if it is of another."""
        wheel = wheel_folder()
        folder = wheel / self.folder.name if wheel else None
        return folder if folder and folder.is_dir() else None

    @property
    def unpacked(self) -> Path | None:
        """The llama.cpp tree, if it is there: `tree`, or of the wheel the part that the converter reads."""
        if self.package.is_dir():
            return self.tree
        return self.packaged / "source" / self.upstream.tree if self.packaged else None


def cache_dir() -> Path:
    """The cache folder: $MONE_CACHE, else $XDG_CACHE_HOME/mone_export, else ~/.cache/mone_export."""
    if chosen := os.environ.get("MONE_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mone_export"


def wheel_folder() -> Path | None:
    """The folder of the installed wheel `mone_llama`, of whatever patches; None without one."""
    spec = importlib.util.find_spec("mone_llama")
    return Path(spec.origin).parent if spec and spec.origin else None


def patches_dir() -> Path:
    """The folder of UPSTREAM, series and patches: in an installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "patches", package.parent / "patches"):
        if (folder / "UPSTREAM").is_file():
            return folder
    raise MoneError(f"no patches/UPSTREAM in {package} or {package.parent}: reinstall mone-export")


def source(*, patched: bool = True) -> Source:
    """Describe the pinned source, with the series applied or stock; reads the patches, fetches nothing."""
    folder = patches_dir()
    return Source(Upstream.load(folder / "UPSTREAM"), read_series(folder) if patched else (), patched)


def read_series(folder: Path) -> tuple[Path, ...]:
    """The patches of `folder` in the order its `series` file gives (one name a line, # starts a comment)."""
    lines = (line.strip() for line in (folder / "series").read_text(encoding="utf-8").splitlines())
    patches = tuple(folder / line for line in lines if line and not line.startswith("#"))
    if missing := [patch.name for patch in patches if not patch.is_file()]:
        raise MoneError(
            f"{folder / 'series'} names {', '.join(missing)}, not there: restore from version control"
        )
    return patches


def tree(*, patched: bool = True, whole: bool = False, progress: Progress = quiet) -> Path:
    """The llama.cpp source tree, fetched, unpacked and patched if need be.

    Unless `whole`, the wheel's part will do: what the converter reads (`conversion/`, `gguf-py`).
    """
    state = source(patched=patched)
    found = state.unpacked  # what is there is complete: no need to wait for a build in progress
    if found and (found == state.tree or not whole):
        return found
    with locked(state.folder, progress):
        prepare(state, progress)
    return state.tree


def prepare(state: Source, progress: Progress = quiet) -> None:
    """Make `state.package`, unless it is there; the caller holds the lock of `state.folder`."""
    if state.package.is_dir():
        return
    patcher = _patch_command() if state.patches else []
    sdist = fetch(state.upstream, progress)
    part = state.package.with_name("source.part")
    shutil.rmtree(part, ignore_errors=True)
    progress(0, 0, f"unpacking {sdist.name}")
    unpack(sdist, part)
    for done, patch in enumerate(state.patches):
        progress(done, len(state.patches), "applying the patches")
        _apply(patcher, patch, part / state.upstream.tree)
    part.rename(state.package)


def fetch(upstream: Upstream | None = None, progress: Progress = quiet) -> Path:
    """Bring the pinned sdist into the cache, unless it is there, and return its path.

    Raises MoneError when the download fails or the SHA-256 is not the pinned one.
    """
    wanted = upstream or source(patched=False).upstream
    target = cache_dir() / wanted.sdist
    with locked(cache_dir(), progress):
        if not target.exists():
            progress(0, 0, f"downloading {wanted.sdist}")
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                found = download(wanted.package, wanted.version, Path(folder))
                _check_sha256(found, wanted)
                found.rename(target)
        else:
            _check_sha256(target, wanted)
    return target


def download(package: str, version: str, folder: Path) -> Path:
    """Download the sdist of a release into `folder` with pip, running none of its code."""
    by_hand = f"download the sdist of {package} {version} by hand into {cache_dir()} and run this again"
    if importlib.util.find_spec("pip") is None:
        raise MoneError(f"{sys.executable} has no pip: run `{sys.executable} -m ensurepip`, or {by_hand}")
    stub = folder / "stub"
    (stub / "scikit_build_core").mkdir(parents=True)
    text = _STUB_BACKEND.format(name=package.replace("-", "_"), version=version)
    (stub / "scikit_build_core" / "__init__.py").touch()
    (stub / "scikit_build_core" / "build.py").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    command += [
        "--disable-pip-version-check",
        "--no-binary",
        ":all:",
        "--dest",
        str(folder),
        f"{package}=={version}",
    ]
    result = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(stub)},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    found = sorted(folder.glob("*.tar.gz"))
    if result.returncode or not found:
        raise MoneError(f"pip could not download {package} {version} ({last_line(result.stderr)}): {by_hand}")
    return found[0]


def unpack(sdist: Path, target: Path) -> None:
    """Unpack an sdist into `target` without its top folder, git metadata and large files of no use here.

    Files and folders only: a link, a device or a way out of `target` is refused. Not left to tarfile's
    filters, which Python has from 3.11.4 on: Debian 12's has none.
    """
    with tarfile.open(sdist) as archive:
        for member in archive:
            inner = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            if not inner.parts or ".git" in inner.parts or any(inner.match(pattern) for pattern in _LEFT_OUT):
                continue
            if not (member.isfile() or member.isdir()) or re.search(r"^/|(^|/)\.\.(/|$)|[\\:]", member.name):
                raise MoneError(
                    f"{sdist} is refused: {member.name!r} is no plain file or folder inside of it"
                )
            file = target / inner
            (file if member.isdir() else file.parent).mkdir(parents=True, exist_ok=True)
            if content := archive.extractfile(member):
                with content, file.open("xb") as out:
                    shutil.copyfileobj(content, out)
                file.chmod(0o755 if member.mode & 0o100 else 0o644)


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def last_line(text: str) -> str:
    """The last line of a program's output that says something, for use inside a message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


@contextmanager
def locked(folder: Path, progress: Progress = quiet) -> Iterator[int]:
    """Hold the folder's lock, waiting for another process if need be; yields the descriptor.

    A child process that inherits the descriptor keeps the lock even when this process is killed (not on
    Windows). What cannot be written in the block is a MoneError, too.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        waiting = partial(progress, 0, 0, f"waiting for another process that works in {folder}")
        with locks.locked(folder / "lock", waiting=waiting) as descriptor:
            yield descriptor
    except OSError as error:
        raise MoneError(
            f"cannot write to {error.filename or folder} ({error.strerror}): make it writable, free some "
            "space, or set MONE_CACHE to a folder elsewhere"
        ) from None


def _check_sha256(file: Path, upstream: Upstream) -> None:
    if (found := sha256_of(file)) != upstream.sha256:
        raise MoneError(
            f"{file} has SHA-256 {found}, patches/UPSTREAM pins {upstream.sha256}: "
            "remove the file if it is in the cache, and make sure that your package index serves the original"
        )


def _patch_command() -> Sequence[str]:
    if git := shutil.which("git"):
        return [git, "apply", "--whitespace=nowarn"]
    if patch := shutil.which("patch"):
        return [patch, "-p1", "--forward", "--batch", "--fuzz=0", "-i"]
    raise MoneError("neither git nor patch is here to apply the patches: apt install git (or patch)")


def _apply(command: Sequence[str], patch: Path, tree: Path) -> None:
    # A repository around the cache, or git settings of the user, must not change what `git apply` does.
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    env |= {"GIT_CEILING_DIRECTORIES": str(tree.resolve().parent), "GIT_CONFIG_GLOBAL": os.devnull}
    env |= {"GIT_CONFIG_NOSYSTEM": "1"}
    result = subprocess.run(
        [*command, str(patch)], cwd=tree, env=env, capture_output=True, encoding="utf-8", errors="replace"
    )
    if result.returncode:
        said = last_line(result.stderr or result.stdout)
        raise MoneError(
            f"{patch.name} does not apply to {tree} ({said}): reinstall mone-export, or restore patches/"
        )
