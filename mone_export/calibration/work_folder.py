"""A folder that keeps what a calibration has finished: the same command goes on after any death.

    job.json            what is calibrated: model, text, and the options that change the sums
    <step>.safetensors  the statistics of a step: layer <step> - 1 of a streamed model, or all layers after
                        the first <step> rows of one in memory
    lock                held by the process at work, so that no two share the folder
    states/             what a streamed model's layers have handed on (`streaming.RowStates`)

A step's file appears, complete, by a rename; whatever it does not yet speak for is computed again.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mone_export import files
from mone_export.artifacts import Found, load_found, save_found
from mone_export.errors import MoneError
from mone_export.locks import NoLocksError, locked
from mone_export.terminal import as_size

log = logging.getLogger(__name__)

Job = Mapping[str, str | int]


class WorkFolder:
    """The steps of one job in one folder."""

    def __init__(self, folder: Path, job: Job) -> None:
        """Begin or go on; raises `MoneError` when the folder belongs to another job."""
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = begun(folder)
            for what, value in job.items():
                if found and found.get(what) != value:
                    raise MoneError(
                        f"{folder} was begun with {what} {found.get(what)}, now it is {value}: choose "
                        "another --workdir, or the same model, text, --chunks, --ctx-size and options"
                    )
            self._sweep()
            if not found:
                part = folder / "job.json.part"
                part.write_text(json.dumps(dict(job), indent=1), encoding="utf-8")
                files.replace(part, folder / "job.json")
        except OSError as error:
            raise MoneError(f"cannot write to {folder}: {error.strerror}; choose another --workdir") from None

    @property
    def states(self) -> Path:
        """The folder for what a streamed model's layers hand on."""
        return self.folder / "states"

    def reserve(self, needed: int) -> None:
        """Say how many bytes the folder will take at most; raises `MoneError` when there are fewer."""
        log.info("%s will take up to %s", self.folder, as_size(needed))
        steps = (*self.folder.glob("*"), *self.states.rglob("*"))  # not what another pass keeps there
        taken = sum(file.stat().st_size for file in steps if file.is_file())
        if needed - taken > (free := shutil.disk_usage(self.folder).free):
            raise MoneError(
                f"{self.folder} needs {as_size(needed)}, {as_size(free)} are free: "
                "free some space, choose another --workdir, or pass fewer --chunks"
            )

    def steps(self) -> list[int]:
        """Return the finished steps, ascending."""
        return sorted(int(file.stem) for file in self.folder.glob("*.safetensors"))

    def load(self, step: int) -> Found:
        """Return the statistics of a finished step."""
        return load_found(self._file(step))[1]

    def save(self, step: int, found: Found) -> None:
        """Keep the statistics of a step; once this returns, the step is finished.

        What the layer before has handed on is on the disk by then, too: the next step begins with it.
        """
        for file in self.states.glob(f"{step - 1}-*"):
            files.flush(file)
        save_found(self._file(step), found, {})

    def forget(self, step: int) -> None:
        """Remove a step that a later one includes."""
        self._file(step).unlink()

    def clear(self) -> None:
        """Remove all steps: the statistics are complete, and kept elsewhere."""
        for step in self.steps():
            self.forget(step)
        self._sweep()
        shutil.rmtree(self.states, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what a process that died left half written: files, and folders in which one was made."""
        for part in (*self.folder.glob(".tmp*"), *self.folder.glob("*.part")):
            if part.is_dir():
                shutil.rmtree(part)
            else:
                part.unlink()

    def _file(self, step: int) -> Path:
        return self.folder / f"{step}.safetensors"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a work folder, made if need be, for the length of the block.

    Raises `MoneError` where one is at work in it. On a file system without locks nobody is kept out.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / "lock"))
        except NoLocksError as error:
            log.warning("%s; until then run one export at a time with this --workdir", error)
        except OSError as error:
            raise MoneError(f"cannot write to {folder}: {error.strerror}; choose another --workdir") from None
        yield


def begun(folder: Path) -> dict[str, str | int]:
    """Return the job that a folder was begun with; nothing for a new one."""
    try:
        job: dict[str, str | int] = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise MoneError(
            f"{folder} is no work folder of mone-export ({error}): choose another --workdir"
        ) from None
    return job
