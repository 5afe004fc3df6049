"""`--fit auto` is the size that this machine holds: devices, buffers and the cache, each counted once."""

from pathlib import Path

import pytest
from gguf_file import read

from mone_export import MoneError, room, runtime
from mone_export.cli import main
from mone_export.inspection.inspecting import examine
from mone_export.source import open_source

GIB = 2**30
LISTED = """Available devices:
  CUDA0: NVIDIA GeForce RTX 3090 (24124 MiB, 23000 MiB free)
  Vulkan1: AMD Radeon RX 7600 (RADV NAVI33) (8192 MiB, 8100 MiB free)
  BLAS: OpenBLAS (0 MiB, 0 MiB free)
"""


def test_devices_are_read_as_llama_cpp_lists_them() -> None:
    assert room.devices(LISTED) == {
        "CUDA0 (NVIDIA GeForce RTX 3090)": 23000 * 2**20,
        "Vulkan1 (AMD Radeon RX 7600 (RADV NAVI33))": 8100 * 2**20,
    }
    assert not room.devices("Available devices:\n")


@pytest.mark.parametrize("free", [{}, {"CUDA0": 8 * GIB, "CUDA1": 4 * GIB, "CUDA2": GIB // 2}])
def test_the_cache_and_buffers_come_off(
    small: Path, demo_gguf: Path, free: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "gpus", lambda: free)
    monkeypatch.setattr(room, "free_memory", lambda: 6 * GIB)
    for model, n_ctx in ((demo_gguf, 512), (demo_gguf, 2048), (small, 64)):
        found = room.room(open_source(model), f"auto:{n_ctx}")
        assert found.size == (10 * GIB if free else 5 * GIB) - found.cache
        assert found.cache > 0 and found.n_ctx == n_ctx
    anatomy = examine(str(demo_gguf), n_ctx=2048)
    assert anatomy.memory and anatomy.memory.cache == room.room(open_source(demo_gguf), "auto:2048").cache
    assert room.room(open_source(demo_gguf), "auto").n_ctx == 2048, "the model's window, shorter than 8192"


def test_a_machine_without_room_and_other_words_are_one_line(
    demo_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "gpus", lambda: {"CUDA0": GIB // 2})
    with pytest.raises(
        MoneError, match=r"finds no room \(537 MB free of CUDA0, less .*: 0 bytes\): end other"
    ):
        room.room(open_source(demo_gguf), "auto")
    for asked in ("autos", "16GiB", "auto:" + "9" * 5000):
        with pytest.raises(MoneError, match=f"^--fit {asked}: pass a size .16GiB; from Python a number"):
            room.room(open_source(demo_gguf), asked)


@pytest.mark.upstream
def test_the_newest_build_is_asked() -> None:
    """Which sees no GPU on a machine without one, and says so in the form that is read."""
    program = runtime.path() / "llama-bench"
    assert program.is_file()
    assert all(size > 0 for size in room.gpus().values())


def test_the_command_says_how_the_size_comes_about(
    demo_gguf: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "gpus", lambda: {"CUDA0": GIB + 16_000_000})
    outfile = tmp_path / "fits.gguf"
    words = [str(demo_gguf), "--fit", "auto:1024", "-f", str(text), "--chunks", "2", "-c", "64"]
    assert main([*words, "-o", str(outfile)]) == 0
    limit = room.room(open_source(demo_gguf), "auto:1024").size
    assert limit // 2 < outfile.stat().st_size <= limit < demo_gguf.stat().st_size
    err = capsys.readouterr().err
    assert "--fit auto:1024: 1.09 GB free of CUDA0, less 2.62 MB for the cache of 1024 tokens" in err
    assert read(outfile)
