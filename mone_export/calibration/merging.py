"""merge(): statistics made on different days, machines or texts become those of all the text together."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import TypeVar

from mone_export.artifacts import Calibration, ExpertStats, InputSums, Part, differing
from mone_export.errors import MoneError

log = logging.getLogger(__name__)

Sums = TypeVar("Sums", ExpertStats, InputSums)


def merge(files: Mapping[str, Calibration], *, weights: Mapping[str, float] | None = None) -> Calibration:
    """Merge the statistics of one model; `files` maps a name for messages to each.

    Without weights every token counts once, and the result equals one run over all the text up to float64
    rounding. `weights` give files their shares of the evidence; files without one divide the rest in
    proportion to their tokens. A file with T_i of all T tokens and share w_i has each token count

        c_i = w_i T / T_i

    times: its sums are multiplied by c_i. For an expert with n_i tokens of mean m_i in file i, that makes

        weight = sum c_i n_i,   mean = sum c_i n_i m_i / weight,
        M2 = sum c_i M2_i + sum c_i n_i ||m_i - mean||^2.

    `n_token` is T, and sum c_i T_i = T too, so a score per token of the text keeps its scale. `count` stays
    the sum of the n_i: what was seen is not more because it weighs more. Sensitivities, which no text adds up
    to, are the mean of the files' own, by c_i T_i. Inputs of matrices are those that all files have seen.

    The merged fingerprint of the text is the SHA-256 of the parts' own, one a line, sorted, each with its
    weight unless that is 1; so it does not depend on the order of merging.

    Raises `MoneError` when the files are of different models or share text, or the weights do not add up.
    """
    _check_mergeable(files)
    times = _times(files, weights or {})
    ordered = sorted(files, key=lambda name: files[name].corpus_sha256)  # the same bytes in any order
    first = files[ordered[0]]
    layers = {}
    for layer in first.spec.moe_layers:
        stats = [_counted(files[name].layers[layer], times[name]) for name in ordered]
        layers[layer] = reduce(ExpertStats.merge, stats)
    inputs = {}
    for matrix in sorted(set(first.inputs).intersection(*(files[name].inputs for name in ordered))):
        sums = [_counted(files[name].inputs[matrix], times[name]) for name in ordered]
        inputs[matrix] = reduce(InputSums.merge, sums)
    parts = [
        replace(part, weight=part.weight * times[name]) for name in ordered for part in files[name].parts
    ]
    parts.sort(key=lambda part: part.corpus_sha256)
    return Calibration(
        spec=first.spec,
        model_sha256=first.model_sha256,
        config=first.config,
        made_with=_common([files[name] for name in ordered]),
        corpus_sha256=_fingerprint(parts),
        corpus_name=", ".join(dict.fromkeys(name for part in parts for name in part.sources)),
        n_token=sum(calibration.n_token for calibration in files.values()),
        layers=layers,
        parts=tuple(parts),
        sensitivity=_sensitivity([files[name] for name in ordered], [times[name] for name in ordered]),
        inputs=inputs,
    )


def _check_mergeable(files: Mapping[str, Calibration]) -> None:
    if len(files) < 2:
        raise MoneError("merging takes two statistics files or more")
    (first_name, first), *others = files.items()
    seen: dict[str, str] = {}
    for name, calibration in others:
        if (calibration.model_sha256, calibration.spec) != (first.model_sha256, first.spec):
            raise MoneError(
                f"{first_name} and {name} are of different models (SHA-256 {first.model_sha256[:16]} and "
                f"{calibration.model_sha256[:16]}): merge statistics of one model"
            )
    for name, calibration in others:
        if keys := differing(calibration.config, first.config):
            raise MoneError(
                f"{first_name} and {name} were made with other values of {', '.join(keys)} in config.json: "
                "calibrate again with one of them"
            )
        what = differing(calibration.made_with, first.made_with)
        if calibration.made_with and first.made_with and what:
            log.warning("%s and %s differ in %s", first_name, name, ", ".join(what))
    for name, calibration in files.items():
        for part in calibration.parts:
            if part.corpus_sha256 in seen:
                raise MoneError(
                    f"{seen[part.corpus_sha256]} and {name} hold the same text (SHA-256 "
                    f"{part.corpus_sha256[:16]}), which would count twice: leave one out"
                )
            seen[part.corpus_sha256] = name


def _times(files: Mapping[str, Calibration], weights: Mapping[str, float]) -> dict[str, float]:
    """Return how often a token of each file counts."""
    if not weights:
        return dict.fromkeys(files, 1.0)
    n_token = {name: calibration.n_token for name, calibration in files.items()}
    for name, weight in weights.items():
        if name not in files:
            raise MoneError(f"--weight names {name}, which is none of the files: {', '.join(files)}")
        if not 0 < weight < 1:
            raise MoneError(f"--weight {name}={weight:g}: a share of the evidence is between 0 and 1")
    rest = 1 - sum(weights.values())
    others = sum(n_token[name] for name in files if name not in weights)
    if (others and rest <= 0) or (not others and abs(rest) > 1e-6):
        raise MoneError(f"the weights sum to {1 - rest:g}: all shares of the evidence must sum to 1")
    share = {name: rest * n_token[name] / others for name in files if name not in weights} | dict(weights)
    return {name: share[name] * sum(n_token.values()) / n_token[name] for name in files}


def _sensitivity(files: Sequence[Calibration], times: Sequence[float]) -> dict[int, float]:
    """Return the layers' sensitivities, each file's by its tokens as often as they count."""
    if not all(calibration.sensitivity for calibration in files):
        return {}
    weights = [n * calibration.n_token for n, calibration in zip(times, files, strict=True)]
    return {
        layer: sum(n * each.sensitivity[layer] for n, each in zip(weights, files, strict=True)) / sum(weights)
        for layer in files[0].spec.moe_layers
    }


def _common(files: Sequence[Calibration]) -> dict[str, str]:
    """Return what all files were made with; of what differs, all values."""
    names = dict.fromkeys(name for each in files for name in each.made_with)
    values = {
        name: dict.fromkeys(each.made_with[name] for each in files if name in each.made_with)
        for name in names
    }
    return {name: " and ".join(found) for name, found in values.items()}


def _counted(stats: Sums, times: float) -> Sums:
    return stats if times == 1 else stats.reweighted(times)


def _fingerprint(parts: list[Part]) -> str:
    lines = [
        part.corpus_sha256 if part.weight == 1 else f"{part.corpus_sha256} x {part.weight!r}"
        for part in parts
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
