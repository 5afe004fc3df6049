"""A finished GGUF in several files, as hubs with a limit want it: by the patched tree's llama-gguf-split."""

import shutil
import subprocess
from pathlib import Path

from mone_export import files
from mone_export.errors import MoneError
from mone_export.paths import is_ours
from mone_export.runtime import path, program

LEAST = 10**6  # bytes: the tool counts in millions


def split(outfile: Path, largest: int, *, overwrite: bool = False) -> Path:
    """Put `NAME-00001-of-0000N.gguf` of at most `largest` bytes of tensors in the place of NAME.gguf.

    Returns the first of them. A file that is small enough stays as it is. Raises `MoneError` where the tool
    fails, or a file that is no GGUF of ours is in the way; then the whole file stays.
    """
    if outfile.stat().st_size <= largest:
        return outfile
    name = outfile.name.removesuffix(".gguf")
    folder = outfile.with_name(f"{outfile.name}.split.part")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
        command = [
            str(program(path(), "llama-gguf-split")),
            "--split",
            "--split-max-size",
            f"{largest // LEAST}M",
        ]
        done = subprocess.run(
            [*command, outfile, folder / name], capture_output=True, encoding="utf-8", errors="replace"
        )
        parts = sorted(folder.glob("*.gguf"))
        if done.returncode or not parts:
            said = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
            raise MoneError(f"llama-gguf-split failed ({said[-1]}): {outfile} is complete, in one file")
        targets = [outfile.with_name(part.name) for part in parts]
        if foreign := [
            target for target in targets if target.exists() and not (overwrite or is_ours(target))
        ]:
            raise MoneError(f"{foreign[0]} exists and is no GGUF of mone-export: pass --overwrite")
        for part, target in zip(parts, targets, strict=True):
            files.replace(part, target)
        outfile.unlink()
    except OSError as error:
        raise MoneError(f"cannot split {outfile} ({error.strerror}): it is complete, in one file") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return targets[0]
