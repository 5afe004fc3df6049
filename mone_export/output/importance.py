"""importance_matrix(): what the inputs of a file's matrices are, for rounding them where it matters least.

The calibration has seen them in the unpruned model, on the way. Experts that stay have the inputs that they
had; thin ones, of the channels that they keep. So the matrix is numbered as the file is.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mone_export.artifacts import Calibration, InputSums, LayerPlan, Plan, Tier
from mone_export.errors import MoneError
from mone_export.output.provenance import Keys
from mone_export.output.quantizing import IMATRIX_TEXT, IMATRIX_TYPES
from mone_export.output.thin_experts import Thinner, own_channels
from mone_export.source import Source
from mone_export.source.gguf_format import matrix_of, part_of
from mone_export.source.imatrix import save_imatrix

log = logging.getLogger(__name__)

_CHUNK = 512  # tokens
_MATRIX = re.compile(r"blk\.\d+\..*\.weight")
_TIER = re.compile(r"(.*)\.t(\d+)\.weight")


@dataclass(frozen=True, slots=True)
class Rounding:
    """What a file is rounded to, `outtype`; by an importance matrix, if `with_imatrix`.

    `imatrix` says where the matrix is kept, None: nowhere. `stated` are keys of the file that say which
    command made it.
    """

    outtype: str = "auto"
    with_imatrix: bool = False
    imatrix: Path | None = None
    stated: Keys = field(default_factory=dict)


def importance_matrix(
    shapes: Mapping[str, tuple[int, ...]],
    source: Source,
    calibration: Calibration | None,
    plan: Plan,
    rounding: Rounding,
    *,
    thinner: Thinner | None = None,
) -> dict[str, np.ndarray]:
    """Return the mean squared inputs of a file's matrices, float32 [n_matrix, n_in], by name.

    `shapes` are those of all its tensors, in numpy's order. None where no matrix is wanted; of one whose
    inputs nobody saw it says nothing, or, for types that cannot do without, that all its channels matter
    alike. Raises `MoneError` where the calibration has seen no inputs.
    """
    if not rounding.with_imatrix:
        return {}
    if calibration is None or not calibration.inputs:
        raise MoneError(
            "there is no importance matrix without a calibration that saw the matrices' inputs: leave out "
            "--imatrix, or calibrate again with another --stats file"
        )
    matrices = {
        name: ((1, *shape)[-3], shape[-1])  # how many, and columns of each
        for name, shape in shapes.items()
        if _MATRIX.fullmatch(name) and len(shape) > 1
    }
    found = _of_file(matrices, source.named_inputs(calibration.inputs), plan, thinner)
    if rounding.outtype in IMATRIX_TYPES:
        others = {name: shape for name, shape in matrices.items() if name not in found}
        found |= {name: _alike(name, *shape) for name, shape in others.items()}
    if rounding.imatrix is not None:
        n_token, text = calibration.n_token, calibration.corpus_name
        size = chunk_size(n_token)
        save_imatrix(rounding.imatrix, found, dataset=text, n_token=n_token, chunk_size=size)
    return {name: _means(name, *found.pop(name)) for name in list(found)}


def chunk_size(n_token: int) -> int:
    """Return how many tokens make a chunk of a text: the format wants a number."""
    return min(_CHUNK, n_token)


Sums = tuple[np.ndarray, np.ndarray]
"""Squares [n_matrix, n_in] and numbers of rows, as in `InputSums`."""


def _means(name: str, squares: np.ndarray, n_row: np.ndarray) -> np.ndarray:
    """Return the means as llama-quantize makes them of a file's sums: ones for what nothing went into."""
    sums, counts = squares.astype(np.float32), n_row.astype(np.float32)
    each = sums.reshape(len(counts), -1)
    means = np.divide(each, counts[:, None], out=np.ones_like(each), where=counts[:, None] > 0)
    if not np.isfinite(means).all():
        raise MoneError(f"the inputs of {name} are not finite: calibrate again with --dtype float32")
    return means.reshape(sums.shape)


def _of_file(
    shapes: Mapping[str, tuple[int, int]],
    inputs: Mapping[str, InputSums],
    plan: Plan,
    thinner: Thinner | None,
) -> dict[str, Sums]:
    """Return the sums of a file's matrices, by name, as far as they were seen."""
    from mone_export.calibration.input_sums import inputs_name

    layers = {layer.layer: layer for layer in plan.layers}
    found: dict[str, Sums] = {}
    for name, shape in shapes.items():
        match = _TIER.fullmatch(name)
        whole, number = (f"{match[1]}.weight", int(match[2])) if match else (name, 0)
        if (sums := inputs.get(inputs_name(whole))) is None:
            continue
        own = sums.squares.numpy(), sums.n_row.numpy()
        layer, part = part_of(whole) or (-1, None)
        if part == "experts" and layer in layers:
            tier = _tier(layers[layer], number, plan)
            own = _of_tier(own, layers[layer], tier, thinner if matrix_of(whole) == "down" else None)
        if own[0].shape == shape:
            found[name] = own
        else:
            log.debug("%s: inputs %s were seen, it has %s", name, own[0].shape, shape)
    return found


def _tier(layer: LayerPlan, number: int, plan: Plan) -> Tier | None:
    """Return the experts of a tensor and their width, None for the whole ones that stay."""
    if number:
        return layer.tiers[number - 1]
    return Tier(plan.width, layer.kept) if plan.width else None


def _of_tier(sums: Sums, layer: LayerPlan, tier: Tier | None, thinner: Thinner | None) -> Sums:
    """Return the sums of some experts; with a `thinner`, of the channels that they keep."""
    squares, n_row = sums
    experts = list(tier.experts if tier else layer.kept)
    own = squares[experts]
    if tier and thinner and tier.width < squares.shape[1]:
        only = LayerPlan(layer.layer, (), (), (tier,))
        places = np.stack([channels for _, channels in own_channels(only, thinner, squares.shape[1])])
        own = np.take_along_axis(own, places, axis=1)
    return own, n_row[experts]


def _alike(name: str, n_matrix: int, n_in: int) -> Sums:
    """Return sums by which all channels of a matrix matter alike."""
    return np.ones((n_matrix, n_in)), np.ones(n_matrix if "_exps" in name else 1)


def any_imatrix(folder: Path) -> Path:
    """Make an importance matrix of nothing, for asking which types a file would have with a real one."""
    outfile = folder / "nothing.gguf"
    nothing = {"none": (np.ones((1, 1)), np.ones(1))}
    save_imatrix(outfile, nothing, dataset=IMATRIX_TEXT, n_token=1, chunk_size=1)
    return outfile
