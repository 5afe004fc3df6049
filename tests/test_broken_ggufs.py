"""Truncated, corrupt and hostile GGUFs: one line, exit 1, nothing left, and memory bounded."""

import random
import resource
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Command, names
from gguf_models import tiny_gguf

from mone_export.artifacts import Calibration, ExpertStats
from mone_export.errors import MoneError
from mone_export.output.writing import write
from mone_export.pruning.planning import plan_without_scores
from mone_export.recipe import Recipe
from mone_export.source import GgufFile
from mone_export.source.gguf_header import read_header

pytestmark = [pytest.mark.slow, pytest.mark.upstream]

N_MUTATED = 500
MEMORY = 200 * 2**20
U64 = struct.Struct("<Q")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small GGUF that can be pruned."""
    return tiny_gguf("qwen3moe", tmp_path_factory.mktemp("sound")).read_bytes()


def head_end(sound: bytes) -> int:
    """Return about where the tensors' data begins."""
    return sound.index(b"output_norm.weight") + 2000


def changed(sound: bytes, at: int, new: bytes) -> bytes:
    return sound[:at] + new + sound[at + len(new) :]


def after(sound: bytes, text: bytes, skip: int = 0) -> int:
    """Return the place after a text in the head."""
    return sound.index(text) + len(text) + skip


