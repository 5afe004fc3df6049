"""How to make a file fit: which type of weights, and how many experts, where it may have so many bytes.

What this finds is where `spending` begins; by itself it decides where all experts have one type, whole ones
or constants: `--fit` with a method, a novice, an allocation or a ratio.

`candidates` finds for each type the most experts that fit, from exact sizes, before anything expensive;
`judge` estimates from the statistics what each of them does to the model. Two kinds of error count, squares
relative to what they disturb: in a layer, the share of the experts' output that is missing without the pruned
ones (`damage.relative_error`), and what rounding does to each product, about the squared rounding error of
its weights (`rounding_errors`). Rounding errors differ from weight to weight and cancel in part, what is
missing does not, so the former count by `ROUNDED` only. The mean over the layers ranks candidates, and
predicts no perplexity; layers count by their sensitivity. docs/methods.md compares what it chooses with what
was measured.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from mone_export.artifacts import Calibration, Candidate, Plan
from mone_export.errors import MoneError
from mone_export.output.rounding import rounding_errors
from mone_export.output.writing import Layout, layouts
from mone_export.pruning.allocation import kept_per_layer, least_kept
from mone_export.pruning.damage import relative_error
from mone_export.pruning.planning import plan_without_scores
from mone_export.recipe import Recipe
from mone_export.runtime import Progress
from mone_export.source import Source

# in falling precision
LADDER = ("auto", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq4_xs", "q3_k_m", "q2_k")
# the estimate follows KL divergence best with it on the demo; docs/methods.md has another model's choices
ROUNDED = 0.03

Measured = Callable[..., Mapping[str, Layout]]

_MATRIX = re.compile(r"blk\.(\d+)\.(\w+?)(_exps)?\.weight")


def candidates(
    source: Source,
    recipe: Recipe,
    budget: int,
    *,
    outtype: str = "auto",
    any_ratio: bool = True,
    measured: Measured = layouts,
    progress: Progress | None = None,
) -> list[Candidate]:
    """Return for each type the candidate with the most experts that `budget` bytes hold, exactest type first.

    `outtype` narrows the search to one type (`auto` is all of them), `any_ratio` False to the recipe's ratio.
    `measured` is `layouts`, perhaps with options of its own.
    Types after the first that takes all experts are left out: they could only be worse. Raises `MoneError`,
    naming the smallest size there is, when nothing fits.
    """
    outtypes = LADDER if outtype == "auto" and not source.packed else (outtype,)
    sizes = _Layouts(source, recipe, outtypes, any_ratio=any_ratio, measured=measured)
    n_expert = source.spec.n_expert
    found: list[Candidate] = []
    for number, name in enumerate(outtypes, start=1):
        if progress:
            progress(number, len(outtypes), "measuring sizes (types)")
        count = _most(budget, n_expert, sizes.floor, partial(sizes.size, name)) if any_ratio else sizes.floor
        layout = sizes.layout(name, count)
        if layout.size > budget:
            continue
        if all(item.size != layout.size for item in found):  # the checkpoint may have the type already
            whole = sizes.layout(name, n_expert)
            found.append(
                Candidate(
                    name,
                    1 - count / n_expert,
                    layout.size,
                    size_unpruned=whole.size,
                    types=layout.types,
                )
            )
        if count == n_expert:
            break
    if progress:
        progress(len(outtypes), len(outtypes), "measuring sizes (types)")
    if not found:
        name = min(outtypes, key=lambda name: sizes.size(name, sizes.floor))
        raise MoneError(
            f"nothing fits {budget} bytes: the smallest file has {sizes.size(name, sizes.floor)}, --outtype "
            f"{name} with {sizes.floor} of {n_expert} experts: pass a larger --fit, or another --min-kept or "
            "--ratio"
        )
    return found


class _Layouts:
    """The layouts of a model's files by type and number of experts kept, the same in every layer."""

    def __init__(
        self, source: Source, recipe: Recipe, outtypes: Sequence[str], *, any_ratio: bool, measured: Measured
    ) -> None:
        """Measure the smallest and the largest file of each type; by method `mone` all others follow."""
        self._source, self._recipe, self._measured = source, recipe, measured
        spec = source.spec
        self.floor = least_kept(spec, recipe.min_kept) if any_ratio else kept_per_layer(spec, recipe)
        few = measured(source, self._blank(self.floor), outtypes)
        types = {name: layout.types for name, layout in few.items()} if recipe.method == "mone" else None
        many = measured(source, self._blank(spec.n_expert), outtypes, types=types)
        self._known = {(name, spec.n_expert): layout for name, layout in many.items()}
        self._known |= {(name, self.floor): layout for name, layout in few.items()}

    def layout(self, outtype: str, n_kept: int) -> Layout:
        """Return the layout of a type's file that keeps so many experts in every layer."""
        if (outtype, n_kept) not in self._known:
            self._known[outtype, n_kept] = self._new(outtype, n_kept)
        return self._known[outtype, n_kept]

    def size(self, outtype: str, n_kept: int) -> int:
        """Return the bytes of that file."""
        return self.layout(outtype, n_kept).size

    def _new(self, outtype: str, n_kept: int) -> Layout:
        if self._recipe.method == "mone":
            moe_layers = self._source.spec.moe_layers
            return self._known[outtype, self.floor].with_kept(dict.fromkeys(moe_layers, n_kept))
        found = self._measured(self._source, self._blank(n_kept), (outtype,))
        return found[outtype]

    def _blank(self, n_kept: int) -> Plan:
        spec = self._source.spec
        return plan_without_scores(spec, replace(self._recipe, ratio=1 - n_kept / spec.n_expert))


