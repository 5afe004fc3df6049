"""Recipe: how to prune, in one frozen value. Every default stands here, and nowhere else.

Nothing here imports PyTorch, so that the command line can list the names and check them at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict, TypeVar, Unpack, get_args

from mone_export.errors import MoneError

Method = Literal["mone", "drop", "dern", "narrow"]
ScoreName = Literal[
    "mone",
    "mone-paper",
    "frequency",
    "gate",
    "variance",
    "ean",
    "reap",
    "man",
    "msan",
    "error",
    "random",
    "aimer",
]
NoviceName = Literal["least-squares", "mean", "gate-weighted", "zero", "joint", "thin", "none"]
Allocation = Literal["even", "model", "sensitivity", "search", "budget"]
Mtp = Literal["keep", "drop"]

METHODS: tuple[Method, ...] = get_args(Method)
SCORE_NAMES: tuple[ScoreName, ...] = get_args(ScoreName)
NOVICE_NAMES: tuple[NoviceName, ...] = get_args(NoviceName)[:-1]  # `none` is what the other methods have
ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)[:-1]  # `budget` is what thin experts have
DEFAULT_NOVICE: NoviceName = "least-squares"  # of what has no thin experts
AUTO = "auto"  # for a novice: `thin` where it is possible

# the papers' own of `drop` and `dern`, the best in docs/methods.md of `mone`
OWN_SCORE: Mapping[Method, ScoreName] = {"mone": "error", "drop": "reap", "dern": "gate", "narrow": "error"}

_Name = TypeVar("_Name", bound=str)


class Choices(TypedDict, total=False):
    """What `Recipe.of` takes besides the ratio: fields of a recipe; None leaves one open."""

    method: str | None
    score: str | None
    novice: str | None
    allocation: str | None
    min_kept: int | None
    guarded: bool
    seed: int
    mtp: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What is done to a model's experts; `Recipe.of` fills in and checks what a user left open.

    `ratio` is the share of the experts to prune, 0 <= ratio < 1, over all layers together. `score` ranks the
    experts of a layer, `novice` stands in for a pruned one (`thin`: with what channels pay for themselves,
    and the ratio is one of channels), `allocation` says how many each layer keeps: the
    same number (`even`), by scores that compete over the model (`model`), by how much harm an error in the
    layer does (`sensitivity`), by trying it out (`search`), or by what each expert is worth in one budget
    (`budget`: of channels with thin ones, of bytes where a size is asked for). At least `min_kept` stay in a
    layer (None: as many as a token uses); in a budget so many have channels, and one has all. With `guarded`,
    experts of extreme outputs are never pruned. `seed` serves the score `random`. `mtp` says whether blocks
    that predict further tokens stay in the file.
    """

    ratio: float
    method: Method = "mone"
    score: ScoreName = "error"
    novice: NoviceName = "least-squares"
    allocation: Allocation = "sensitivity"
    min_kept: int | None = None
    guarded: bool = True
    seed: int = 0
    mtp: Mtp = "keep"

    @classmethod
    def of(cls, ratio: float, **choices: Unpack[Choices]) -> "Recipe":
        """Return the recipe with what was left open filled in: the defaults depend on the method.

        Raises `MoneError` for an unknown name, a value out of range and choices that contradict each other.
        """
        given = {name: value for name, value in choices.items() if value is not None}
        method: Method = _known("--method", given.setdefault("method", "mone"), METHODS)
        with_novices = method == "mone"
        if not with_novices and "novice" in given:
            raise MoneError(
                f"--novice {given['novice']} with --method {method}, which has no novices: leave one of them "
                "out"
            )
        own: dict[str, Any] = {
            "score": OWN_SCORE[method],
            "novice": DEFAULT_NOVICE if with_novices else "none",
            "allocation": "sensitivity" if with_novices else "even",
            "mtp": "keep" if with_novices else "drop",
        }
        if method == "narrow":  # what stays is thin, and shares a budget of channels
            own["novice"] = "thin"
        if given.get("novice", own["novice"]) == "thin":
            own["allocation"] = "budget"
        recipe = cls(ratio=ratio, **{**own, **given})
        _check(recipe)
        return recipe

    def changed(self, **choices: Unpack[Choices]) -> "Recipe":
        """Return the recipe with some choices changed; another method brings its own defaults."""
        if choices.get("method") not in (None, self.method):
            return Recipe.of(self.ratio, **choices)
        own: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        own |= {name: value for name, value in choices.items() if value is not None}
        ratio, novice = own.pop("ratio"), own.pop("novice")
        if self.method != "mone":  # it has none, and refuses to be asked for one
            novice = choices.get("novice")
        return Recipe.of(ratio, novice=novice, **own)

    @property
    def known_novice(self) -> NoviceName:
        """The constants to reckon with while there is no plan, which `joint` and `thin` need."""
        if self.novice in ("joint", "thin"):
            return "least-squares"
        return "zero" if self.novice == "none" else self.novice

    @property
    def needs_statistics(self) -> bool:
        """Whether anything in the file depends on a calibration."""
        return self.ratio > 0 and not (self.method == "drop" and self.score in ("aimer", "random"))


def _known(option: str, name: object, names: tuple[_Name, ...]) -> _Name:
    for known in names:
        if known == name:
            return known
    raise MoneError(f"unknown {option} {name}: choose from {', '.join(names)}")


def _check(recipe: Recipe) -> None:
    _known("--score", recipe.score, SCORE_NAMES)
    if recipe.method == "mone":
        _known("--novice", recipe.novice, NOVICE_NAMES)
    _known("--allocate", recipe.allocation, (*ALLOCATIONS, "budget"))
    budget = recipe.allocation == "budget"
    if (recipe.novice == "thin" and not budget) or (budget and recipe.novice not in ("thin", DEFAULT_NOVICE)):
        raise MoneError(
            f"--novice {recipe.novice} with --allocate {recipe.allocation}: thin experts share out the "
            "channels of all layers in one budget: leave one of them out"
        )
    if recipe.novice == "thin" and recipe.score in ("aimer", "random"):
        raise MoneError(
            f"--novice thin with --score {recipe.score}, which knows no text: leave one of them out"
        )
    if not 0 <= recipe.ratio < 1:
        raise MoneError(
            f"--ratio {recipe.ratio:g} is out of range: it is the share of experts to prune, 0 <= ratio < 1, "
            "written 0.5 or 50%"
        )
    if recipe.min_kept is not None and recipe.min_kept < 1:
        raise MoneError(f"--min-kept {recipe.min_kept} is out of range: every layer keeps at least 1 expert")
    if not 0 <= recipe.seed < 2**32:
        raise MoneError(f"--seed {recipe.seed} is out of range: pass 0 to 4294967295")
    if recipe.method != "mone" and recipe.allocation != ("budget" if recipe.method == "narrow" else "even"):
        raise MoneError(
            f"--method {recipe.method} keeps the same number of experts in every layer, --allocate "
            f"{recipe.allocation} does not: leave one of them out"
        )
    if recipe.method != "mone" and recipe.mtp == "keep" and recipe.ratio:
        raise MoneError(
            f"--mtp keep with --method {recipe.method}: blocks that predict further tokens keep all experts, "
            "and an ordinary file has one number for all layers: leave one of them out"
        )