# each from a sound file to a broken one, and what its one line must say
HOSTILE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda f: b"", "it ends in the middle of its head|announces 4 bytes"),
    "text": (lambda f: b"no GGUF at all, but a text", "is no GGUF"),
    "big-endian": (
        lambda f: f[:4] + struct.pack(">I", 3) + f[8:],
        "is a big-endian GGUF: get a little",
    ),
    "version": (lambda f: f[:4] + struct.pack("<I", 99) + f[8:], "is a version 99 GGUF"),
    "a million keys": (lambda f: changed(f, 16, U64.pack(10**6)), "announces 1000000 keys"),
    "a great many tensors": (lambda f: changed(f, 8, U64.pack(2**60)), "announces .* tensors"),
    "a key of 2^60 bytes": (
        lambda f: changed(f, 24, U64.pack(2**60)),
        "it announces 115292150460684697. bytes",
    ),
    "cut in the head": (lambda f: f[:3000], "it ends in the middle of its head"),
    "cut in the data": (lambda f: f[:-4096], r"would end at \d+ of \d+ bytes"),
    "a dimension that overflows": (
        lambda f: changed(f, after(f, b"blk.0.ffn_up_exps.weight", 4), U64.pack(2**62)),
        r"would end at \d+ of|has the shape",
    ),
    "five dimensions": (
        lambda f: changed(f, after(f, b"blk.0.ffn_up_exps.weight"), struct.pack("<I", 5)),
        "has 5 dimensions",
    ),
    "an offset past the end": (
        lambda f: changed(f, after(f, b"blk.0.ffn_up_exps.weight", 4 + 24 + 4), U64.pack(2**40)),
        r"would end at \d+ of \d+ bytes",
    ),
    "an overlap": (
        lambda f: changed(f, after(f, b"blk.0.ffn_up_exps.weight", 4 + 24 + 4), U64.pack(32)),
        "overlaps another tensor",
    ),
    "an unknown type": (
        lambda f: changed(f, after(f, b"blk.0.ffn_up_exps.weight", 4 + 24), struct.pack("<I", 4711)),
        "is of type 4711, which llama.cpp does not know",
    ),
    "a name twice": (
        lambda f: f.replace(b"blk.1.ffn_up_exps.weight", b"blk.0.ffn_up_exps.weight"),
        "or two are",
    ),
    "more experts used than there are": (
        lambda f: changed(f, after(f, b"qwen3moe.expert_used_count", 4), struct.pack("<I", 99)),
        "99 of 8 experts are used",
    ),
    "no experts": (
        lambda f: changed(f, after(f, b"qwen3moe.expert_count", 4), struct.pack("<I", 0)),
        "has no experts: only mixture-of-experts models",
    ),
    "other experts than announced": (
        lambda f: changed(f, after(f, b"qwen3moe.expert_count", 4), struct.pack("<I", 9)),
        "layer 0 has 8 experts, 9 of 9 are announced",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_one_line(case: str, sound: bytes, tmp_path: Path, command: Command) -> None:
    change, message = HOSTILE[case]
    file, out = tmp_path / "model.gguf", tmp_path / "out"
    out.mkdir()
    file.write_bytes(change(sound))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    command("-o", out / "x.gguf", model=file).is_one_line(f".*({message})")
    assert not names(out)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


def test_mutated_heads_raise_nothing_else(sound: bytes, tmp_path: Path) -> None:
    """Bytes, lengths and cuts at random places of the head: read, or refused by our own error."""
    dice, file, refused = random.Random(7), tmp_path / "model.gguf", 0
    end = head_end(sound)
    for _ in range(N_MUTATED):
        data = bytearray(sound)
        kind = dice.choice(("bytes", "length", "cut", "swap"))
        at = dice.randrange(4, end - 16)
        if kind == "bytes":
            for _ in range(dice.randrange(1, 9)):
                data[dice.randrange(4, end)] = dice.randrange(256)
        elif kind == "length":
            data[at : at + 8] = U64.pack(dice.choice((0, 1, 2**31, 2**32, 2**60, 2**63 - 1, 2**64 - 1)))
        elif kind == "cut":
            del data[at:]
        else:
            data[at : at + 8], data[24:32] = data[24:32], data[at : at + 8]
        file.write_bytes(data)
        try:
            source = GgufFile(file)
            assert source.spec.n_expert and source.computing_config and source.limits
        except MoneError as error:
            assert "\n" not in str(error)
            refused += 1
    print(f"{refused} of {N_MUTATED} refused")
    assert refused > N_MUTATED // 3


@pytest.mark.parametrize("number", [8, -1, 1])
def test_an_order_that_is_none(number: int, sound: bytes, tmp_path: Path, command: Command) -> None:
    """A pruned file whose order names an expert that is none, or one twice."""
    file, half, out = tmp_path / "model.gguf", tmp_path / "half.gguf", tmp_path / "out"
    out.mkdir()
    file.write_bytes(sound)
    blank = plan_without_scores(GgufFile(file).spec, Recipe.of(0.5))
    layers = {layer: ExpertStats.empty(8, GgufFile(file).spec.hidden_size) for layer in blank.n_kept}
    write(file, Calibration(blank.spec, "", "", "", 1, layers), blank, half)
    data = half.read_bytes()
    half.write_bytes(changed(data, after(data, b"mone.expert_order", 4 + 4 + 8), struct.pack("<i", number)))
    with pytest.raises(MoneError, match="mone.expert_order does not number the experts of 2 layers"):
        _ = GgufFile(half).before
    command("--restore-check", file, "-o", out / "x.gguf", model=half, text="").is_one_line("does not number")


def test_a_sound_file_is_read(sound: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(sound)
    assert GgufFile(file).spec.n_expert == 8
    assert len(read_header(file).tensors) > 20


def test_a_source_that_shrinks_while_it_is_read(sound: bytes, tmp_path: Path, command: Command) -> None:
    """Its head is read, and then somebody cuts it."""
    from mone_export.source import gguf_conversion

    file, out = tmp_path / "model.gguf", tmp_path / "out"
    out.mkdir()
    file.write_bytes(sound)
    write_head = gguf_conversion.GgufConversion.write_head

    def cut(self: object, *arguments: object) -> int:
        file.write_bytes(sound[:-8192])
        return write_head(self, *arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_conversion.GgufConversion, "write_head", cut)
        options = ["--method", "drop", "--score", "random", "-o", out / "x.gguf"]
        command(*options, model=file, text="").is_one_line("(became shorter while it was read|would end at)")
    assert not names(out)
