"""The tables of docs/trust.md: what was tried against files, runs and the runtime (tools/trust)."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Json = dict[str, Any]
Row = Sequence[str]


def faults_table(data: Json) -> Iterable[Row]:
    """Yield how many trials there were of each fault on each road, and how many of them failed."""
    roads = sorted({name.rpartition(", ")[2] for name in data["by_fault"]})
    failed = Counter((each["fault"], each["road"]) for each in data["failures"])
    yield "fault", *(f"{road}: trials" for road in roads), "failed"
    for fault in dict.fromkeys(name.rpartition(", ")[0] for name in data["by_fault"]):
        counts = [data["by_fault"].get(f"{fault}, {road}", 0) for road in roads]
        yield fault, *map(str, counts), str(sum(failed[fault, road] for road in roads))


def faults_note(data: Json) -> str:
    """Say what was run, and that it can fail."""
    controls = ", ".join(
        f"{name} ({control['failed']} of {control['trials']}: {control['fault']})"
        for name, control in data["controls"].items()
    )
    return (
        f"{data['trials']} trials at random moments, {data['failed']} failed; a small random model. After "
        "each: old output, inputs and statistics whole, one line said, and the same command once more "
        "gives the bytes of an undisturbed run; after a power cut: all that a rename promises was flushed "
        f"before it. The trials can fail: without a protection did {controls}."
    )


def fuzz_table(data: Json) -> Iterable[Row]:
    """Yield what became of the broken files that each reader was given."""
    yield "reader", "files", "read", "refused", "failed", "longest, s", "memory grown, MiB"
    for name, found in data["readers"].items():
        numbers = [found[key] for key in ("cases", "read", "refused")]
        numbers += [sum(found["failures"].values()), found["longest_s"], found["memory_grown_mib"]]
        yield name, *map(str, numbers)


def fuzz_note(data: Json) -> str:
    """Say what was run."""
    return "Sound files with bytes, lengths, places and values changed; refused means one line of ours."


TABLES: dict[str, Callable[[Json], Iterable[Row]]] = {
    "faults": faults_table,
    "fuzz": fuzz_table,
}
NOTES: dict[str, Callable[[Json], str]] = {
    "faults": faults_note,
    "fuzz": fuzz_note,
}
