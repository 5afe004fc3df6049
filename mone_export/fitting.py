"""How to make a file fit: which type of weights, and how many experts, where it may have so many bytes.

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
from functools import cache
from pathlib import Path

from mone_export.artifacts import Calibration, Candidate, MoeSpec, Plan
from mone_export.errors import MoneError
from mone_export.output.rounding import rounding_errors
from mone_export.output.writing import Layout, layouts
from mone_export.pruning.damage import relative_error
from mone_export.pruning.planning import kept_per_layer, least_kept, plan_without_scores
from mone_export.runtime import Progress

# in falling precision
LADDER = ("auto", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq4_xs", "q3_k_m", "q2_k")
# the estimate follows KL divergence best with it on the demo; docs/methods.md has another model's choices
ROUNDED = 0.03

_MATRIX = re.compile(r"blk\.(\d+)\.(\w+?)(_exps)?\.weight")


def candidates(
    path: Path,
    spec: MoeSpec,
    budget: int,
    *,
    outtype: str = "auto",
    ratio: float | None = None,
    min_kept: int | None = None,
    method: str = "mone",
    score: str = "error",
    novice: str = "mean",
    scope: str = "layer",
    progress: Progress | None = None,
) -> list[Candidate]:
    """Return for each type the candidate with the most experts that `budget` bytes hold, exactest type first.

    `outtype` and `ratio` narrow the search to one type (`auto` is all of them) and one ratio. Types behind
    the first that takes all experts are left out: they could only be worse. The names count: the file states
    them. Raises `MoneError`, naming the smallest size there is, when nothing fits.
    """
    outtypes = LADDER if outtype == "auto" else (outtype,)
    floor = least_kept(spec, min_kept)
    if ratio is not None:
        floor = kept_per_layer(spec, ratio, min_kept=min_kept, method=method)

    def blank(n_kept: int) -> Plan:
        part = 1 - n_kept / spec.n_expert
        return plan_without_scores(
            spec, ratio=part, min_kept=min_kept, score=score, method=method, scope=scope
        )

    smallest = layouts(path, blank(floor), outtypes, novice=novice)
    types = {name: layout.types for name, layout in smallest.items()} if method == "mone" else None
    whole = layouts(path, blank(spec.n_expert), outtypes, novice=novice, types=types)

    @cache
    def layout_of(name: str, n_kept: int) -> Layout:
        if n_kept in (floor, spec.n_expert):
            return (smallest if n_kept == floor else whole)[name]
        if method == "mone":
            return smallest[name].with_kept(dict.fromkeys(spec.moe_layers, n_kept))
        return layouts(path, blank(n_kept), (name,), novice=novice)[name]

    found: list[Candidate] = []
    for number, name in enumerate(outtypes, start=1):
        if progress:
            progress(number, len(outtypes), "measuring sizes (types)")

        def size(n_kept: int, name: str = name) -> int:
            return layout_of(name, n_kept).size

        count = floor if ratio is not None else _most(budget, spec.n_expert, floor, size)
        layout = layout_of(name, count)
        same = any(item.size == layout.size for item in found)  # a type that the checkpoint has already
        if layout.size <= budget and not same:
            found.append(
                Candidate(
                    name,
                    1 - count / spec.n_expert,
                    layout.size,
                    size_between=layout.size_between,
                    size_unpruned=whole[name].size,
                    types=layout.types,
                )
            )
        if layout.size <= budget and count == spec.n_expert:
            break
    if progress:
        progress(len(outtypes), len(outtypes), "measuring sizes (types)")
    if not found:
        name = min(outtypes, key=lambda name: smallest[name].size)
        raise MoneError(
            f"nothing fits {budget} bytes: the smallest file has {smallest[name].size}, --outtype {name} "
            f"with {floor} of {spec.n_expert} experts: pass a larger --fit, or another --min-kept or --ratio"
        )
    return found


def judge(
    found: Sequence[Candidate],
    path: Path,
    calibration: Calibration,
    decide: Callable[[Candidate], Plan],
    *,
    novice: str,
) -> list[Candidate]:
    """Return the candidates with their estimated errors, the best first; `decide` makes one's plan."""
    kinds = {kind for item in found for _, _, kind in _matrices(item)}
    rounding = rounding_errors(path, kinds)
    judged = [
        replace(item, error=_error(item, calibration, decide(item), novice, rounding)) for item in found
    ]
    return sorted(judged, key=lambda item: item.error or 0.0)


def answer(judged: Sequence[Candidate]) -> str:
    """Say which candidate it is, and why: prune, or only quantise harder?"""
    best = judged[0]
    others = [item for item in judged[1:] if (item.ratio > 0) != (best.ratio > 0)]
    chosen = f"{'prune' if best.ratio else 'only quantise'}: {describe(best)}"
    if not others:
        return f"{chosen}; {'no type takes all experts' if best.ratio else 'all experts fit'}"
    return f"{chosen} rather than {describe(others[0])}"


def describe(item: Candidate) -> str:
    """Name a candidate in a few words."""
    share = f"{item.ratio:.0%} of the experts pruned" if item.ratio else "all experts kept"
    error = "" if item.error is None else f", estimated error {item.error:.2g}"
    return f"--outtype {item.outtype}, {share}{error}"


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


def _error(
    item: Candidate, calibration: Calibration, plan: Plan, novice: str, rounding: Mapping[str, float]
) -> float:
    """Return the mean over the layers, by sensitivity, of what is missing and what is rounded in each."""
    known = "least-squares" if novice == "joint" else novice if plan.method == "mone" else "zero"
    lost = {
        layer.layer: relative_error(calibration.layers[layer.layer], layer.pruned, known)
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
