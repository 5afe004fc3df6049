"""Enough text? Whether the decision still changes while the text goes by.

At every tenth of the text the experts that would be pruned are compared with those at the last such point in
the first half of what has been seen: their overlap (Jaccard: common / all of both) tells how much doubling
the text has changed. Layers are followed each on its own, so it does not matter in which order they come.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping

from mone_export.artifacts import ExpertStats, Stability

log = logging.getLogger(__name__)

Decide = Callable[[Mapping[int, ExpertStats]], Mapping[int, frozenset[int]]]
"""From layers' statistics so far, the experts that would be pruned in each."""

_POINTS = 10


class Watch:
    """Follows a decision through one calibration; called with the statistics after every batch."""

    def __init__(self, decide: Decide, *, n_token: int, until: float | None = None) -> None:
        """Expect `n_token` tokens in all; with `until`, say when the layers' mean overlap was that twice."""
        self._decide = decide
        self._n_token = n_token
        self._until = until
        self._reached = 0  # points in a row
        self._seen: dict[int, list[tuple[int, frozenset[int]]]] = defaultdict(list)  # (tokens, pruned)

    def __call__(self, layers: Mapping[int, ExpertStats]) -> bool:
        """Take note of the decision where a tenth of the text is complete; True when it is stable."""
        due = {n: stats.to("cpu") for n, stats in layers.items() if self._is_due(n, stats.n_token)}
        if not due:
            return False
        for layer, pruned in self._decide(due).items():
            self._seen[layer].append((due[layer].n_token, pruned))
        found = self.stability()
        if found is None:
            return False
        log.debug("%d tokens: overlap %.3f (lowest %.3f)", found.n_token, found.mean, found.lowest)
        self._reached = self._reached + 1 if self._until and found.mean >= self._until else 0
        return self._reached > 1  # once may be luck

    def stability(self) -> Stability | None:
        """Return the overlaps at the last point; None while the text is too short for two points."""
        overlaps = {layer: _overlap(points) for layer, points in self._seen.items()}
        known = {layer: overlap for layer, overlap in overlaps.items() if overlap is not None}
        if not known:
            return None
        return Stability(n_token=max(points[-1][0] for points in self._seen.values()), overlaps=known)

    def _is_due(self, layer: int, n_token: int) -> bool:
        last = self._seen[layer][-1][0] if layer in self._seen else 0
        return n_token * _POINTS // self._n_token > last * _POINTS // self._n_token


def _overlap(points: list[tuple[int, frozenset[int]]]) -> float | None:
    """Return the Jaccard overlap of the last point with the last one of at most half its tokens."""
    n_token, pruned = points[-1]
    earlier = [before for n_before, before in points if 2 * n_before <= n_token]
    if not earlier:
        return None
    union = pruned | earlier[-1]
    return len(pruned & earlier[-1]) / len(union) if union else 1.0
