"""publish(): the page and the card of what was exported, or measured."""

import json
from pathlib import Path

from mone_export.artifacts import Calibration, Plan, Report, Scores
from mone_export.errors import MoneError
from mone_export.evaluation.results import Evaluation
from mone_export.inspection.anatomy import Anatomy
from mone_export.inspection.of_checkpoint import of_checkpoint
from mone_export.inspection.of_gguf import of_gguf
from mone_export.paths import RECORD
from mone_export.publishing import charts
from mone_export.publishing.card import write_card
from mone_export.publishing.page import figures, render
from mone_export.publishing.record import Record, export_part, load_record, save_record, write_text
from mone_export.request import Job
from mone_export.runtime import Progress
from mone_export.source import Checkpoint, GgufFile, Source
from mone_export.source.gguf_file import hash_of
from mone_export.source.gguf_header import shards
from mone_export.source.hub import Snapshot


def publish_export(
    job: Job,
    report: Report,
    chosen: Plan,
    scores: Scores,
    calibration: Calibration | None,
    progress: Progress | None = None,
) -> None:
    """Write the page and the card that a request asked for; raises `MoneError` where it cannot."""
    page, card = job.request.report, job.request.card
    if page is None and card is None:
        return
    whole = _anatomy(job.source)
    record: Record = {
        "mone_report": 1,
        "file": _file_part(report.outfile, progress),
        "export": export_part(job, report, chosen, scores, calibration, whole),
    }
    _written(record, page=page, card=card)


def records_of(
    file: Path, *, page: Path | None, card: Path | None, progress: Progress | None = None
) -> tuple[Record, Record]:
    """Return the records of a file's page and card, without an evaluation; new ones where there are none yet.

    Raises `MoneError` where they are of another file.
    """
    known = _file_part(file, progress)
    found = []
    for target, place in ((page, page and page.with_suffix(".json")), (card, card and card / RECORD)):
        record = load_record(place) if place else {}
        own = record.setdefault("file", known)
        if (own.get("file"), own.get("sha256")) != (known["file"], known["sha256"]):
            raise MoneError(
                f"{target} is of another file than {file} (or of an earlier one): name another place"
            )
        found.append(record)
    return found[0], found[1]


def publish_evaluation(
    evaluation: Evaluation, records: tuple[Record, Record], *, page: Path | None, card: Path | None
) -> None:
    """Write page and card again with what was measured; `records` are those of `records_of`."""
    measured = json.loads(evaluation.as_json())
    _written(records[0] | {"evaluation": measured}, page=page, card=None)
    _written(records[1] | {"evaluation": measured}, page=None, card=card)


def _written(record: Record, *, page: str | Path | None, card: str | Path | None) -> None:
    if card is not None:
        write_card(Path(card), record)
    if page is not None:
        page = Path(page)
        save_record(page.with_suffix(".json"), record)
        for name, _, figure in figures(record):
            charts.save(figure, page.with_name(f"{page.stem}-{name}"))
        write_text(page, render(record))


def _file_part(path: Path, progress: Progress | None) -> Record:
    """Return what a GGUF is, with the hash of each of its files, and that of all one after the other."""
    files = shards(path)
    whole = GgufFile(path).fingerprint(progress=progress)
    hashes = [whole] if len(files) == 1 else [hash_of([file], progress) for file in files]
    listed = [{"name": file.name, "sha256": found} for file, found in zip(files, hashes, strict=True)]
    return of_gguf(path).as_json() | {"file": path.name, "sha256": whole, "files": listed}


def _anatomy(source: Source) -> Anatomy:
    if isinstance(source, GgufFile):
        return of_gguf(source.path)
    assert isinstance(source, Checkpoint)
    return of_checkpoint(Snapshot(source.id, source.revision, source.folder))
