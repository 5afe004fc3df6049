"""Shared fixtures: calibration text that no commit changes, and small models."""

import os
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from command import Command
from fixed_text import fixed_text
from tiny import save_small

from mone_export import runtime
from mone_export.pipeline import export

# the models are so small that threads would mostly wait for each other
torch.set_num_threads(1)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # of programs: others have the cores, too


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--families-json", help="keep what tests/test_families.py measured in this file")
    parser.addoption("--archs-json", help="keep what tests/test_gguf_architectures.py measured in this file")


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is nightly
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave to the night all cases of a test but as many as its `by_day` says, evenly spaced."""
    cases = defaultdict[str, list[pytest.Item]](list)
    for item in items:
        if not item.get_closest_marker("nightly") and item.get_closest_marker("by_day"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for same in cases.values():
        (n,) = next(same[0].iter_markers("by_day")).args
        by_day = {place * len(same) // n for place in range(n)}
        for place, item in enumerate(same):
            if place not in by_day:
                item.add_marker("nightly")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file that no commit changes."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(fixed_text(), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Mixtral with a small vocabulary; not to be changed."""
    return save_small(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def demo_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as a GGUF in float32, with all its experts; not to be changed."""
    path = tmp_path_factory.mktemp("gguf") / "demo-f32.gguf"
    export("demo", ratio=0, outfile=path, outtype="f32")
    return path


@pytest.fixture(scope="session")
def half_gguf(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """The demo at half the bytes of its experts, thin ones and constants, its plan beside it as JSON."""
    path = tmp_path_factory.mktemp("half") / "demo-half.gguf"
    plan = path.with_suffix(".json")
    export("demo", ratio=0.5, outfile=path, outtype="f32", files=[text], n_row=16, plan_out=plan)
    return path


@pytest.fixture
def command(small: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command on the small model and the text."""
    return Command(small, text, capsys)


@pytest.fixture
def stats(command: Command, tmp_path: Path) -> Path:
    """Statistics of the small model and the text."""
    path = tmp_path / "kept" / "stats"
    path.parent.mkdir()
    command("--stats", path, "-o", path.with_name("first.gguf"), "--allocate", "sensitivity").is_fine()
    return path


@pytest.fixture(scope="session")
def stock_libraries() -> Path:
    """The folder of llama.cpp's libraries without the patches."""
    return runtime.build(patched=False, targets=("llama",)).bin
