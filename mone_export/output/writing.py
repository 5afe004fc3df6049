"""write(): the writing seam. A model, its statistics and a plan in; a GGUF out, in one pass.

What each tensor becomes is decided here, by its GGUF name alone (`gguf_format`); how it is read and written
is llama.cpp's business (`llamacpp`). Types the converter does not know are made on the way (`packing`), as
llama-quantize would.
"""

import logging
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mone_export.architectures import SHARED_BY_COUNT
from mone_export.artifacts import Calibration, MoeSpec, Plan, Tier
from mone_export.errors import MoneError
from mone_export.lazily import Tensor, torch
from mone_export.output.importance import Rounding, any_imatrix, chunk_size, importance_matrix
from mone_export.output.packing import Rounded
from mone_export.output.provenance import Keys, measured, origin, provenance
from mone_export.output.quantizing import (
    IMATRIX_FILE,
    IMATRIX_TEXT,
    IMATRIX_TYPES,
    QUANTIZE_TYPES,
    quantized_types,
)
from mone_export.output.recombining import Recombination
from mone_export.output.thin_experts import (
    Thinner,
    constants,
    own_channels,
    own_outputs,
    tier_of,
)
from mone_export.paths import replacing
from mone_export.pruning.novices import novices as novices_of
from mone_export.recipe import DEFAULT_NOVICE
from mone_export.runtime import Progress
from mone_export.source import Rewriting, Source, ggml, open_source
from mone_export.source.gguf_format import (
    COUNT_KEY,
    EXPERT_WIDTH_KEY,
    GGUF_ALIGNMENT,
    GROUP_COUNT_KEY,
    KEPT_COUNT_KEY,
    SHARED_COUNT_KEY,
    SHARED_WIDTH_KEY,
    TIER_COUNT_KEY,
    TIER_SIZES_KEY,
    WIDTH_KEY,
    holds_ids,
    matrix_of,
    novice_tensor,
    part_of,
    slot_tensor,
    tier_tensor,
)
from mone_export.source.gguf_types import gguf_constants, padded_bytes
from mone_export.source.llamacpp import CONVERTER_TYPES
from mone_export.source.opened import Derived, Read, Rows
from mone_export.source.pruned_before import PrunedBefore

log = logging.getLogger(__name__)

OUTTYPES = (*CONVERTER_TYPES, *QUANTIZE_TYPES, *IMATRIX_TYPES)


def write(
    model: "str | Path | Source",
    calibration: Calibration | None,
    plan: Plan,
    outfile: str | Path,
    *,
    novices: Mapping[int, Tensor] | Thinner | None = None,
    outtype: str | Rounding = "auto",
    progress: Progress | None = None,
) -> int:
    """Write the pruned model as a GGUF and return its size in bytes; needs no model in memory.

    The plan's recipe says what stands in for pruned experts; `novices` gives them, [n_expert, d] per layer,
    where the statistics alone do not, or makes the thin experts that the plan has. `calibration` may be None
    where the plan needs no statistics. `outtype` is the type; one that the source's conversion does not make
    itself is rounded by an importance matrix if the calibration saw the inputs of matrices, unless a
    `Rounding` says otherwise.

    The file appears under its name when it is complete; failure leaves nothing behind. Raises `MoneError` for
    a model that cannot be converted, an output that cannot be written, or too little disk.
    """
    source, target = open_source(model), Path(outfile)
    if plan.has_thin and not isinstance(novices, Thinner):
        raise MoneError("the plan has thin experts: pass as novices what plan_thin returned with it")
    source.fetch(progress=progress)
    plan = _renumbered(plan, source)
    if isinstance(outtype, Rounding):
        rounding = outtype
    else:
        seen = calibration is not None and bool(calibration.inputs)
        rounding = Rounding(outtype, with_imatrix=seen and outtype not in _direct_types(source, plan))
    if rounding.outtype in IMATRIX_TYPES and not rounding.with_imatrix:
        raise MoneError(f"{rounding.outtype} needs an importance matrix: pass a calibration that saw inputs")
    stored = stored_novices(calibration, plan, source, novices)
    thinner = novices if isinstance(novices, Thinner) else None
    edits = Edits(plan, stored, importances(calibration), thinner)
    text = None
    if calibration and plan.recipe.needs_statistics:
        found = measured(calibration, plan, stored, thinner.errors if thinner else {})
        text = calibration.corpus_sha256, calibration.n_token, found
    keys = provenance(plan, source) | origin(source, source.fingerprint(progress=progress), text)
    keys |= rounding.stated
    direct = rounding.outtype in _direct_types(source, plan)
    conversion = edits.apply(source, outtype=rounding.outtype if direct else "auto")
    try:
        shapes, keys = conversion.shapes, _loading_keys(conversion, plan, source) | keys
        types = conversion.types if direct else _rounded_types(conversion, keys, source, plan, rounding)
        importance = importance_matrix(shapes, source, calibration, plan, rounding, thinner=thinner)
        if not direct:
            n_token = calibration.n_token if calibration else 0
            keys |= _rounding_keys(rounding, len(importance), n_token)
        if conversion.remark:
            log.warning("%s", conversion.remark)
        with replacing(target) as part:
            # the converter packs its own types without a build of llama.cpp, too, on one core
            packing = Rounded(types, importance) if not direct or ggml.available() else None
            _write_file(conversion, part, keys, packing=packing, progress=progress)
    finally:
        conversion.close()
    return target.stat().st_size


