"""How a page shows a record's values: each by its place in the record, so that none can be another one's.

A shown value is an element with the place (a JSON pointer, RFC 6901) and the form; whoever has the record can
check the page against it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from markupsafe import Markup, escape

from mone_export.evaluation.results import Measured, percent, shown
from mone_export.publishing.record import Record
from mone_export.terminal import as_size

FORMS: Mapping[str, Callable[[Any], str]] = {
    "text": str,
    "whole": lambda value: f"{value:,}",
    "size": as_size,
    "share": lambda value: f"{value:.1%}",
    "number": lambda value: f"{value:.3g}",
    "measured": lambda value: shown(Measured(**value)),
    "measured share": lambda value: percent(Measured(**value)),
}


def at(record: Any, pointer: str) -> Any:
    """Return what is at a place of a record; None where there is no such place."""
    for step in pointer.split("/"):
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(record, list):
            record = record[int(key)] if key.isdigit() and int(key) < len(record) else None
        elif isinstance(record, dict):
            record = record.get(key)
        else:
            return None
    return record


def step(key: object) -> str:
    """Return a key as a step of a pointer."""
    return str(key).replace("~", "~0").replace("/", "~1")


NOTHING = "–"  # where there is no value


class Shown:
    """Shows the values of one record."""

    def __init__(self, record: Record) -> None:
        """Take the record."""
        self._record = record

    def __call__(self, pointer: str, form: str = "text") -> Markup:
        """Return the element that shows a value; a dash where there is none."""
        value = at(self._record, pointer)
        if value is None:
            return Markup(NOTHING)
        return Markup('<span data-at="{}" data-form="{}">{}</span>').format(
            escape(pointer), form, FORMS[form](value)
        )

    def key(self, pointer: str, key: str) -> Markup:
        """Return the element that shows a key of a mapping, such as a text's name."""
        return Markup('<span data-at="{}" data-form="key">{}</span>').format(f"{pointer}/{step(key)}", key)
