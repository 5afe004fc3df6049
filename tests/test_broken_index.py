"""Indexes of weights that no reader can follow are refused in one line."""

import json
from pathlib import Path

import pytest

from mone_export.errors import MoneError
from mone_export.source.hub import INDEX
from mone_export.source.weights import weight_files

DEEP = 5000


@pytest.mark.parametrize(
    "content",
    ["[" * DEEP, json.dumps({"weight_map": {"a": "x" * 300}})],
    ids=["deep", "a long name"],
)
def test_an_index_that_leads_nowhere_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(MoneError, match="cannot read .*get the model again") as error:
        weight_files(tmp_path)
    assert "\n" not in str(error.value)