def measure(model: "str | Path | Source", plan: Plan, *, outtype: str | Rounding = "auto") -> int:
    """Return the size of the file in bytes, without reading a weight.

    `outtype` is that of `write`, with statistics that saw the inputs of matrices.
    """
    source = open_source(model)
    if isinstance(outtype, Rounding):
        rounding = outtype
    else:
        rounding = Rounding(outtype, with_imatrix=outtype not in _direct_types(source, plan))
    found = layouts(source, plan, (rounding.outtype,), imatrix=rounding.with_imatrix, stated=rounding.stated)
    return found[rounding.outtype].size


def _rounded_types(
    conversion: Rewriting, keys: Keys, source: Source, plan: Plan, rounding: Rounding
) -> Mapping[str, str]:
    """Return the types of the tensors of a file that is rounded, by name; `keys` are those of its head."""
    if source.packed:
        log.warning(
            "%s is rounded to %s already, and --outtype %s rounds it once more: a copy in F16 or BF16 would "
            "lose less",
            *(source.name, source.packed, rounding.outtype),
        )
    with temporary_folder() as folder:
        head = folder / "head.gguf"
        size = conversion.write_head(head, keys)
        conversion.close()
        make_holes(head, size)
        found = _asked(conversion, head, (rounding.outtype,), plan, imatrix=rounding.with_imatrix)[0]
    if missing := conversion.types.keys() - found.keys():
        raise MoneError(f"llama-quantize does not say which type {min(missing)} has in {rounding.outtype}")
    return found


def _asked(
    conversion: Rewriting, head: Path, outtypes: Iterable[str], plan: Plan, *, imatrix: bool
) -> list[Mapping[str, str]]:
    """Return what llama-quantize says of a file with holes: the types of its tensors, in several types."""
    ask = partial(
        quantized_types,
        head,
        kinds=_own_kinds(plan, conversion.shapes),
        imatrix=any_imatrix(head.parent) if imatrix else None,
    )
    with ThreadPoolExecutor() as pool:
        return list(pool.map(ask, outtypes))


