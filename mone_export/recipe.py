"""Recipe: how to prune, in one frozen value. Every default stands here, and nowhere else.

Nothing here imports PyTorch, so that the command line can list the names and check them at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from mone_export.errors import MoneError

Method = Literal["mone", "drop", "dern"]
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
NoviceName = Literal["least-squares", "mean", "gate-weighted", "zero", "joint", "none"]
Allocation = Literal["even", "model", "sensitivity", "search"]
Mtp = Literal["keep", "drop"]

METHODS: tuple[Method, ...] = get_args(Method)
SCORE_NAMES: tuple[ScoreName, ...] = get_args(ScoreName)
NOVICE_NAMES: tuple[NoviceName, ...] = get_args(NoviceName)[:-1]  # `none` is what the other methods have
ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)

# the papers' own of `drop` and `dern`, the best in docs/methods.md of `mone`
OWN_SCORE: Mapping[Method, ScoreName] = {"mone": "error", "drop": "reap", "dern": "gate"}

_Name = TypeVar("_Name", bound=str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What is done to a model's experts; `Recipe.of` fills in and checks what a user left open.

    `ratio` is the share of the experts to prune, 0 <= ratio < 1, over all layers together. `score` ranks the
    experts of a layer, `novice` stands in for a pruned one, `allocation` says how many each layer keeps: the
    same number (`even`), by scores that compete over the model (`model`), by how much the model minds an
    error in the layer (`sensitivity`), or by trying it out (`search`). At least `min_kept` stay in a layer
    (None: as many as a token uses). With `guarded`, experts of extreme outputs are never pruned. `seed`
    serves the score `random`. `mtp` says whether blocks that predict further tokens stay in the file.
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
    def of(
        cls,
        ratio: float,
        *,
        method: str | None = None,
        score: str | None = None,
        novice: str | None = None,
        allocation: str | None = None,
        min_kept: int | None = None,
        guarded: bool = True,
        seed: int = 0,
        mtp: Mtp | None = None,
    ) -> "Recipe":
        """Return the recipe with what was left open (None) filled in: the defaults depend on the method.

        Raises `MoneError` for an unknown name, a value out of range and choices that contradict each other.
        """
        own_method: Method = _known("--method", method or "mone", METHODS)
        with_novices = own_method == "mone"
        recipe = cls(
            ratio=ratio,
            method=own_method,
            score=_known("--score", score or OWN_SCORE[own_method], SCORE_NAMES),
            novice=_known("--novice", novice or "least-squares", NOVICE_NAMES) if with_novices else "none",
            allocation=_known(
                "--allocate", allocation or ("sensitivity" if with_novices else "even"), ALLOCATIONS
            ),
            min_kept=min_kept,
            guarded=guarded,
            seed=seed,
            mtp=mtp or ("keep" if with_novices else "drop"),
        )
        _check(recipe, novice)
        return recipe

    @property
    def known_novice(self) -> NoviceName:
        """The novice to reckon with while there is no plan, which `joint` novices belong to."""
        return {"joint": "least-squares", "none": "zero"}.get(self.novice, self.novice)  # type: ignore[return-value]

    @property
    def needs_statistics(self) -> bool:
        """Whether anything in the file depends on a calibration."""
        return self.ratio > 0 and not (self.method == "drop" and self.score in ("aimer", "random"))


def _known(option: str, name: str, names: tuple[_Name, ...]) -> _Name:
    if name not in names:
        raise MoneError(f"unknown {option} {name}: choose from {', '.join(names)}")
    return names[names.index(name)]


def _check(recipe: Recipe, novice: str | None) -> None:
    if not 0 <= recipe.ratio < 1:
        raise MoneError(
            f"--ratio {recipe.ratio:g} is out of range: it is the share of experts to prune, 0 <= ratio < 1"
        )
    if recipe.min_kept is not None and recipe.min_kept < 1:
        raise MoneError(f"--min-kept {recipe.min_kept} is out of range: every layer keeps at least 1 expert")
    if not 0 <= recipe.seed < 2**32:
        raise MoneError(f"--seed {recipe.seed} is out of range: pass 0 to 4294967295")
    if recipe.method != "mone" and recipe.allocation != "even":
        raise MoneError(
            f"--method {recipe.method} keeps the same number of experts in every layer, --allocate "
            f"{recipe.allocation} does not: leave one of them out"
        )
    if recipe.method != "mone" and recipe.mtp == "keep" and recipe.ratio:
        raise MoneError(
            f"--mtp keep with --method {recipe.method}: blocks that predict further tokens keep all experts, "
            "and an ordinary file has one number for all layers: leave one of them out"
        )
    if recipe.method != "mone" and novice:
        raise MoneError(
            f"--novice {novice} with --method {recipe.method}, which has no novices: leave one of them out"
        )
