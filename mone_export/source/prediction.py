"""Blocks that predict further tokens (MTP): whether the file holds them, and why not.

No calibration sees them, so that their experts stay whole. A file can hold them where llama.cpp has a place
for them, and where their experts are as many as its layers' own.
"""

import re
from pathlib import Path

from mone_export.artifacts import MoeSpec
from mone_export.recipe import Mtp
from mone_export.source.weights import open_weights, prediction_tensors

_EXPERT = re.compile(r"\.experts\.(?:(\d+)\.|)")


def reason_to_leave_out(path: Path, spec: MoeSpec, names: list[str], mtp: Mtp) -> str | None:
    """Return why the blocks that `names` are of cannot be kept, None where nothing is known against it."""
    if mtp == "drop":
        return "not asked for"
    n_expert = _experts_of(path, names)
    if n_expert not in (0, spec.n_expert):
        return f"they have {n_expert} experts, the model's own layers {spec.n_expert}"
    return None


def remark(names: list[str], reason: str) -> str:
    """Return the sentence that says so."""
    return f"the file leaves out the blocks for multi-token prediction ({len(names)} tensors): {reason}"


def blocks_after(path: Path, spec: MoeSpec) -> list[str]:
    """Return the names of the blocks' tensors in the checkpoint, none where it has no such block."""
    return list(prediction_tensors(open_weights(path), spec.n_layer))


def _experts_of(path: Path, names: list[str]) -> int:
    """Return how many experts the blocks have, from the headers; 0 where they have none."""
    owner, counts = open_weights(path), [0]
    for name in names:
        if match := _EXPERT.search(name):
            counts.append(int(match[1]) + 1 if match[1] else owner[name].get_slice(name).get_shape()[0])
    return max(counts)
