"""importance_matrix(): what the inputs of a file's matrices are, for rounding them where it matters least.

The file itself is run by llama.cpp over the first tokens of the calibration text, experts that are left and
all else; so the matrix is numbered as the file, and is the pruned model's own.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mone_export.artifacts import Corpus
from mone_export.calibration.corpus import head
from mone_export.llama_options import LlamaOptions
from mone_export.memory import free_memory
from mone_export.output.provenance import Keys
from mone_export.output.quantizing import IMATRIX_FILE, IMATRIX_TEXT, IMATRIX_TYPES
from mone_export.runtime import Progress
from mone_export.source import GgufFile

log = logging.getLogger(__name__)

N_TOKEN = 51_200  # at most: as many as 100 of llama-imatrix's chunks
_WITH_WORK = 1.1  # times its size: what a file that runs takes


@dataclass(frozen=True, slots=True)
class Rounding:
    """What a file is rounded to, `outtype`, and by which text: with an importance matrix, unless None.

    `imatrix` says where the matrix is kept, None: nowhere. `llama` is how llama.cpp runs the model for it.
    `stated` are keys of the file that say which command made it.
    """

    outtype: str = "auto"
    text: Corpus | None = None
    imatrix: Path | None = None
    llama: LlamaOptions = LlamaOptions()
    stated: Keys = field(default_factory=dict)


def importance_matrix(base: Path, rounding: Rounding, *, progress: Progress | None = None) -> Path | None:
    """Make the importance matrix of a file, beside it, and return where; None where there is no text for it.

    A file that does not fit into memory is not run unless its type, or the user, asks for the matrix.
    """
    if rounding.text is None:
        return None
    needed = rounding.imatrix is not None or rounding.outtype in IMATRIX_TYPES
    if not needed and base.stat().st_size * _WITH_WORK > free_memory():
        log.warning("rounded without an importance matrix: %s does not fit into memory to be run", base.name)
        return None
    # which need PyTorch; what only asks for types and sizes does not
    from mone_export.calibration.imatrix_sums import ImatrixSums
    from mone_export.calibration.through_llamacpp import LlamaEngine
    from mone_export.source.imatrix import save_imatrix

    seq_len = rounding.text.tokens.shape[1]
    text = head(rounding.text, max(1, N_TOKEN // seq_len))
    sums = ImatrixSums()
    with LlamaEngine(base, GgufFile(base).spec, options=rounding.llama) as engine:
        engine.observe_inputs(text, sums, progress=progress)
    outfile = base.with_name(IMATRIX_FILE)
    for path, name in ((outfile, IMATRIX_TEXT), (rounding.imatrix, text.name)):
        if path is not None:
            save_imatrix(
                path,
                {matrix: values.numpy() for matrix, values in sums.squares.items()},
                {matrix: values.numpy() for matrix, values in sums.n_row.items()},
                dataset=name,
                n_token=text.tokens.numel(),
                chunk_size=seq_len,
            )
    return outfile


def any_imatrix(folder: Path) -> Path:
    """Make an importance matrix of nothing, for asking which types a file would have with a real one."""
    from mone_export.source.imatrix import save_imatrix

    nothing = {"none": np.ones((1, 1), np.float32)}
    outfile = folder / "nothing.gguf"
    save_imatrix(outfile, nothing, {"none": np.ones(1)}, dataset=IMATRIX_TEXT, n_token=1, chunk_size=1)
    return outfile
