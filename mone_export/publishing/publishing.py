"""publish(): the page and the card of what was exported, or measured."""

import hashlib
import json
from collections.abc import Sequence
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
from mone_export.source.gguf_header import shards
from mone_export.source.hub import Snapshot

_CHUNK = 2**24


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
    files = shards(report.outfile)
    hashes = _hashed(files, progress) if card is not None else {}
    listed = [
        {"name": file.name, "size": file.stat().st_size, "sha256": hashes.get(file.name)} for file in files
    ]
    record: Record = {
        "mone_report": 1,
        "file": of_gguf(report.outfile).as_json() | {"file": report.outfile.name, "files": listed},
        "export": export_part(job, report, chosen, scores, calibration, whole),
    }
    _written(record, page=page, card=card)


def records_of(file: Path, *, page: Path | None, card: Path | None) -> tuple[Record, Record]:
    """Return the records of a file's page and card, without an evaluation; new ones where there are none yet.

    Raises `MoneError` where they are of another file.
    """
    known = of_gguf(file).as_json() | {"file": file.name}
    found = []
    for target, place in ((page, page and page.with_suffix(".json")), (card, card and card / RECORD)):
        record = load_record(place) if place else {}
        own = record.setdefault("file", known)
        if (own["file"], own["size"]) != (known["file"], known["size"]):
            raise MoneError(f"{target} is of {own['file']}, not of {file}: name another place")
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


def _anatomy(source: Source) -> Anatomy:
    if isinstance(source, GgufFile):
        return of_gguf(source.path)
    assert isinstance(source, Checkpoint)
    return of_checkpoint(Snapshot(source.id, source.revision, source.folder))


def _hashed(files: Sequence[Path], progress: Progress | None) -> dict[str, str]:
    """Return the SHA-256 of each file by its name."""
    total, done, found = sum(file.stat().st_size for file in files), 0, {}
    for path in files:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                if progress:
                    progress(done // 2**20, total // 2**20, "hashing the file (MiB)")
        found[path.name] = digest.hexdigest()
    return found