def _rounding_keys(rounding: Rounding, n_matrix: int, n_token: int) -> Keys:
    """Return the keys that llama-quantize states: the type, and where its importance matrix was from."""
    gguf = gguf_constants()
    number = gguf.LlamaFileType[CONVERTER_TYPES.get(rounding.outtype, f"MOSTLY_{rounding.outtype.upper()}")]
    keys: Keys = {
        "general.quantization_version": ("UINT32", gguf.GGML_QUANT_VERSION),
        "general.file_type": ("UINT32", int(number)),
    }
    if rounding.with_imatrix:
        keys |= {
            "quantize.imatrix.file": ("STRING", IMATRIX_FILE),
            "quantize.imatrix.dataset": ("STRING", IMATRIX_TEXT),
            "quantize.imatrix.entries_count": ("UINT32", n_matrix),
            "quantize.imatrix.chunks_count": ("UINT32", n_token // chunk_size(n_token) if n_token else 0),
        }
    return keys


def packed_together(source: Source, outtype: str, *, mixed: bool = False) -> int:
    """Return how many weights of a row the type of a file's experts packs together, 1: each by itself.

    Where experts have types of their own, rows too short for one get another of smaller blocks.
    """
    if mixed:
        return 32
    if outtype == "auto":
        return source.block
    if outtype in ("f32", "f16", "bf16"):
        return 1
    return 32 if re.fullmatch(r"q\d_\d|mxfp4\w*|iq4_nl", outtype) else 256


@dataclass(frozen=True, slots=True)
class Layout:
    """A file before it is written: the bytes of its head, and each tensor's shape (numpy's order) and type.

    `added` are the tensors that only a pruned file has.
    """

    head_size: int
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, str]
    added: frozenset[str] = frozenset()

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        return self.head_size + sum(
            padded_bytes(self.shapes[name], kind) for name, kind in self.types.items()
        )

    def with_kept(self, n_kept: Mapping[int, int]) -> "Layout":
        """Return the layout with other numbers of experts, fewer than all, in pruned layers.

        By method `mone` nothing else changes in the file.
        """
        shapes = dict(self.shapes)
        for name, shape in self.shapes.items():
            layer, part = part_of(name) or (-1, None)
            if part == "experts" and layer in n_kept:
                shapes[name] = (n_kept[layer], *shape[1:])
        return replace(self, shapes=shapes)

    def size_with_all(self, spec: MoeSpec) -> int:
        """Return about how many bytes the file would have with all experts there are: tensors are exact.

        The head is taken to be as long; it is some bytes longer where experts are pruned.
        """
        whole = {name: shape for name, shape in self.shapes.items() if name not in self.added}
        for name, shape in whole.items():
            layer, part = part_of(name) or (-1, None)
            if part and layer in spec.moe_layers:
                axis = 1 if part == "router" and shape[0] == 1 else 0
                n_row = spec.present[layer] if part == "experts" else spec.n_expert
                whole[name] = (*shape[:axis], n_row, *shape[axis + 1 :])
        return self.head_size + sum(
            padded_bytes(whole[name], kind) for name, kind in self.types.items() if name in whole
        )


def layouts(
    source: Source,
    plan: Plan,
    outtypes: Sequence[str],
    *,
    types: Mapping[str, Mapping[str, str]] | None = None,
    imatrix: bool = False,
    stated: Keys | None = None,
) -> dict[str, Layout]:
    """Return the layout of a plan's file in each of several types, without reading a weight.

    Which types a file is rounded to, llama-quantize says when it is shown a file with our header and holes in
    place of its data. It is not asked for those of `types`, from a plan that prunes more of the same model's
    experts by method `mone`: how many there are makes no difference. With `imatrix` it is to have an
    importance matrix. `stated` are keys of `Rounding`.
    """
    blank = np.zeros((plan.spec.n_expert, plan.spec.hidden_size), np.float32)
    blank_sha256 = "0" * 64  # as long as the real one
    text = (blank_sha256, 0, blank_sha256) if plan.recipe.needs_statistics else None
    keys = provenance(plan, source) | origin(source, blank_sha256, text) | (stated or {})
    found: dict[str, Layout] = {}
    direct = _direct_types(source, plan)
    base_types = [outtype if outtype in direct else "auto" for outtype in outtypes]
    for base_type in dict.fromkeys(base_types):
        edits = Edits(plan, dict.fromkeys(plan.n_kept, blank), {})
        with written_head(edits, source, keys, outtype=base_type) as (head, size, conversion):
            base = Layout(
                head.stat().st_size, conversion.shapes, conversion.types, added=frozenset(edits.added)
            )
            if base_type in outtypes:
                found[base_type] = base
            quantized = set(outtypes).difference(direct) if base_type == "auto" else ()
            if quantized:
                make_holes(head, size)
            asked = _asked(conversion, head, () if types else quantized, plan, imatrix=imatrix)
            known = types or dict(zip(quantized, asked, strict=True))
            for outtype in quantized:
                own = {name: kind for name, kind in known[outtype].items() if name in base.shapes}
                added = _rounding_keys(Rounding(outtype, with_imatrix=imatrix), 0, 0)
                found[outtype] = replace(base, head_size=_head_size(conversion, added), types=own)
    return found


