"""Protected experts: those that a text of its own needs most, though another one decides.

A calibration dominated by one kind of text says little about a rare language or domain: the experts that
this needs look idle, and go first. So the statistics of the rare text are taken by themselves. Of each layer
the `n` experts with the largest score `error` on it stay whole: a constant in their place would leave most of
that text's output missing. They enter the decision like super experts (`guard`), as infinite scores.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from mone_export.artifacts import Calibration, LayerPlan, Plan, Protected, Scores
from mone_export.errors import MoneError
from mone_export.lazily import torch
from mone_export.pruning.scoring import score


def most_needed(calibration: Calibration, n: int) -> Protected:
    """Return the `n` experts of each layer that the calibration's text needs most.

    An expert that the text never used is not among them. Of equals the lower id comes first.
    """
    values = score(calibration, "error", guarded=False).values
    experts = {}
    for layer, own in zip(calibration.spec.moe_layers, values, strict=True):
        best = torch.argsort(own, descending=True, stable=True)[:n]
        experts[layer] = tuple(sorted(best[own[best] > -torch.inf].tolist()))
    return Protected(calibration.corpus_name, n, calibration.corpus_sha256, calibration.n_token, experts)


def protect(scores: Scores, protected: Sequence[Protected]) -> Scores:
    """Return the scores with protected experts above all others, so that they are never pruned."""
    values = scores.values.clone()
    for text in protected:
        for row, layer in enumerate(scores.spec.moe_layers):
            values[row, list(text.experts[layer])] = torch.inf
    return replace(scores, values=values, protected=tuple(protected))


def check_protected(protected: Iterable[Protected], layers: Iterable[LayerPlan]) -> None:
    """Raise `MoneError` where a layer keeps too few experts to hold all that must stay."""
    layers = tuple(layers)
    for text in protected:
        for layer in layers:
            if lost := set(text.experts[layer.layer]) - {*layer.kept}:
                raise MoneError(
                    f"layer {layer.layer} keeps {len(layer.kept)} experts, {len(lost)} fewer than must stay "
                    f"with --protect {text.name}={text.n}: pass a smaller number there, or prune less"
                )


def with_count(chosen: Plan, unprotected: Plan) -> Plan:
    """Return a plan that says of its protected experts how many another one, without them, keeps whole."""
    kept = {layer.layer: {*layer.kept} for layer in unprotected.layers}
    counted = tuple(
        replace(text, n_saved=sum(len({*own} - kept[layer]) for layer, own in text.experts.items()))
        for text in chosen.protected
    )
    return replace(chosen, protected=counted)
