"""Thin experts: fewer intermediate channels, the down projection fitted again to what is left.

An expert's output is a sum over its channels, f = W h + b with W [d, I] and h [I] the hidden activations.
A thin expert keeps the channels C and answers D h_C + N instead. With weights g^2 over the expert's own
tokens, mu the weighted mean of h and S its centred second moment, the error sum_t g^2 ||f - D h_C - N||^2 is
least for

    D = W S_{:,C} S_CC^-1 = W A        N = b + W (mu - A mu_C)

and is then tr(W (S - S_{:,C} S_CC^-1 S_{C,:}) W'). A is the identity in the rows of C: what channels that
went used to say is told by those that stay. Without any channel that is the `least-squares` novice and its
error, with all of them the expert itself.

Which channels stay: the one whose removal costs least goes first. With P = S_CC^-1 the removal of a set B
costs tr(D_B P_BB^-1 D_B'), ||D_j||^2 / P_jj for one channel, and the rest follows without solving anew:
D_C - D_B P_BB^-1 P_BC, P_CC - P_CB P_BB^-1 P_BC. So one elimination gives the channels, and the errors, of
every width. Source: the Optimal Brain Surgeon (Hassibi and Stork, 1993), for columns.

Where a file has no place for a constant (method `narrow`), N is 0 and D the same with S about zero, the
second moment that is not centred: without any channel the error is all that the expert gives the layer.

Few tokens fit anything. S is shrunk towards its own diagonal by `PRIOR` pseudo-tokens: channels that
look related in a hundred tokens may not be so in the next hundred. Errors are those of the shrunk S.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mone_export.artifacts import ChannelStats, MoeSpec
from mone_export.lazily import Tensor, torch

PRIOR = 8.0
ROUNDING = 1e-7  # of sums in float32, relative to what was summed
_SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)  # of an expert's channels, that a thin one may keep
_LEAST_STEPS = 4  # of 32 channels in an expert, or the steps are smaller where they can be
_ROUNDS = 64  # of an elimination: channels that go together are chosen together
_ROOM = 2**28  # bytes of float64 that are worked on at a time


@dataclass(frozen=True, slots=True, eq=False)
class Thinning:
    """What a layer's experts cost at each of `widths` channels, the narrowest first: 0, ..., all of them.

    `order` int64 [M, I] has each expert's channels, the first to stay first; `errors` float64 [M, n_width]
    is the squared error left in the layer's output over all its tokens, sum_t g^2 ||f - f'||^2; `constants`
    float32 [M, n_width, d] what is added to the channels' output, [M, 0, d] where nothing is. Those of all
    channels are 0.
    """

    widths: tuple[int, ...]
    order: Tensor
    errors: Tensor
    constants: Tensor

    def channels(self, expert: int, width: int) -> Tensor:
        """Return the channels that an expert of a width has, int64 [width], ascending."""
        return self.order[expert, :width].sort().values

    def constant(self, expert: int, width: int) -> Tensor:
        """Return what an expert of a width adds to its channels' output, float32 [d]."""
        return self.constants[expert, self.widths.index(width)]


def widths_of(spec: MoeSpec, block: int) -> tuple[int, ...]:
    """Return the widths that an expert of a model may have, from 0 to its own, ascending.

    `block` is how many weights the type of its matrices packs together (256 for K-quants, 1 for F16): a width
    between is a multiple of it, so that thin experts have the type, and the bytes per channel, of whole ones.
    Where the model's own width is none, its matrices have a type of smaller blocks. What is not packed has
    widths of multiples of 32, which kernels like, or 8 for very narrow experts.
    """
    size, step = spec.expert_size, _step(spec, block)
    inner = {round(size * share / step) * step for share in _SHARES}
    return (0, *sorted(inner - {0, size}), size)


