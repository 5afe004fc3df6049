"""DERN: pruned experts are taken apart, and what fits is built into the kept ones.

A segment is one intermediate channel of an expert: a row of the gate matrix, a row of the up matrix and a
column of the down matrix, each of width d. An expert is its segments, [n_segment, 3, d]; their order does not
matter, nor which expert a segment came from. Three steps:

1. The best experts stay, by the weight that the router gives them (`planning`, score `gate`).
2. Every segment of a pruned expert goes to the kept expert that holds the most similar one, if the cosine of
   the two (up row and down column, one after the other) exceeds `alpha`; otherwise it is dropped.
3. The segments of a kept expert, its own and the received ones, are clustered back to the original number by
   spherical k-means, weighted by the importance of the experts they came from.

Source: "Dropping Experts, Recombining Neurons", arXiv 2509.10377, which has no public code.
"""

from collections.abc import Callable, Iterator, Sequence

from mone_export.lazily import Tensor, torch

ALPHA = 0.6  # best in the paper: 0 admits too much, more admits too little
_GATE, _UP = 0, 1
_STEPS = 25
_CHUNK = 1024  # segments compared at a time


def recombine(
    read: Callable[[int], Tensor],
    kept: Sequence[int],
    pruned: Sequence[int],
    importance: Tensor,
    *,
    alpha: float = ALPHA,
) -> Iterator[Tensor]:
    """Yield what becomes of each kept expert of a layer, float32 [n_segment, 3, d], in the order of `kept`.

    `read` gives an expert's segments, float32 [n_segment, 3, d], and is asked once for each. In memory at a
    time are the kept experts and the segments they received, in the checkpoint's own precision, and one
    expert in float32: never more than the layer, and its comparison in pieces.
    """
    own: list[Tensor | None] = [_compact(read(expert)) for expert in kept]
    received: list[list[Tensor]] = [[] for _ in kept]
    weights = [[importance[expert].float()] for expert in kept]
    for expert in pruned:
        segments = read(expert)
        home = homes(segments, own, alpha=alpha)
        for slot in home.unique().tolist():
            if slot >= 0:
                taken = segments[home == slot]
                received[slot].append(_compact(taken))
                weights[slot].append(importance[expert].float())
    for slot in range(len(kept)):
        parts, own[slot] = [own[slot], *received[slot]], None
        received[slot] = []
        sizes = torch.tensor([len(part) for part in parts if part is not None])
        segments = torch.cat([part.float() for part in parts if part is not None])
        del parts
        weight = torch.stack(weights[slot]).repeat_interleave(sizes)
        yield cluster(segments, weight, int(sizes[0]))


def homes(segments: Tensor, kept: Sequence[Tensor | None], *, alpha: float) -> Tensor:
    """Return for each segment the position in `kept` of its new expert, -1 where it is dropped; int64 [n]."""
    keys = _keys(segments)
    best = torch.full((len(keys),), alpha)
    home = torch.full((len(keys),), -1)
    for slot, expert in enumerate(kept):
        assert expert is not None
        similarity = _nearest(keys, _keys(expert.float()))[0]
        closer = similarity > best
        best[closer], home[closer] = similarity[closer], slot
    return home


def cluster(segments: Tensor, weight: Tensor, n_cluster: int) -> Tensor:
    """Merge segments [n, 3, d] of importance `weight` [n] into `n_cluster` by spherical weighted k-means."""
    if len(segments) == n_cluster:
        return segments
    keys = _keys(segments)
    weight = weight.clamp(min=float(weight.max()) * 1e-6 or 1.0)[:, None]  # an unused expert still has a mean
    centres = keys[_starts(segments, keys, n_cluster)]
    nearest = _nearest(keys, centres)[1]
    for _ in range(_STEPS):
        sums = torch.zeros_like(centres).index_add_(0, nearest, weight * keys)
        filled = torch.zeros(n_cluster, dtype=torch.bool).index_fill_(0, nearest, True)[:, None]
        centres = torch.where(filled, torch.nn.functional.normalize(sums, dim=1), centres)
        moved = _nearest(keys, centres)[1]
        if torch.equal(moved, nearest):
            break
        nearest = moved
    return _means(segments, weight[:, :, None], nearest, n_cluster)


def _means(segments: Tensor, weight: Tensor, nearest: Tensor, n_cluster: int) -> Tensor:
    """Return each cluster's weighted mean [n_cluster, 3, d] after giving its rows the cluster's mean norm.

    A cluster that lost all its segments becomes a channel of zeros, which adds nothing.
    """

    def total(values: Tensor) -> Tensor:
        return torch.zeros(n_cluster, *values.shape[1:]).index_add_(0, nearest, values)

    mass = total(weight).clamp(min=torch.finfo(torch.float32).tiny)  # [n_cluster, 1, 1]
    norm = segments.norm(dim=2, keepdim=True)  # [n, 3, 1]
    mean_norm = total(weight * norm) / mass
    scale = mean_norm[nearest] / norm.clamp(min=torch.finfo(torch.float32).tiny)
    return total(segments * (weight * scale)) / mass


def _starts(segments: Tensor, keys: Tensor, n_cluster: int) -> Tensor:
    """Return the segments to start from, those with the largest max|gate row|; int64 [n_cluster].

    Copies stand side by side in this order, and all but the first of them wait at its end: two equal centres
    would leave one of them empty.
    """
    order = segments[:, _GATE].abs().amax(1).argsort(descending=True, stable=True)
    fresh = torch.ones(len(order), dtype=torch.bool)
    fresh[1:] = (keys[order[1:]] * keys[order[:-1]]).sum(1) < 1 - 1e-5
    return torch.cat([order[fresh], order[~fresh]])[:n_cluster]


def _keys(segments: Tensor) -> Tensor:
    """Return what segments are compared by, of norm 1: up row and down column, [n, 2 d]."""
    return torch.nn.functional.normalize(segments[:, _UP:].flatten(1), dim=1)


def _nearest(keys: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest cosine with any of `others`, and whose it is, [n] each."""
    parts = [(part @ others.T).max(dim=1) for part in keys.split(_CHUNK)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def _compact(tensor: Tensor) -> Tensor:
    """Return the tensor in the smallest type that holds it without loss: what the checkpoint stored."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal((smaller := tensor.to(dtype)).float(), tensor):
            return smaller
    return tensor.clone()  # not the whole that it may be a part of
