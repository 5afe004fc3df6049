"""Ways to an ordinary file that the exporter does not have, in PyTorch, to compare what it has with them.

`merged` is MC-SMoE's merging (arXiv 2310.01334) with the same number of experts in every layer; `mended`
gives the experts that stay a gain each, or all of a layer one: least squares on the layer's true output.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PRIOR = 8.0  # pseudo-tokens that hold a gain at 1


def merged(model: Any, corpus: Any, calibration: Any, n_kept: int) -> Any:
    """Return the model with each layer's experts merged into its `n_kept` most used ones.

    An expert joins the one whose router logits are most like its own over the text; its channels are matched
    with that one's, and all of a group averaged by their use. The router keeps the rows of the most used.
    """
    import torch
    from scipy.optimize import linear_sum_assignment
    from torch.nn.functional import normalize

    from measuring.methods import Variant, recipe_of, with_fewer_experts
    from mone_export.pruning.planning import plan
    from mone_export.pruning.scoring import score

    ratio = 1 - n_kept / model.spec.n_expert
    recipe = recipe_of(Variant("drop", "frequency"), ratio, seed=0)
    chosen = plan(score(calibration, "frequency", guarded=False), recipe=recipe)
    smaller = with_fewer_experts(model.module, calibration, chosen)
    inputs, _ = seen(model.module, corpus)
    for layer in chosen.layers:
        old, new = (each.model.layers[layer.layer].mlp for each in (model.module, smaller))
        logits = normalize(inputs[layer.layer] @ old.gate.weight.T, dim=0)
        alike, count = logits.T @ logits, calibration.layers[layer.layer].count
        kept = list(layer.kept)
        home = {e: kept[int(alike[e, kept].argmax())] for e in layer.pruned} | {e: e for e in kept}
        for slot, best in enumerate(kept):
            group = [e for e in home if home[e] == best]
            weights = count[group].clamp(min=1).double() / count[group].clamp(min=1).sum()
            own, total = _segments(old.experts, best), 0
            for e, weight in zip(group, weights.tolist(), strict=True):
                other = _segments(old.experts, e)
                if e != best:
                    other = other[linear_sum_assignment(-(own @ other.T).numpy())[1]]
                total = total + weight * other
            gate, up, down = total.split(total.shape[1] // 3, 1)
            new.experts.gate_up_proj.data[slot] = torch.cat([gate, up])
            new.experts.down_proj.data[slot] = down.T
    return smaller


def mended(smaller: Any, model: Any, corpus: Any, way: str) -> Any:
    """Multiply what a smaller model's experts give by `gains`, one for each, or one `scale` for a layer."""
    import torch

    inputs, outputs = seen(model.module, corpus)
    for number, hidden in inputs.items():
        block = smaller.model.layers[number].mlp
        n_expert = len(block.experts.down_proj)
        gram = torch.zeros(n_expert, n_expert, dtype=torch.float64)
        cross, count = torch.zeros(n_expert, dtype=torch.float64), torch.zeros(n_expert, dtype=torch.float64)
        with torch.inference_mode():
            for x, y in zip(hidden.split(512), outputs[number].split(512), strict=True):
                parts, used = _parts(block, x)
                gram += torch.einsum("etd,ftd->ef", parts, parts).double()
                cross += torch.einsum("etd,td->e", parts, y).double()
                count += used
        if way == "scale":
            gains = (cross.sum() / gram.sum()).expand(n_expert)
        else:
            ridge = PRIOR / count.clamp(min=1) * gram.diagonal() + 1e-9 * gram.diagonal().mean()
            gains = 1 + torch.linalg.solve(gram + ridge.diag(), cross - gram.sum(1))
        block.experts.down_proj.data *= gains.float()[:, None, None]
    return smaller


def seen(module: Any, corpus: Any) -> tuple[dict[int, Any], dict[int, Any]]:
    """Return what each layer's block of experts reads, [n_token, d] by layer, and what it gives."""
    import torch

    inputs: dict[int, list[Any]] = {}
    outputs: dict[int, list[Any]] = {}
    with _hooked(module, inputs, outputs), torch.inference_mode():
        for rows in corpus.tokens.split(8):
            module(rows)
    joined = ({n: torch.cat(parts) for n, parts in each.items()} for each in (inputs, outputs))
    first, second = joined
    return first, second


@contextmanager
def _hooked(module: Any, inputs: dict[int, list[Any]], outputs: dict[int, list[Any]]) -> Iterator[None]:
    def keep(number: int) -> Any:
        def hook(_block: Any, args: Any, result: Any) -> None:
            inputs.setdefault(number, []).append(args[0].flatten(0, -2))
            outputs.setdefault(number, []).append(result.flatten(0, -2))

        return hook

    blocks = [layer.mlp for layer in module.model.layers]
    hooks = [block.register_forward_hook(keep(number)) for number, block in enumerate(blocks)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _parts(block: Any, x: Any) -> tuple[Any, Any]:
    """Return what each expert adds to the block's output, [n_expert, n_token, d], and how often it does."""
    import torch

    _, weights, ids = block.gate(x)
    parts = torch.zeros(len(block.experts.down_proj), *x.shape)
    for expert in range(len(parts)):
        token, slot = torch.where(ids == expert)
        gate, up = (x[token] @ block.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        output = (block.experts.act_fn(gate) * up) @ block.experts.down_proj[expert].T
        parts[expert, token] = output * weights[token, slot, None]
    return parts, torch.bincount(ids.flatten(), minlength=len(parts))


def _segments(experts: Any, expert: int) -> Any:
    """Return an expert's channels, [n_channel, 3 d]: gate row, up row, down column."""
    import torch

    gate, up = experts.gate_up_proj[expert].detach().chunk(2)
    return torch.cat([gate, up, experts.down_proj[expert].detach().T], dim=1)
