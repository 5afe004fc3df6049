"""From experts' outputs to their statistics: what any way of observing a model ends in.

On a CPU one expert comes after the other, so that its rows stay in the cache; on a GPU all come at once.
"""

from concurrent.futures import Executor
from dataclasses import fields, replace

import torch
from torch import Tensor

from mone_export.artifacts import ExpertStats

_CACHED_ROWS = 128  # of float64 output: 2 MB at 2048 channels
_SHARE = 8  # experts that one thread takes at a time
_BLOCK = 32  # slots that are summed in float32 where all experts are taken together
_CANCELLATION = 1e-3  # a difference that small has lost 3 of float64's 16 digits


def expert_stats(outputs: Tensor, gates: Tensor, count: Tensor, *, n_token: int) -> ExpertStats:
    """Return the statistics of one batch.

    Args:
        outputs: [n_slot, d], experts' outputs before weighting, grouped by ascending expert.
        gates: [n_slot], the weights that multiply them.
        count: int64 [n_expert], slots of each expert; sums to n_slot.
        n_token: tokens the batch holds.
    """
    sums = Sums(count, outputs.shape[1])
    sums.add(slice(0, len(count)), outputs, gates)
    return replace(sums.stats(), n_token=n_token)


def routed_stats(
    outputs: Tensor, gates: Tensor, ids: Tensor, n_expert: int, *, pool: Executor | None = None
) -> ExpertStats:
    """Return the statistics of one batch whose experts' outputs lie as the tokens do.

    Args:
        outputs: [n_token, top_k, d], the selected experts' outputs before weighting.
        gates: [n_token, top_k], the weights that multiply them.
        ids: int64 [n_token, top_k], the experts.
        n_expert: how many there are.
        pool: threads that share the experts; the result does not depend on them.
    """
    n_token, _, width = outputs.shape
    rows, gates = outputs.flatten(0, 1), gates.flatten()
    ids, order = torch.sort(ids.flatten())
    count = torch.bincount(ids, minlength=n_expert)
    slots = order.split(count.tolist())

    def stats_of(experts: range) -> ExpertStats:
        sums = Sums(count[experts.start : experts.stop], width)
        for place, own in enumerate(slots[experts.start : experts.stop]):
            if len(own):
                sums.add(slice(place, place + 1), rows[own], gates[own])
        return sums.stats()

    blocks = [range(e, min(e + _SHARE, n_expert)) for e in range(0, n_expert, _SHARE)]
    parts = [*(pool.map if pool else map)(stats_of, blocks)]
    names = [each.name for each in fields(ExpertStats) if each.name != "n_token"]
    whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return ExpertStats(n_token=n_token, **whole)


