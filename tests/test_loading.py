"""How weights come into memory: to the device at once, by names that fit the installed transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mone_export import transformers_internals
from mone_export.calibration import loading
from mone_export.calibration.loading import load_module
from mone_export.errors import MoneError


class Loader:
    """Stands in for the class that loads a model: records where to, and loads it on the CPU."""

    def __init__(self, real: Any, error: Exception | None = None) -> None:
        self.real, self.error, self.places = real, error, []

    def from_pretrained(self, path: Path, *, device_map: Any, **options: Any) -> Any:
        self.places.append(device_map)
        if self.error:
            raise self.error
        return self.real.from_pretrained(path, **options)


@pytest.fixture
def loader(small: Path, monkeypatch: pytest.MonkeyPatch) -> Loader:
    loader = Loader(transformers.AutoModelForCausalLM)
    monkeypatch.setattr(loading, "auto_class", lambda _config: loader)
    return loader


def test_a_model_for_a_gpu_does_not_pass_through_the_machines_memory(
    small: Path, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, _device: module)
    load_module(small, device="cuda:1", dtype=torch.float32)
    load_module(small, device="cpu", dtype=torch.float32)
    assert loader.places == [{"": "cuda:1"}, None]


def test_a_gpu_that_is_too_small_is_named(small: Path, loader: Loader) -> None:
    loader.error = torch.OutOfMemoryError("fake")
    with pytest.raises(MoneError, match="does not fit the memory of cuda: pass --stream on"):
        load_module(small, device="cuda", dtype=torch.float32)


def test_another_version_of_transformers_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers_internals.check_version()
    monkeypatch.setattr(transformers_internals, "TESTED", "5.99.0")
    with pytest.raises(MoneError, match=r"^transformers \S+ is installed.*pip install transformers==5.99.0$"):
        transformers_internals.check_version()


def test_the_version_is_the_one_that_the_package_pins() -> None:
    pinned = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'"transformers=={transformers_internals.TESTED}"' in pinned