def judge(
    found: Sequence[Candidate],
    source: Source,
    calibration: Calibration,
    decide: Callable[[Candidate], Plan],
) -> list[Candidate]:
    """Return the candidates with their estimated errors, the best first; `decide` makes one's plan."""
    kinds = {kind for item in found for _, _, kind in _matrices(item)}
    rounding = rounding_errors(source, kinds)
    judged = [replace(item, error=_error(item, calibration, decide(item), rounding)) for item in found]
    return sorted(judged, key=lambda item: item.error or 0.0)


def answer(judged: Sequence[Candidate]) -> str:
    """Say which candidate it is, and why: prune, or only quantise harder?"""
    best = judged[0]
    if best.mixed:
        return f"spend the bytes expert by expert: {describe(best)}"
    others = [item for item in judged[1:] if (item.ratio > 0) != (best.ratio > 0)]
    chosen = f"{'prune' if best.ratio else 'only quantise'}: {describe(best)}"
    if not others:
        return f"{chosen}; {'no type takes all experts' if best.ratio else 'all experts fit'}"
    return f"{chosen} rather than {describe(others[0])}"


def describe(item: Candidate) -> str:
    """Name a candidate in a few words."""
    share = f"{item.ratio:.0%} of the experts pruned" if item.ratio else "all experts kept"
    share += ", types by expert" if item.mixed else ""
    error = "" if item.error is None else f", estimated error {_percent(item.error)}"
    return f"--outtype {item.outtype}, {share}{error}"


def _percent(share: float) -> str:
    return f"{float(f'{100 * share:.2g}'):g}%"


def _most(budget: int, n_expert: int, floor: int, size: Callable[[int], int]) -> int:
    """Return how many experts fit, at least `floor`; the size grows with their number, nearly evenly."""
    if size(n_expert) <= budget or n_expert == floor:
        return n_expert
    few, many = floor, n_expert - 1
    per_expert = (size(many) - size(few)) / max(1, many - few) or 1.0
    count = max(few, min(many, few + math.floor((budget - size(few)) / per_expert)))
    while count > few and size(count) > budget:
        count -= 1
    return count


def _error(item: Candidate, calibration: Calibration, plan: Plan, rounding: Mapping[str, float]) -> float:
    """Return the mean over the layers, by sensitivity, of what is missing and what is rounded in each."""
    lost = {
        layer.layer: relative_error(calibration.layers[layer.layer], layer.pruned, plan.recipe.known_novice)
        for layer in plan.layers
    }
    total = dict(lost)
    for layer, of_experts, kind in _matrices(item):
        if layer in total:
            total[layer] += ROUNDED * rounding[kind] * (1 - lost[layer] if of_experts else 1.0)
    weights = {layer: calibration.sensitivity.get(layer, 1.0) for layer in lost}
    return sum(weights[layer] * error for layer, error in total.items()) / sum(weights.values())


def _matrices(item: Candidate) -> Iterator[tuple[int, bool, str]]:
    """Yield (layer, whether it is experts', type) of each matrix in the layers of a candidate's file."""
    for name, kind in item.types.items():
        if (match := _MATRIX.fullmatch(name)) and "norm" not in match[2]:
            yield int(match[1]), bool(match[3]), kind
