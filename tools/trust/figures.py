"""What the programs of this folder print: their figures, with the day and the versions.

Importing it lets them import the helpers of tests/ and the other tools.
"""

import json
import platform
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("tests", "tools")]


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
