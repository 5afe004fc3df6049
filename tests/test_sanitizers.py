"""What tools/trust/sanitizers.py is made of: reports read, files broken, whose a fault is."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from gguf import GGMLQuantizationType
from gguf_parts import Parts, Stored, key, put_together, taken_apart

TOOLS = Path(__file__).parents[1] / "tools" / "trust"
TREE = "../../source/vendor/llama.cpp"
ADDRESS = f"""
==7==ERROR: AddressSanitizer: heap-buffer-overflow on address 0x602000000014 at pc 0x7f READ of size 4
    #0 0x55d1 in llama_model_base::load_expert_tier_sizes(llama_model_loader&) {TREE}/src/a.cpp:12
    #1 0x55d2 in main {TREE}/tools/main.cpp:3

0x602000000014 is located 0 bytes to the right of 4-byte region allocated by thread T0 here:
    #0 0x7f in operator new(unsigned long) tools/trust/loader.cpp:30
SUMMARY: AddressSanitizer: heap-buffer-overflow {TREE}/src/a.cpp:12 in llama_model_base
"""
LEAK = f"""
==7==ERROR: LeakSanitizer: detected memory leaks

Direct leak of 80 byte(s) in 1 object(s) allocated from:
    #0 0x7f in operator new(unsigned long) ../../asan_new_delete.cpp:95
    #1 0x7f in common_init {TREE}/common/common.cpp:70
"""
UNDEFINED = f"""
{TREE}/src/b.cpp:40:17: runtime error: signed integer overflow: 5 + 2147483647 cannot be represented
    #0 0x7f in std::vector<int>::push_back(int) /usr/include/c++/12/vector:9
    #1 0x7f in ggml_rope(int) {TREE}/src/b.cpp:40
{TREE}/src/b.cpp:41:17: runtime error: load of value 7, which is not valid
"""
THREAD = f"""
WARNING: ThreadSanitizer: data race (pid=7)
  Write of size 4 at 0x7b04 by thread T1:
    #0 ggml_compute {TREE}/ggml/src/c.c:12:5 (libggml.so+0x12)

  Previous read of size 4 at 0x7b04 by main thread:
    #0 ggml_other {TREE}/ggml/src/c.c:99 (libggml.so+0x13)
"""


@pytest.fixture(scope="module", autouse=True)
def tools_on_the_path() -> None:
    sys.path.append(str(TOOLS))


def tool(name: str) -> ModuleType:
    return import_module(name)


@pytest.fixture(scope="module")
def sound() -> dict[str, Parts]:
    """A file that has all of what is broken: counts, tiers, slots, biases."""
    shapes = {
        "ffn_gate_inp.weight": (32, 4),
        "ffn_up_exps.weight": (32, 32, 1),
        "ffn_down_exps.t1.weight": (32, 32, 1),
        "ffn_down_exps.bias": (32, 4),
    }
    tensors = {
        f"blk.{layer}.{name}": Stored(GGMLQuantizationType.F32, shape, bytes(4 * 32 * shape[1]))
        for layer in (0, 1)
        for name, shape in shapes.items()
    }
    slots = Stored(GGMLQuantizationType.I32, (1, 4), bytes(16))
    values: dict[str, Any] = {
        "general.architecture": "olmoe",
        "olmoe.block_count": 2,
        "olmoe.expert_count": 4,
        "olmoe.expert_kept_count": [1, 1],
        "olmoe.expert_tier_count": 1,
        "olmoe.expert_tier_sizes": [1, 1],
        "mone.format_version": 2,
    }
    keys = {name: key(name, value) for name, value in values.items()}
    return {"sound": Parts(keys, tensors | {"blk.0.ffn_exps_slot": slots})}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (ADDRESS, ["heap-buffer-overflow; llama_model_base::load_expert_tier_sizes, src/a.cpp"]),
        (LEAK, ["leak; common_init, common/common.cpp"]),
        (THREAD, ["data race; ggml_compute, ggml/src/c.c"]),
        (
            UNDEFINED,
            [
                "undefined: signed integer overflow: N + N cannot be represented; ggml_rope, src/b.cpp",
                "undefined: load of value N, which is not valid; , src/b.cpp",
            ],
        ),
        ("error: no sanitizer\n    #0 a main.cpp:3\n", []),
    ],
)
def test_reports_are_read(text: str, wanted: list[str]) -> None:
    found = tool("sanitizer_reports").reports(text)
    assert [f"{report.kind}; {report.place}" for report in found] == wanted


@pytest.mark.parametrize(
    ("file", "line", "ours"), [("a.cpp", 12, True), ("a.cpp", 13, False), ("b.cpp", 12, False)]
)
def test_a_report_is_ours_where_a_patch_wrote_a_line(file: str, line: int, ours: bool) -> None:
    (report,) = tool("sanitizer_reports").reports(ADDRESS)
    assert report.is_ours({f"src/{file}": frozenset({line})}) is ours


def test_lines_that_a_patch_wrote(tmp_path: Path) -> None:
    for name, text in (("stock", "a\nb\nc\n"), ("patched", "a\nB\nb\nc\nd\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.cpp").write_text(text)
    (tmp_path / "patched" / "new.cpp").write_text("1\n2\n")
    lines = tool("sanitizer_reports").written_lines(
        tmp_path / "stock", tmp_path / "patched", ["x.cpp", "new.cpp"]
    )
    assert lines == {"x.cpp": {2, 5}, "new.cpp": {1, 2}}


def test_a_number_makes_a_file(sound: dict[str, Parts]) -> None:
    """The same bytes whenever it is asked for, other ones for another number, and nearly all are broken."""
    broken, whole = tool("broken_ggufs").broken, put_together(sound["sound"])
    made = [broken(number, sound) for number in range(60)]
    assert made == [broken(number, sound) for number in range(60)]
    assert len({each.content for each in made}) > 40
    assert sum(each.content == whole for each in made) < 10
    assert made != [broken(number, sound, 1) for number in range(60)]


def test_every_change_changes_a_file(sound: dict[str, Parts]) -> None:
    from random import Random

    whole = put_together(sound["sound"])
    for name, change in tool("broken_ggufs").CHANGES.items():
        made = {put_together(change(sound["sound"], Random(number))) for number in range(12)}
        assert len(made - {whole}) > 2, name


def test_what_is_left_alone_stays(sound: dict[str, Parts], tmp_path: Path) -> None:
    """A file with a wrong number is well-formed: only our own checks can find it."""
    from random import Random

    change = tool("broken_ggufs").CHANGES["a number"]
    file = tmp_path / "model.gguf"
    file.write_bytes(put_together(change(sound["sound"], Random(3))))
    found = taken_apart(file)
    assert found.tensors == sound["sound"].tensors
    assert [name for name in found.keys if found.keys[name] != sound["sound"].keys[name]]


@pytest.mark.parametrize(
    ("said", "unclear"),
    [
        ("llama_model_load: error loading model: layer 0 keeps 9 of 8 experts\n", None),
        ("llama_model_load: error loading model: vector::_M_range_check: __n\n", "vector::"),
        ("print_info: n_expert = 8\n", "no message"),
    ],
)
def test_refusals_say_what_is_wrong(said: str, unclear: str | None) -> None:
    found = tool("sanitizers").vague(said)
    assert (found is None) if unclear is None else unclear in found


def test_checks_that_can_be_taken_away_exist() -> None:
    patches = "".join(path.read_text() for path in (TOOLS.parents[1] / "patches").glob("llama-*.patch"))
    for check, (text, _) in tool("sanitizers").CHECKS.items():
        assert patches.count(text) == 1, check
