"""Which files hold a checkpoint's weights: one answer for everybody who reads them.

The index `model.safetensors.index.json` decides, else `model.safetensors` is all there is. Whatever else
lies in the folder (shards of an older revision, a copy in another form, statistics of ours) is no part of the
model.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mone_export.errors import MoneError, first_line
from mone_export.lazily import Tensor, torch
from mone_export.runtime import Progress
from mone_export.source.fingerprints import remembered
from mone_export.source.hub import INDEX, SINGLE
from mone_export.source.hub import weight_files as listed_files

NOVICE = ".approx_value"  # how the name of a constant in the place of an expert ends (`substituted`)


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights of a model folder, ascending.

    Raises `MoneError` when there are none, one is missing, or the index is broken.
    """
    files = [folder / name for name in listed_files(folder)]
    missing = [file.name for file in files if not file.exists()]
    if not missing:
        return files
    if not (folder / INDEX).exists():
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        found = f" (only {', '.join(others[:3])})" if others else ""
        raise MoneError(
            f"{folder} holds neither {SINGLE} nor {INDEX}{found}: pass the folder of a complete model, "
            "converted to safetensors if it has other weights"
        )
    stale = f", or remove {INDEX} if {SINGLE} is the whole model" if (folder / SINGLE).exists() else ""
    raise MoneError(
        f"{folder} lacks {len(missing)} of the {len(files)} files of weights that its index lists: get "
        f"{missing[0]}{stale}"
    )


def left_out(folder: Path) -> list[str]:
    """Return the safetensors files of a model folder that are no part of the model, by name."""
    used = {path.name for path in weight_files(folder)}
    return sorted(path.name for path in folder.glob("*.safetensors") if path.name not in used)


def open_weights(folder: Path) -> dict[str, Any]:
    """Return the open safetensors file of every tensor by name; reads the headers only.

    What is taken from them is read, not mapped: the pages of a large file would fill the memory.

    Raises `MoneError` when there are no such files, or when one is missing, cut off or something else.
    """
    from safetensors import SafetensorError, safe_open

    owner: dict[str, Any] = {}
    for file in weight_files(folder):
        try:
            handle = safe_open(file, framework="pt", backend="pread")
            owner |= dict.fromkeys(handle.keys(), handle)
        except (OSError, SafetensorError, ValueError) as error:
            raise MoneError(f"cannot read the weights in {file}: {first_line(error)}; get it again") from None
    return owner


def fingerprint(folder: Path, *, progress: Progress | None = None) -> str:
    """Return the SHA-256 of a checkpoint's tensors, and refuse one with NaN or Inf in it.

    Hashed, for each tensor in ascending order of name: `<name> <dtype> <shape>\\n` as UTF-8 (safetensors'
    dtype, the shape as a JSON list), then its bytes in the file's little-endian row-major layout. How tensors
    are spread over files does not matter.

    What was found for the same files (by path, size, time of change and inode) is not computed again.
    """
    return remembered(weight_files(folder), lambda: _hash(folder, progress))


def _hash(folder: Path, progress: Progress | None) -> str:
    """Read and hash all tensors; the next one is read while one is hashed."""
    from safetensors import SafetensorError

    owner = open_weights(folder)
    digest, names = hashlib.sha256(), sorted(owner)
    try:
        with ThreadPoolExecutor(max_workers=1) as reader:
            coming = reader.submit(owner[names[0]].get_tensor, names[0]) if names else None
            for done, name in enumerate(names, start=1):
                assert coming is not None
                tensor = coming.result()
                if done < len(names):
                    coming = reader.submit(owner[names[done]].get_tensor, names[done])
                header = (
                    f"{name} {owner[name].get_slice(name).get_dtype()} {json.dumps(list(tensor.shape))}\n"
                )
                digest.update(header.encode())
                if tensor.numel():
                    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
                _refuse_non_finite(name, tensor, folder)
                if progress:
                    progress(done, len(owner), "reading the checkpoint")
    except (OSError, SafetensorError) as error:
        raise MoneError(f"cannot read the weights in {folder}: {first_line(error)}; get them again") from None
    return digest.hexdigest()


def _refuse_non_finite(name: str, tensor: Tensor, folder: Path) -> None:
    """Insist on finite values: the extremes of a tensor are NaN if any of its values is."""
    if not tensor.is_floating_point() or tensor.element_size() == 1 or not tensor.numel():
        return
    low, high = torch.aminmax(tensor)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise MoneError(
            f"{folder}: tensor {name} holds NaN or infinite values; the checkpoint is broken, get it again"
        )


def prediction_tensors(names: Mapping[str, Any], n_layer: int) -> Iterator[str]:
    """Yield the tensors after the last layer, of blocks that predict further tokens: never run here."""
    numbered = re.compile(r"^(model\.)?(language_model\.)?(model\.)?layers\.(\d+)\.")
    for name in names:
        if re.search(r"(^|\.)mtp\.", name) or ((match := numbered.match(name)) and int(match[4]) >= n_layer):
            yield name