def ordinary_widths(source: Source, plan: Plan, widths: Sequence[int]) -> tuple[int, ...]:
    """Return those of `widths` that all experts of a model may have in a file without tiers.

    Raises `MoneError` where none can.
    """
    one = replace(plan, width=1)
    conversion = Edits(one, {}, {}).apply(source, outtype="auto")
    conversion.close()
    possible = []
    for width in widths:
        with suppress(MoneError):
            _width_keys(conversion, replace(plan, width=width))
            possible.append(width)
    return tuple(possible)


def _direct_types(source: Source, plan: Plan) -> Collection[str]:
    """Return the types that are written without rounding on the way."""
    return ("auto",) if plan.mixes_types else source.direct_types


def _own_kinds(plan: Plan, names: Iterable[str]) -> dict[str, str]:
    """Return the types that the plan gives to tensors of experts, by their names."""
    found: dict[str, str] = {}
    layers = {layer.layer: layer for layer in plan.layers}
    for name in names:
        number, part = part_of(name) or (-1, None)
        if part == "experts" and number in layers:
            layer = layers[number]
            own = {name: layer.kind}
            own |= {tier_tensor(name, place): tier.kind for place, tier in enumerate(layer.tiers, start=1)}
            found |= {tensor: kind for tensor, kind in own.items() if kind}
    return found


