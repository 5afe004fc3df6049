#!/usr/bin/env python3
"""Write docs/families.md from docs/measurements/families.json, which the tests write:

pytest -m families --families-json=docs/measurements/families.json
pytest tests/test_gguf_architectures.py --archs-json=docs/measurements/archs.json
python tools/pages/families_table.py
"""

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs"

HEAD = """# Model families

Written by `tools/pages/families_table.py` from what `pytest -m families` measured; not to be edited.

One small random model of each family (4 layers, 16 experts, 4 used; its routing features on, selection
biases random) is calibrated, exported unpruned and with half of its experts replaced, and run in the patched
llama.cpp. NMSE: squared difference to the logits of the definition in plain PyTorch, over their squared norm,
100 tokens, float32. A family works when the pruned file is no worse than twice the unpruned one, or 1e-6.
Selection bias: added to the scores for choosing experts, not to their weights. Groups: a token's experts
come from so many of so many groups. MTP block: after the last layer, for predicting further tokens; rows
without an entry were tested without one. From a GGUF: the largest relative difference between the statistics
that llama.cpp gives of the unpruned file and PyTorch's of the checkpoint.
"""
ARCHS = """
Architectures by llama.cpp's names, each as a tiny random GGUF of its own test's shape with more experts than
are used: half of them replaced, by statistics from llama.cpp. NMSE: of the pruned file's logits, to those of
the unpruned file with the novices put into its graph. Among those without a road from a checkpoint here are
{known}.
"""


def main() -> None:
    """Write the page."""
    data = json.loads((DOCS / "measurements" / "families.json").read_text())
    archs = json.loads((DOCS / "measurements" / "archs.json").read_text())["rows"]
    works = [row for row in data["rows"] if "novice" in row]
    refused = [row for row in data["rows"] if "refused" in row]
    lines = [
        HEAD,
        f"## {len(works)} models of {len({row['name'].split()[0] for row in works})} classes that work",
        "",
        "| transformers class | GGUF arch | routing | selection bias | shared experts | groups | MTP block "
        "| status | NMSE unpruned | half novices | from a GGUF |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(
            _line(*_facts(row), *(f"{row[key]:.0e}" for key in ("unpruned", "novice", "gguf")))
            for row in works
        ),
        "",
        *(f"- {row['name']}: {row['note']}." for row in works if row["note"]),
        "",
        f"## {sum('nmse' in row for row in archs)} models that can be pruned as a GGUF",
        ARCHS.format(known=_known(archs)),
        "| GGUF arch | layers with experts | NMSE | what happens |",
        "|---|---|---|---|",
        *(_line(*_arch(row)) for row in archs),
        "",
        f"## {len(refused)} that are refused, before any weights are read",
        "",
        "| transformers class | routing | message |",
        "|---|---|---|",
        *(_line(row["name"], row["routing"], _message(row)) for row in refused),
        "",
        f"Measured with transformers {data['versions']['transformers']}, torch {data['versions']['torch']}.",
    ]
    (DOCS / "families.md").write_text("\n".join(lines) + "\n")


def _facts(row: dict[str, Any]) -> tuple[str, ...]:
    bias = "yes" if row["bias"] else ""
    return row["name"], row["arch"], row["routing"], bias, row["shared"], row["groups"], row["mtp"], "works"


def _known(archs: list[dict[str, Any]]) -> str:
    named = [f"{row['known_as']} ({row['name']})" for row in archs if row["known_as"]]
    return f"{', '.join(named[:-1])} and {named[-1]}"


def _arch(row: dict[str, Any]) -> tuple[str, ...]:
    if "refused" in row:
        return row["name"], "", "", row["refused"]
    return row["name"], str(row["layers"]), f"{row['nmse']:.0e}", "works"


def _message(row: dict[str, Any]) -> str:
    return f"{row['refused']} ({row['note']})" if row["note"] else row["refused"]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


if __name__ == "__main__":
    main()
