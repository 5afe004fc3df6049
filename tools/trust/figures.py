"""What the programs of this folder print: their figures, with the day and the versions."""

import json
import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any


def keep(kind: str, figures: Mapping[str, Any], out: Path | None) -> None:
    """Print figures as JSON, and write them into a file where one is named."""
    versions = {name: version(name) for name in ("mone-export", "torch")} | {
        "python": platform.python_version()
    }
    stamped = {"kind": kind, "date": time.strftime("%Y-%m-%d"), "versions": versions, **figures}
    text = json.dumps(stamped, indent=1)
    print(text)
    if out:
        out.write_text(text + "\n", encoding="utf-8")
