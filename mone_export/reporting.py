"""What an export says about itself when it is done: remarks a user should read, and where the time went."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

from mone_export.artifacts import Calibration, Plan, Report, Stability
from mone_export.calibration.usage import RARELY, rarely_seen
from mone_export.cautions import cautions, prediction
from mone_export.errors import MoneError, first_line
from mone_export.pruning.damage import mean_relative_error, spread
from mone_export.pruning.guard import super_experts
from mone_export.request import Job
from mone_export.runtime import Progress
from mone_export.source import GgufFile
from mone_export.source.gguf_header import read_header

log = logging.getLogger(__name__)


class Clock:
    """Seconds per stage, in the order of the laps."""

    def __init__(self) -> None:
        """Start."""
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """Say what the time since the last lap was for."""
        now = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def report(
    job: Job,
    calibration: Calibration | None,
    stability: Stability | None,
    chosen: Plan,
    *,
    size: int,
    clock: Clock,
    progress: Progress | None = None,
) -> Report:
    """Return the report of a finished export; its file is read once more, for its SHA-256."""
    remarks = [*_unstable(stability, job.request.until_stable), *_protected(chosen)]
    if calibration and chosen.share_pruned:
        remarks += [*_lost(calibration, chosen), *_extreme(calibration, chosen), *_rare(calibration, chosen)]
    remarks += [*cautions(job, chosen), *_predicting(job, chosen)]
    return Report(
        outfile=job.outfile,
        checkpoint=None if job.request.hf_out is None else Path(job.request.hf_out),
        recipe=chosen.recipe,
        size=size,
        size_unpruned=job.size_unpruned,
        n_kept=chosen.n_kept,
        parts=calibration.parts if calibration else (),
        stability=stability,
        seconds=clock.seconds,
        remarks=tuple(remarks),
        candidates=job.candidates,
        fates=chosen.fates,
        spread=spread(calibration) if calibration else {},
        sha256="" if job.request.only_checkpoint else _sha256(job.outfile, progress),
    )


def _sha256(file: Path, progress: Progress | None) -> str:
    """Return a file's hash, empty where it cannot be read: it is complete all the same."""
    try:
        return GgufFile(file).fingerprint(progress=progress)
    except (OSError, MoneError) as error:
        log.warning("its SHA-256 is not known: %s", first_line(error))
        return ""


def _predicting(job: Job, chosen: Plan) -> Iterator[str]:
    """Say what became of blocks that predict further tokens, by what the file says."""
    if not job.source.predicts or job.request.only_checkpoint:
        return
    header = read_header(job.outfile)
    arch = header.value("general.architecture")
    kept = header.integer(f"{arch}.nextn_predict_layers") > 0
    if chosen.share_pruned or not kept:
        yield prediction(kept=kept)


def _unstable(stability: Stability | None, until: float | None) -> Iterator[str]:
    if stability and until and stability.mean < until:
        yield (
            f"--until-stable {until:g} was not reached in {stability.n_token} tokens: "
            "more text may still change which experts go (--chunks)"
        )


def _protected(chosen: Plan) -> Iterator[str]:
    """Say of each protected text how many experts stay that would have gone."""
    for text in chosen.protected:
        n_held = sum(map(len, text.experts.values()))
        saved = "" if text.n_saved is None else f", {text.n_saved} of which would not without it"
        yield (
            f"{text.name} ({text.n_token} tokens) protects {text.n} experts of each layer: {n_held} stay "
            f"whole{saved}"
        )


def _lost(calibration: Calibration, chosen: Plan) -> Iterator[str]:
    """Say what giving up novices costs."""
    if chosen.recipe.method == "mone":
        return
    if chosen.width:
        spec = chosen.spec
        yield (
            f"every expert that stays has {chosen.width} of its {spec.expert_size} channels, its down "
            "projection fitted again: none is as it was, byte for byte"
        )
        if not any(layer.pruned for layer in chosen.layers):
            return
    lost = mean_relative_error(calibration, chosen, "zero")
    left = mean_relative_error(calibration, chosen, "least-squares")
    yield (
        f"the pruned experts made {lost:.1%} of the layers' squared output, which is lost; "
        f"with novices (--method mone) about {left:.1%} would be"
    )


def _extreme(calibration: Calibration, chosen: Plan) -> Iterator[str]:
    """Name the super experts."""
    for number, experts in super_experts(calibration).items():
        gone = next(set(experts) & set(layer.pruned) for layer in chosen.layers if layer.layer == number)
        yield (
            f"layer {number}: super experts {', '.join(map(str, experts))} reach extreme outputs; "
            f"{'pruned: ' + ', '.join(map(str, sorted(gone))) if gone else 'all kept'}"
        )


def _rare(calibration: Calibration, chosen: Plan) -> Iterator[str]:
    """Name the experts that the calibration hardly saw."""
    for layer in chosen.layers:
        stats = calibration.layers[layer.layer]
        n_expert = chosen.spec.present[layer.layer]  # those after it are novices already
        if rare := [expert for expert in rarely_seen(stats) if expert < n_expert]:
            never = sum(int(stats.count[expert]) == 0 for expert in rare)
            kept = sum(expert in layer.kept for expert in rare)
            yield (
                f"layer {layer.layer}: {len(rare)} experts seen in fewer than {RARELY} of {stats.n_token} "
                f"tokens ({never} never, {kept} kept): {', '.join(map(str, rare))}"
            )