def narrow_widths(spec: MoeSpec, block: int) -> tuple[int, ...]:
    """Return the widths that all experts together may have: as `widths_of`, half the steps if not packed.

    There are `_ROUNDS` at most, as an elimination takes a round for each.
    """
    size, step = spec.expert_size, _step(spec, block)
    step = max(1, step // 2) if block == 1 else step
    while size > _ROUNDS * step:
        step *= 2
    return (0, *(width for width in range(step, size, step) if 8 * width >= size), size)


def _step(spec: MoeSpec, block: int) -> int:
    size = spec.expert_size
    steps = [step for step in (block, 32) if step > 1 and size % step == 0] if block > 1 else [32, 8]
    return next((step for step in steps if size >= _LEAST_STEPS * step or block > 1), 1)


def thin(
    stats: ChannelStats,
    down: Sequence[Tensor],
    widths: Sequence[int],
    bias: Tensor | None = None,
    *,
    centred: bool = True,
) -> Thinning:
    """Return what a layer's experts cost at each width.

    `down` gives each expert's down projection [d, I], `bias` [M, d] what the model adds to it. An expert
    never seen costs nothing, and its constant is the bias: what stands in for it is not decided here. Unless
    `centred`, nothing is added to the channels' output.
    """
    n_expert, size = stats.first.shape
    n_out = len(down[0])
    order = torch.empty(n_expert, size, dtype=torch.int64)
    errors = torch.zeros(n_expert, len(widths), dtype=torch.float64)
    constants = torch.zeros(n_expert, len(widths) if centred else 0, n_out)
    at_once = max(1, _ROOM // (8 * size * (size + n_out)))
    for first in range(0, n_expert, at_once):
        own = range(first, min(first + at_once, n_expert))
        weights = torch.stack([down[expert].to("cpu", torch.float64) for expert in own])
        second, mean = _shrunk(stats, own, centred=centred)
        part = slice(own.start, own.stop)
        order[part] = _eliminate(second, weights, mean, widths, errors[part], constants[part])
    unseen = stats.count == 0
    errors[unseen], constants[unseen] = 0, 0
    if bias is not None:
        constants[:, :-1] += bias.detach().to("cpu", torch.float32)[:, None]
    return Thinning(tuple(widths), order, errors, constants)


def channel_bytes(spec: MoeSpec) -> int:
    """Return how many bytes the files of all layers take, about."""
    return 2 * len(spec.moe_layers) * spec.n_expert * spec.expert_size * (spec.expert_size + 5)


def down_projections(experts: Any) -> list[Tensor]:
    """Return the down projection [d, I] of each expert of a module as transformers has it."""
    stack = experts.down_proj.detach()
    return [matrix.T if getattr(experts, "is_transposed", False) else matrix for matrix in stack]


def refit(stats: ChannelStats, expert: int, channels: Tensor, *, centred: bool = True) -> Tensor:
    """Return A float64 [I, len(channels)]: with the down projection W, W A is that of the thin expert."""
    second, _ = _shrunk(stats, range(expert, expert + 1), centred=centred)
    own = second[0][:, channels]  # [I, w]
    solution: Tensor = torch.linalg.solve(own[channels], own.T).T
    return solution


def _shrunk(stats: ChannelStats, experts: range, *, centred: bool) -> tuple[Tensor, Tensor]:
    """Return (S [n, I, I], shrunk, mu [n, I]) of some experts, float64; S is the identity if unseen.

    Unless `centred`, mu is 0.
    """
    part = slice(experts.start, experts.stop)
    weight, first = stats.weight[part, None], stats.first[part].double() * centred
    mean = first / torch.where(weight > 0, weight, 1.0)
    second = stats.second[part].double() - mean[:, :, None] * first[:, None, :]
    diagonal = second.diagonal(dim1=1, dim2=2).clamp(min=0)
    own = PRIOR / stats.count[part, None].clamp(min=1) * diagonal
    # Channels that never answer must not make S singular, nor matter. And of tokens that are all the same, S
    # is nothing but what the sums' rounding left, to which a fit would have any size.
    raw = stats.second[part].double().diagonal(dim1=1, dim2=2).clamp(min=0)
    least = torch.maximum(1e-9 * diagonal.mean(1, keepdim=True), ROUNDING * raw.mean(1, keepdim=True))
    ridge = own + torch.where(least > 0, least, 1.0)
    second.diagonal(dim1=1, dim2=2).add_(ridge)
    return second, mean


def _eliminate(
    second: Tensor, down: Tensor, mean: Tensor, widths: Sequence[int], errors: Tensor, constants: Tensor
) -> Tensor:
    """Take the channels of n experts out, and return their order, those that stayed longest first.

    Args:
        second: [n, I, I], the centred second moments.
        down: [n, d, I], the down projections.
        mean: [n, I], the channels' means.
        widths: ascending, the last is I.
        errors: [n, n_width], takes the errors.
        constants: [n, n_width, d], takes the constants; [n, 0, d] for none.
    """
    n, size = mean.shape
    block = max(1, size // _ROUNDS)
    inverse, fitted = torch.linalg.inv(second), down
    total = torch.einsum("ndi,ni->nd", down, mean)
    left = torch.arange(size).expand(n, size)
    order, lost = torch.empty(n, size, dtype=torch.int64), torch.zeros(n, dtype=torch.float64)
    for place in reversed(range(len(widths) - 1)):
        while (n_left := left.shape[1]) > widths[place]:
            n_gone = min(block, n_left - widths[place])
            cost = fitted.square().sum(1) / inverse.diagonal(dim1=1, dim2=2)
            ranked = cost.argsort(dim=1, stable=True)
            gone, stay = ranked[:, :n_gone], ranked[:, n_gone:].sort(1).values
            order[:, n_left - n_gone : n_left] = left.gather(1, gone)
            b = fitted.gather(2, gone[:, None].expand(-1, fitted.shape[1], -1))  # [n, d, gone]
            rows = inverse.gather(1, gone[:, :, None].expand(-1, -1, n_left))
            corner = rows.gather(2, gone[:, None].expand(-1, n_gone, -1))
            across = rows.gather(2, stay[:, None].expand(-1, n_gone, -1))  # P_BC
            solved = torch.linalg.solve(corner, across)  # P_BB^-1 P_BC
            lost = lost + torch.einsum("ndb,nbd->n", b, torch.linalg.solve(corner, b.mT))
            fitted = fitted.gather(2, stay[:, None].expand(-1, fitted.shape[1], -1)) - b @ solved
            inverse = (
                inverse.gather(1, stay[:, :, None].expand(-1, -1, n_left)).gather(
                    2, stay[:, None].expand(-1, stay.shape[1], -1)
                )
                - across.mT @ solved
            )
            left = left.gather(1, stay)
        errors[:, place] = lost
        if constants.shape[1]:
            constants[:, place] = total - torch.einsum("ndc,nc->nd", fitted, mean.gather(1, left))
    return order
