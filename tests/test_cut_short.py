"""Files that somebody cuts short while they are read: one line, and no signal that ends the process."""

import ctypes
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest
import torch
from test_converter import Whole
from tiny import save_tiny

from mone_export.calibration.cut_short import cut_short
from mone_export.calibration.loading import load_module
from mone_export.errors import MoneError
from mone_export.source import inspect
from mone_export.source.llamacpp import Conversion

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def library() -> ctypes.CDLL:
    found = ctypes.CDLL(None)
    found.mmap.restype = ctypes.c_void_p
    found.mmap.argtypes = (*(ctypes.c_void_p, ctypes.c_size_t), *[ctypes.c_int] * 3, ctypes.c_long)
    found.memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    return found


@linux
def test_a_mapping_that_lost_its_file_ends_in_zeros(library: ctypes.CDLL, tmp_path: Path) -> None:
    size, path = 2**20, tmp_path / "a file.gguf"
    path.write_bytes(b"x" * size)
    with path.open("rb") as file:
        place = library.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    os.truncate(path, 5000)
    look = Thread(target=library.memchr, args=(place + 2**16, ord("y"), size - 2**16), daemon=True)
    with cut_short() as files:
        look.start()
        look.join(timeout=20)  # it would never end, were nothing put there
        assert not look.is_alive()
    assert files == [path]
    library.munmap(ctypes.c_void_p(place), ctypes.c_size_t(size))


@linux
def test_a_model_in_memory_is_not_mapped(tmp_path: Path) -> None:
    save_tiny("MixtralForCausalLM", tmp_path)
    module = load_module(tmp_path, device="cpu", dtype=torch.float32)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert next(module.parameters()).isfinite().all()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda file: os.truncate(file, file.stat().st_size // 2), "became shorter while it was read"),
        (Path.unlink, "cannot read"),
    ],
    ids=["cut short", "removed"],
)
def test_the_converter_says_that_a_file_was_spoiled(
    spoil: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    save_tiny("MixtralForCausalLM", folder)
    conversion = Conversion(folder, Whole(inspect(folder)), outtype="f32")
    conversion.write_head(tmp_path / "x.gguf", {})
    spoil(folder / "model.safetensors")
    with pytest.raises(MoneError, match=said):
        conversion.write_tensors()
    conversion.close()
