"""export(): all stages in one function. Read this file first.

Everything that can fail cheaply fails before anything expensive starts (`request.prepare`).
"""

import inspect
import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mone_export.artifacts import Calibration, Plan, Report
from mone_export.calibration import ranks
from mone_export.deciding import (
    after_pruned,
    budgeted,
    counted,
    decided,
    file_size,
    fitted_novices,
    scored,
    with_best_candidate,
)
from mone_export.lazily import Tensor
from mone_export.output.checkpoints import write_checkpoint
from mone_export.output.splitting import split
from mone_export.output.thin_experts import Thinner
from mone_export.output.writing import write
from mone_export.pruning.plan_files import save_plan
from mone_export.pruning.planning import plan, plan_without_scores
from mone_export.publishing.publishing import publish_export
from mone_export.reporting import Clock, report
from mone_export.request import Job, Request, check_paths, prepare
from mone_export.runtime import Progress
from mone_export.source import Source
from mone_export.statistics import collect, known_protected

log = logging.getLogger(__name__)


def export(model: str | Path | Source, *, progress: Progress | None = None, **options: Any) -> Report | None:
    """Prune a model's experts, replace them by novices and write the result as a GGUF, a checkpoint or both.

    `options` are those of `Request`: `outfile` or `hf_out`, and `ratio` or `fit` must be among them. With
    `fit`, a size in bytes, the ratio and the type that do the least harm are chosen, unless given. Every
    failure is a `MoneError`. It leaves no output half written, but those that were finished before it stay:
    statistics, a plan file, and the checkpoint where the GGUF after it fails. Of several processes that
    share the rows (torchrun) the first alone returns a report.
    """
    clock = Clock()
    job = prepare(Request(model=model, **options), progress=progress)
    clock.lap("checks")
    job, calibration, stability = collect(job, progress=progress)
    clock.lap("calibration")
    if ranks.rank() > 0:
        return None
    scores = scored(job, calibration)
    novices: Mapping[int, Tensor] | Thinner | None = None
    if calibration and job.decides and job.recipe.allocation == "budget":
        job, chosen, novices = budgeted(job, calibration, scores, progress=progress)
    else:
        job = with_best_candidate(job, scores)
        chosen = decided(job, scores, progress=progress)
    if job.candidates:  # the name may say what was chosen
        check_paths(job)
    clock.lap("plan")
    if calibration and job.request.sequential:
        calibration = after_pruned(job, calibration, chosen.n_kept, progress=progress)
        scores = scored(job, calibration)
        chosen = plan(scores, chosen.n_kept, recipe=chosen.recipe)
        clock.lap("layer by layer")
    chosen = counted(job, calibration, chosen)
    if calibration and job.recipe.novice == "joint":
        novices = fitted_novices(job, calibration, chosen, progress=progress)
        clock.lap("joint novices")
    if job.request.plan_out is not None:
        named = {"name": job.source.name, "sha256": job.source.fingerprint(progress=progress)}
        save_plan(job.request.plan_out, chosen, scores, named)
    outfile, size = _written(job, calibration, chosen, novices, progress)
    clock.lap("writing")
    if outfile != job.outfile:
        job = replace(job, request=replace(job.request, outfile=outfile))  # the first of several
    done = report(job, calibration, stability, chosen, size=size, clock=clock, progress=progress)
    publish_export(job, done, chosen, scores, calibration, progress)
    return done


def _written(
    job: Job,
    calibration: Calibration | None,
    chosen: Plan,
    novices: Mapping[int, Tensor] | Thinner | None,
    progress: Progress | None,
) -> tuple[Path, int]:
    """Write the GGUF, the checkpoint, or both; returns path and bytes of the GGUF, or of the checkpoint."""
    request, size = job.request, 0
    if request.hf_out is not None and not isinstance(novices, Thinner):
        size = write_checkpoint(
            job.source, calibration, chosen, request.hf_out, novices=novices, progress=progress
        )
    if request.only_checkpoint:
        return job.outfile, size
    size = write(
        job.source,
        calibration,
        chosen,
        job.outfile,
        novices=novices,
        outtype=job.rounding,
        progress=progress,
    )
    if request.split_max_size is None:
        return job.outfile, size
    return split(job.outfile, request.split_max_size, overwrite=request.overwrite), size


def rehearse(
    model: str | Path | Source, *, progress: Progress | None = None, **options: Any
) -> tuple[Job, Plan]:
    """Return what `export` would do as far as it is known without running the model: the job and a plan.

    The job's size is that of the plan's file. Without saved statistics the plan has the right number of
    arbitrary experts in every layer, as many in each; so has it where a second pass decides.
    """
    job = prepare(Request(model=model, **options), dry=True, progress=progress)
    if job.plan:
        return replace(job, size=file_size(job, job.plan)), job.plan
    saved = job.saved
    if not saved or not job.decides or job.recipe.novice == "thin":
        return job, plan_without_scores(job.source.spec, job.recipe)
    if (known := known_protected(job)) is None:
        log.info("which experts --protect holds is known after its text was calibrated on")
        return replace(job, saved=None), plan_without_scores(job.source.spec, job.recipe)
    job = known
    scores = scored(job, saved)
    if job.recipe.allocation == "budget":
        job, chosen, _ = budgeted(job, saved, scores, progress=progress)
        return job, chosen
    job = with_best_candidate(job, scores)
    chosen = decided(job, scores)
    return replace(job, size=file_size(job, chosen)), chosen


def _signature() -> inspect.Signature:
    """Return what `help(export)` shows: the options by name, with their defaults."""
    own = inspect.signature(export)
    options = [
        inspect.Parameter(
            each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type
        )
        for each in fields(Request)
        if each.name != "model"
    ]
    return own.replace(parameters=[*list(own.parameters.values())[:2], *options])


export.__dict__["__signature__"] = _signature()