def grouped_stats(outputs: Tensor, gates: Tensor, count: Tensor, ids: Tensor) -> ExpertStats:
    """Return what `expert_stats` returns, without a loop over experts and without waiting for the device.

    `ids` int64 [n_slot] names each slot's expert; `n_token` stays 0. A GPU is slow in float64, and where rows
    of one expert are added one after the other. So slots are laid in blocks of `_BLOCK` that belong to one
    expert; a block is summed as a product of matrices, in float32 (relative error about 1e-6) unless the
    outputs have more digits, and blocks are added in float64.
    """
    (n_slot, width), n_expert, device = outputs.shape, len(count), outputs.device
    n_block = n_slot // _BLOCK + n_expert  # at most; how many are needed would have to be asked for
    blocks = (count + _BLOCK - 1) // _BLOCK
    begin, first = torch.cumsum(count, 0) - count, torch.cumsum(blocks, 0) - blocks
    slot = torch.arange(n_slot, device=device)
    place = first[ids] * _BLOCK + slot - begin[ids]  # where a slot goes: [n_block * _BLOCK]

    def totals(values: Tensor, reduce: str = "sum") -> Tensor:
        # unsafe: unchecked, since a check of the lengths would wait for the device
        return torch.segment_reduce(values, reduce, lengths=blocks, axis=0, unsafe=True, initial=0)

    g, exact = gates.double(), torch.promote_types(outputs.dtype, torch.float32)
    norm = torch.linalg.vector_norm(outputs, dim=1, dtype=exact).double()
    largest = torch.linalg.vector_norm(outputs, torch.inf, dim=1).double()
    powers = torch.stack((torch.ones_like(g), g, g.square()), dim=1)  # [n_slot, 3]
    table = torch.zeros(n_block * _BLOCK, 10, dtype=torch.float64, device=device)
    table[place] = torch.cat(
        (powers, powers * norm[:, None], powers * norm[:, None].square(), largest[:, None]), 1
    )
    table = table.view(n_block, _BLOCK, 10)
    _, gate, gate_sq, n, gn, _, n_sq, _, g2n_sq = totals(table[..., :9].sum(1)).unbind(1)

    source = torch.zeros(n_block * _BLOCK, dtype=torch.int64, device=device)
    source[place] = slot  # places of no slot hold the first one, weighted by 0
    rows = outputs[source].view(n_block, _BLOCK, width).to(exact)
    sums = totals(torch.bmm(table[..., :3].to(exact).mT, rows).double().flatten(1)).view(n_expert, 3, width)
    mean = sums[:, 0] / count.clamp(min=1)[:, None]
    expert = torch.zeros(n_block, dtype=torch.int64, device=device)
    expert[place // _BLOCK] = ids
    deviation = torch.linalg.vector_norm(rows.sub_(mean.to(exact)[expert][:, None]), dim=2).double()
    return replace(
        ExpertStats.empty(n_expert, 0, device=device),
        count=count,
        weight=count.double(),
        gate_sum=gate,
        gate_sq_sum=gate_sq,
        out_mean=mean,
        out_m2=totals((table[..., 0] * deviation.square()).sum(1)),
        gated_out_sum=sums[:, 1],
        gated2_out_sum=sums[:, 2],
        norm_sum=n,
        norm_sq_sum=n_sq,
        gated_norm_sum=gn,
        gated2_norm_sq_sum=g2n_sq,
        max_abs=totals(table[..., 9].amax(1), "max"),
    )


class Sums:
    """The statistics of one batch in the making, on a CPU: experts come block by block."""

    def __init__(self, count: Tensor, width: int) -> None:
        """Begin: `count` int64 [n_expert] says how many slots each expert will have, `width` of outputs."""
        self.sizes: list[int] = count.tolist()
        self._batch = ExpertStats.empty(len(self.sizes), width)
        # one buffer for all experts: fresh memory for each would cost more than the arithmetic
        n_row = min(max(self.sizes), _CACHED_ROWS)
        self._scratch = torch.empty(n_row, width, dtype=torch.float64)

    def add(self, experts: slice, outputs: Tensor, gates: Tensor) -> None:
        """Add the outputs [n_slot, d] of a block of experts, grouped by expert, and their gates [n_slot]."""
        sizes = self.sizes[experts]
        rows = zip(outputs.split(sizes), gates.double().split(sizes), strict=True)
        for expert, (f, g) in enumerate(rows, start=experts.start):
            if len(g):
                self._add_expert(expert, f, g)

    def stats(self) -> ExpertStats:
        """Return the sums; all experts must have been added."""
        count = torch.tensor(self.sizes)
        return replace(self._batch, count=count, weight=count.double())

    def _add_expert(self, expert: int, f: Tensor, g: Tensor) -> None:
        """Write the sums over one expert's tokens, f [n, d] and g [n], into row `expert`."""
        batch, n_row = self._batch, len(self._scratch)
        g_sq = g.square()
        powers = torch.stack((torch.ones_like(g), g, g_sq))  # [3, n]
        sums = torch.zeros(3, f.shape[1], dtype=torch.float64)
        norm = torch.empty_like(g)
        for part, rows in enumerate(f.split(n_row)):  # a part stays in the cache while it is used
            span = slice(part * n_row, part * n_row + len(rows))
            f64 = self._scratch[: len(rows)].copy_(rows)
            torch.linalg.vector_norm(f64, dim=1, out=norm[span])
            sums.addmm_(powers[:, span], f64)
        norm_sq = norm.square()
        mean = sums[0] / len(g)
        batch.out_mean[expert] = mean
        batch.out_m2[expert] = self._squared_deviation(f, mean, norm_sq.sum())
        batch.gated_out_sum[expert] = sums[1]
        batch.gated2_out_sum[expert] = sums[2]
        batch.gate_sum[expert] = g.sum()
        batch.gate_sq_sum[expert] = g_sq.sum()
        batch.norm_sum[expert] = norm.sum()
        batch.norm_sq_sum[expert] = norm_sq.sum()
        batch.gated_norm_sum[expert] = g @ norm
        batch.gated2_norm_sq_sum[expert] = g_sq @ norm_sq
        low, high = torch.aminmax(f)
        batch.max_abs[expert] = torch.maximum(-low, high)

    def _squared_deviation(self, f: Tensor, mean: Tensor, norm_sq_sum: Tensor) -> Tensor:
        """Return sum (f - mean)^2 as sum f^2 - n mean^2, or term by term where that would cancel digits."""
        m2 = norm_sq_sum - len(f) * mean.square().sum()
        if m2 > _CANCELLATION * norm_sq_sum:
            return m2
        parts = f.split(len(self._scratch))
        return torch.stack([(rows.double() - mean).square().sum() for rows in parts]).sum()
