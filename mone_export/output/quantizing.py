"""The types llama.cpp's converter cannot write: which type llama-quantize would give to each tensor."""

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from mone_export.errors import MoneError
from mone_export.runtime import path, program

QUANTIZE_TYPES = (
    *("q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m"),
    *("q5_k_s", "q5_k_m", "q6_k", "iq3_s", "iq3_m", "iq4_nl", "iq4_xs"),
)
# llama-quantize makes these only with an importance matrix
IMATRIX_TYPES = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "q2_k_s")

# what the file then says of it: the same for every text, so that sizes are known before
IMATRIX_FILE, IMATRIX_TEXT = "imatrix.gguf", "calibration"

Kinds = Mapping[str, str]
"""Tensors that get another type than llama-quantize would give them, such as `q4_k`, by name."""
_NO_KINDS: Kinds = {}

_TENSOR = re.compile(
    r"\[\s*\d+/\s*\d+\]\s+(\S+)\s+- \[[^]]*\], type =\s+(\S+), size = .*?(?:-> .*\((\S+)\))?$", re.MULTILINE
)


def quantized_types(
    head: Path, outtype: str, *, kinds: Kinds = _NO_KINDS, imatrix: Path | None = None
) -> dict[str, str]:
    """Return the type that quantising `head` would give to each of its tensors, from its header alone.

    Some depend on whether there is an importance matrix: any will do.
    """
    options = ["--dry-run", "--allow-requantize", *(["--imatrix", str(imatrix)] if imatrix else [])]
    options += _named(kinds, head.parent)
    lines = _run([*options, str(head), outtype.upper()])
    types = {name: new or old for name, old, new in _TENSOR.findall("\n".join(lines))}
    if not types:
        raise MoneError(f"llama-quantize cannot make {outtype} of this model: {lines[-1] if lines else ''}")
    return {name: kind.lower() for name, kind in types.items()}


def _named(kinds: Kinds, folder: Path) -> list[str]:
    """Return the options by which llama-quantize gives tensors types of their own."""
    if not kinds:
        return []
    file = folder / "types.txt"
    file.write_text(
        "".join(f"^{re.escape(name)}$={kind}\n" for name, kind in kinds.items()), encoding="utf-8"
    )
    return ["--tensor-type-file", str(file.absolute())]


def _run(arguments: list[str]) -> list[str]:
    """Run llama-quantize and return the lines it printed."""
    command = [str(program(path(), "llama-quantize")), *arguments]
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise MoneError(f"cannot run {command[0]} ({error.strerror}): run `mone-llama build`") from None
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    if done.returncode != 0:
        reasons = [line for line in lines if "error" in line or "failed" in line]
        raise MoneError(f"llama-quantize failed: {(reasons or lines or ['no output'])[-1]}")
    return lines
