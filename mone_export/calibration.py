"""calibrate(): rows of text through the model, every expert's statistics out."""

import torch

from mone_export.architectures import factor_after_experts
from mone_export.artifacts import Calibration, Corpus, ExpertStats
from mone_export.errors import MoneError
from mone_export.model import Model
from mone_export.observer import observe
from mone_export.runtime import Progress

TOKENS_PER_BATCH = 4096


def calibrate(
    model: Model, corpus: Corpus, *, model_sha256: str, progress: Progress | None = None
) -> Calibration:
    """Run the corpus through the model once and return the exact statistics of all its experts.

    Rows are batched to about `TOKENS_PER_BATCH` tokens; the batch size does not change the result beyond
    float64 rounding of the sums and the matrix products' own. Raises `MoneError` when the model's outputs are
    not finite.
    """
    n_row, seq_len = corpus.tokens.shape
    batches = corpus.tokens.split(max(1, TOKENS_PER_BATCH // seq_len))
    done = 0
    with torch.inference_mode(), observe(model.module) as layers:
        for rows in batches:
            # the body only: logits of a large vocabulary would cost more memory than all the rest
            model.module.base_model(input_ids=rows.to(model.module.device), use_cache=False)
            done += rows.numel()
            if progress:
                progress(done, corpus.tokens.numel(), "calibrating (tokens)")
        factor = factor_after_experts(model.spec.arch, model.module.config.get_text_config())
        stats = {layer: of_layer.weighted(factor) for layer, of_layer in layers.items()}
    _check_finite(stats)
    return Calibration(
        spec=model.spec,
        model_sha256=model_sha256,
        corpus_sha256=corpus.sha256,
        corpus_name=corpus.name,
        n_token=corpus.tokens.numel(),
        layers=stats,
    )


def _check_finite(layers: dict[int, ExpertStats]) -> None:
    for layer, stats in layers.items():
        if not torch.isfinite(stats.norm_sq_sum).all():
            raise MoneError(
                f"layer {layer}: expert outputs are not finite; the weights overflow in this precision: "
                "try --dtype float32 or bfloat16"
            )