def _head_size(conversion: Rewriting, added: Keys) -> int:
    """Return the bytes of a head, which is written already, with numbers and strings added to its keys."""
    n_byte = conversion.head_length
    for key, (_, value) in added.items():
        n_byte += _value_bytes(value) + 12 + len(key)
        if (stated := conversion.key(key)) is not None:
            n_byte -= _value_bytes(stated) + 12 + len(key)
    return -(-n_byte // GGUF_ALIGNMENT) * GGUF_ALIGNMENT


def _value_bytes(value: object) -> int:
    return 8 + len(value.encode()) if isinstance(value, str) else 4


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a folder for the block; `MoneError` where the block cannot write to it."""
    try:
        with tempfile.TemporaryDirectory(prefix="mone-export-") as folder:
            yield Path(folder)
    except OSError as error:
        raise MoneError(
            f"cannot write temporary files ({error.strerror}): free some space there, or set TMPDIR"
        ) from None


@contextmanager
def written_head(
    edits: "Edits", source: Source, keys: Keys, *, outtype: str
) -> Iterator[tuple[Path, int, Rewriting]]:
    """Write a file's head alone, for the block: yields where, the bytes of the whole file, its conversion.

    The conversion is closed: it still knows names, shapes and types.
    """
    with temporary_folder() as folder:
        head = folder / "head.gguf"
        conversion = edits.apply(source, outtype=outtype)
        try:
            size = conversion.write_head(head, _loading_keys(conversion, edits.plan, source) | keys)
        finally:
            conversion.close()
        yield head, size, conversion


def make_holes(head: Path, size: int) -> None:
    """Make a head as long as its file, with holes in place of the data."""
    with head.open("r+b") as file:
        file.truncate(size)


class Edits:
    """What becomes of each tensor of a model, by its GGUF name: what `Conversion` asks about every one."""

    def __init__(
        self,
        plan: Plan,
        stored: Mapping[int, np.ndarray],
        importance: Mapping[int, Tensor],
        thinner: Thinner | None = None,
    ) -> None:
        """Take a plan, and the novices, float32 [n_expert, d], of its layers where its method has some.

        `importance` [n_expert] weighs the experts of each layer where new ones are made of them; `thinner`
        makes thin ones when they are written.
        """
        self.plan = plan
        self._thinner = thinner
        self._pruned = {layer.layer: layer for layer in plan.layers if layer.replaced or plan.width}
        with_novices = plan.recipe.method == "mone"
        self._novices = {layer: stored[layer] for layer in self._pruned} if with_novices else {}
        self.added: list[str] = []  # tensors that are not the model's own
        self._before: PrunedBefore | None = None  # by an earlier pruning
        self._scales: dict[int, np.ndarray] = {}  # [M], what the runtime multiplies experts' outputs by
        self._recombination = Recombination(plan, importance) if plan.recipe.method == "dern" else None

    @property
    def spec(self) -> MoeSpec:
        """The shape of the model."""
        return self.plan.spec

    @property
    def rewrites(self) -> bool:
        """Whether the selected experts are not copied but made by `rewrite`."""
        return self._recombination is not None

    def apply(self, source: Source, *, outtype: str) -> Rewriting:
        """Open the conversion of a model with these edits, novices added."""
        self._before = source.before
        # an ordinary file has one number of experts for all its blocks
        conversion = source.convert(edits=self, outtype=outtype, mtp=self.plan.recipe.mtp)
        if self._recombination:
            self._recombination.check()
        own = set(conversion.shapes)
        for number, novices in self._novices.items():
            self._add_novices(conversion, number, novices, has_bias=novice_tensor(number) in own)
        _check_complete(conversion, self.plan)
        return conversion

    def select(self, name: str) -> Sequence[int] | None:
        """Return the experts of a tensor that stay, None for a tensor that holds none."""
        layer, part = part_of(name) or (-1, None)
        if part != "experts":
            return None
        if layer not in self._pruned:
            return range(self.plan.spec.n_expert)
        return () if self.plan.width else self._pruned[layer].kept  # narrow ones are `derived`

    def derived(self, name: str, shape: Sequence[int]) -> Sequence[Derived]:
        """Return the tensors of the layer's tiers that are made of a tensor of experts."""
        layer, part = part_of(name) or (-1, None)
        if part != "experts" or layer not in self._pruned:
            return ()
        tiers = enumerate(self._pruned[layer].tiers, start=1)
        if self.plan.width:
            place = (layer, 0, Tier(self.plan.width, self._pruned[layer].kept))
            return [tier_of(name, shape, place, self._thinner, lambda _: 1.0)]
        scale = partial(self._scale_of, layer)
        made = [tier_of(name, shape, (layer, *numbered), self._thinner, scale) for numbered in tiers]
        self.added += [each.name for each in made]
        return made

    def rows(self, name: str, shape: Sequence[int]) -> Rows | None:
        """Return the entries of a tensor in the layer's order; pruned experts get novices, zeros or ones."""
        number, part = part_of(name) or (-1, None)
        if part is None or number not in self._pruned or self.plan.spec.n_expert not in shape:
            return None
        if self._recombination and part != "router":
            raise MoneError(f"{name}: --method dern cannot merge experts with a {part}: use --method drop")
        layer = self._pruned[number]
        if self.plan.width and part == "bias":
            tier = Tier(self.plan.width, layer.kept)
            inside = replace(layer, tiers=(tier,))
            none = np.zeros((len(layer.kept), tier.width), np.float32)
            return Rows((), none, own_channels(inside, self._thinner, shape[-1]))
        if number not in self._novices:
            return Rows(layer.kept)
        if part == "router":
            return None if self.plan.spec.keeps_numbers(number) else Rows(layer.order)
        if part == "down bias":
            novices = self._novices[number][list(layer.replaced)]
            return Rows(layer.kept, novices, own_outputs(layer, self.spec.expert_size, shape[-1]))
        others = np.full((len(layer.replaced), *shape[1:]), part == "scale", np.float32)
        return Rows(
            layer.kept, others, own_channels(layer, self._thinner, shape[-1]) if part == "bias" else ()
        )

    def edit(self, name: str, tensor: Tensor) -> Tensor:
        """Return what is written in place of a tensor that holds no experts' matrices."""
        layer, part = part_of(name) or (-1, None)
        if part == "scale" and layer in self._novices:
            self._scales[layer] = _scale(name, tensor)
        rows = self.rows(name, tensor.shape)
        if rows is None:
            return tensor
        lazy: Any = type(tensor)
        others = rows.filled(lambda: lazy.to_eager(tensor).float().numpy())
        own = _pick(tensor, rows.own, self.plan.spec.n_expert)
        if others is None:
            return own
        added = lazy.from_eager(torch.from_numpy(others))
        return torch.cat([own, added]) if rows.own else added

    def rewrite(self, name: str, read: Read) -> Sequence[Callable[[], Tensor]]:
        """Return what makes each expert of a tensor."""
        layer, _ = part_of(name) or (-1, None)
        if self._recombination and layer in self._pruned:
            return self._recombination.rewrite(layer, matrix_of(name), read)
        return [partial(read, expert) for expert in range(self.plan.spec.n_expert)]

    def _add_novices(
        self, conversion: Rewriting, number: int, novices: np.ndarray, *, has_bias: bool
    ) -> None:
        """Add a layer's novices, unless the model's bias holds them, and its slots where it needs them."""
        layer = self._pruned[number]
        constant = layer.pruned or any(tier.width < self.spec.expert_size for tier in layer.tiers)
        if constant and not has_bias:
            gone = list(layer.replaced)
            rows = np.zeros_like(novices)
            rows[len(layer.kept) :] = novices[gone]
            if number in self._scales:
                rows[len(layer.kept) :] *= self._scales[number][gone, None]
            self._add(conversion, novice_tensor(number), rows)
        if self.plan.spec.keeps_numbers(number):
            slots = np.argsort(layer.order).astype(np.int32)
            if self._before and (slots_before := self._before.slots(number)) is not None:
                slots = slots[slots_before]
            self._add(conversion, slot_tensor(number), slots[:, None])

    def _scale_of(self, layer: int, expert: int) -> float:
        """Return what the runtime multiplies an expert's output by; known when the tensors are written."""
        return float(self._scales[layer][expert]) if layer in self._scales else 1.0

    def _add(self, conversion: Rewriting, name: str, values: np.ndarray) -> None:
        conversion.add_tensor(name, values)
        self.added.append(name)


def _renumbered(plan: Plan, source: Source) -> Plan:
    """Return the plan with pruned experts by ascending original id, where the file numbers them otherwise."""
    if not (before := source.before):
        return plan
    numbers = {layer.layer: before.order.get(layer.layer, range(plan.spec.n_expert)) for layer in plan.layers}
    layers = (
        replace(layer, pruned=tuple(sorted(layer.pruned, key=numbers[layer.layer].__getitem__)))
        for layer in plan.layers
    )
    return replace(plan, layers=tuple(layers))


def importances(calibration: Calibration | None) -> dict[int, Tensor]:
    """Return the routing weight per token of each layer's experts, [n_expert]; none without statistics."""
    layers = calibration.layers.items() if calibration else ()
    return {layer: stats.gate_sum / stats.n_token for layer, stats in layers}


def stored_novices(
    calibration: Calibration | None,
    plan: Plan,
    source: Source,
    novices: Mapping[int, Tensor] | Thinner | None,
) -> dict[int, np.ndarray]:
    """Return the novices of each pruned layer as files store them, float32 [n_expert, d].

    Those that an earlier pruning has made stay as they are. Without statistics there are none but those.
    """
    if source.substituted:
        return source.substituted.novices(plan.spec)
    if not calibration:  # then all experts are whole, those of tiers too
        nothing = np.zeros((plan.spec.n_expert, plan.spec.hidden_size), np.float32)
        return {layer.layer: nothing for layer in plan.layers if layer.replaced}
    found = {}
    for layer in plan.layers if plan.recipe.method == "mone" else ():
        if not layer.replaced:
            continue
        given = (
            novices[layer.layer]
            if isinstance(novices, Mapping)
            else novices_of(calibration.layers[layer.layer], plan.recipe.known_novice)
        )
        found[layer.layer] = given.float().numpy()
        found[layer.layer] = constants(layer, plan.spec.expert_size, found[layer.layer], novices)
        if source.before and layer.layer in source.before.order:
            first = plan.spec.present[layer.layer]
            found[layer.layer][first:] = source.before.novices(layer.layer)[first:]
        if not np.isfinite(found[layer.layer]).all():
            raise MoneError(
                f"layer {layer.layer}: novices are not finite in float32; calibrate again with --dtype "
                "float32, or without this --stats file"
            )
    return found


def _write_file(
    conversion: Rewriting, part: Path, keys: Keys, *, packing: Rounded | None, progress: Progress | None
) -> None:
    try:
        conversion.write_head(part, keys, packing)
        conversion.write_tensors(progress)
    except OSError as error:  # numpy's says no reason
        raise MoneError(
            f"cannot write {part.name} in {part.parent.parent}: "
            f"{error.strerror or 'No space left on device'}; free some space or choose another -o"
        ) from None


def _pick(tensor: Tensor, experts: Sequence[int], n_expert: int) -> Tensor:
    """Index the expert axis: the first of [M, d] and [M], the last of [1, M]."""
    return tensor[list(experts)] if tensor.shape[0] == n_expert else tensor[:, list(experts)]


def _scale(name: str, tensor: Tensor) -> np.ndarray:
    """Return the experts' output scale, [M]: the runtime applies it before the novices are added."""
    if not name.endswith("ffn_down_exps.scale") or not tensor.is_floating_point():
        raise MoneError(f"{name}: experts in blocks with scales cannot be pruned: pass a BF16 checkpoint")
    lazy: Any = type(tensor)
    values: Tensor = lazy.to_eager(tensor)
    return values.float().numpy()


def _check_complete(conversion: Rewriting, plan: Plan) -> None:
    """Refuse to write where the converter bypassed the seam: wrong counts would only surface when loading."""
    n_group = conversion.key(GROUP_COUNT_KEY) or 1
    if n_group != plan.spec.n_group:
        raise MoneError(
            f"{plan.spec.arch} chooses experts in {plan.spec.n_group} groups, the file would in {n_group}: "
            "llama.cpp would route differently from the model"
        )
    with_ids, stacks = holds_ids(conversion.shapes), defaultdict[int, dict[str, tuple[int, ...]]](dict)
    for name, shape in conversion.shapes.items():
        number, part = part_of(name) or (-1, None)
        if part == "experts":
            stacks[number][name] = shape
    for layer in plan.layers:
        if layer.replaced and layer.layer in with_ids and not plan.spec.keeps_numbers(layer.layer):
            raise MoneError(
                f"{with_ids[layer.layer]} refers to experts by their number: such layers are not supported "
                "yet"
            )
        experts = stacks[layer.layer]
        for number, tier in enumerate(layer.tiers, start=1):
            if missing := [name for name in experts if tier_tensor(name, number) not in conversion.shapes]:
                raise MoneError(
                    f"layer {layer.layer}: of {missing[0]} no experts of {tier.width} channels can be made: "
                    f"pass --novice {DEFAULT_NOVICE}, or a BF16 checkpoint of the model"
                )
        wrong = {name: shape for name, shape in experts.items() if shape[0] != len(layer.kept)}
        if wrong or not experts:
            found = ", ".join(f"{name} {shape}" for name, shape in wrong.items()) or "no expert tensors"
            raise MoneError(
                f"layer {layer.layer}: llama.cpp's converter writes {found}, not {len(layer.kept)} experts; "
                "this checkpoint's experts cannot be pruned yet: try a BF16 checkpoint of the model"
            )
    if plan.recipe.method != "mone":
        _check_one_count(conversion, plan)
    if plan.width:
        _width_keys(conversion, plan)


def _check_one_count(conversion: Rewriting, plan: Plan) -> None:
    """Refuse layers of experts beside the plan's: an ordinary file has one number of experts for all."""
    planned = {layer.layer for layer in plan.layers}
    for name in conversion.shapes:
        layer, part = part_of(name) or (-1, None)
        if part == "experts" and layer not in planned:
            raise MoneError(
                f"{name}: experts outside the model's own layers stay whole, and with --method "
                f"{plan.recipe.method} all layers have the same number of experts: use --method mone"
            )


def _width_keys(conversion: Rewriting, plan: Plan) -> dict[str, int]:
    """Return what says how wide experts are, by key; `MoneError` where others go by it, or nothing does."""
    size = plan.spec.expert_size
    stated = {key: conversion.key(key) for key in (EXPERT_WIDTH_KEY, WIDTH_KEY, SHARED_WIDTH_KEY)}
    names = [name.partition(".ffn_")[2] for name in conversion.shapes]
    shared = {}
    if any("_shexp." in name for name in names) and not stated[SHARED_WIDTH_KEY]:
        together = (conversion.key(SHARED_COUNT_KEY) or 0) * size
        if conversion.arch not in SHARED_BY_COUNT or together % plan.width:
            raise MoneError(
                f"llama.cpp takes the width of the shared experts from that of the others in "
                f"{conversion.arch}"
            )
        shared = {SHARED_COUNT_KEY: together // plan.width}
    dense = any(name in ("gate.weight", "up.weight", "down.weight") for name in names)
    asked = [EXPERT_WIDTH_KEY] if stated[EXPERT_WIDTH_KEY] else [WIDTH_KEY]
    if asked == [EXPERT_WIDTH_KEY] and not dense and stated[WIDTH_KEY] == stated[EXPERT_WIDTH_KEY]:
        asked.append(WIDTH_KEY)
    if any(stated[key] != size for key in asked) or (dense and WIDTH_KEY in asked):
        raise MoneError(f"no key of {conversion.arch} states the width of its experts alone")
    values = dict.fromkeys(asked, plan.width) | shared
    return {key.format(arch=conversion.arch): value for key, value in values.items()}


def _loading_keys(conversion: Rewriting, plan: Plan, source: Source) -> Keys:
    """Return the keys that change how the file loads, and the order: none when nothing is pruned."""
    pruned = [layer for layer in plan.layers if layer.replaced or plan.width]
    if not pruned:
        return {}
    if plan.recipe.method != "mone":
        values = {COUNT_KEY.format(arch=conversion.arch): len(pruned[0].kept)}
        values |= _width_keys(conversion, plan) if plan.width else {}
        return {key: ("UINT32", value) for key, value in values.items()}
    counts = [0] * conversion.block_count
    for layer in pruned:
        counts[layer.layer] = len(layer.kept)
    before = source.before.order if source.before else {}
    order = [before[at.layer][i] if at.layer in before else i for at in pruned for i in at.order]
    keys: Keys = {
        KEPT_COUNT_KEY.format(arch=conversion.arch): ("UINT32", counts),
        "mone.expert_order": ("INT32", order),
    }
    if n_tier := plan.n_tier:
        sizes = np.zeros((conversion.block_count, n_tier), np.int64)
        for layer in pruned:
            sizes[layer.layer, : len(layer.tiers)] = [len(tier.experts) for tier in layer.tiers]
        keys[TIER_COUNT_KEY.format(arch=conversion.arch)] = ("UINT32", n_tier)
        keys[TIER_SIZES_KEY.format(arch=conversion.arch)] = ("UINT32", sizes.flatten().tolist())
    return keys
