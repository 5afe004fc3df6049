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
    """Say what was run."""
    return (
        f"{data['trials']} trials at random moments, {data['failed']} failed; a small random model. After "
        "each: old output, inputs and statistics whole, one line said, and the same command once more "
        "gives the bytes of an undisturbed run."
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


def under_load_table(data: Json) -> Iterable[Row]:
    """Yield what a server with each file answered, and how its memory went."""
    yield "file", "whole answers", "at a tie", "wrong", "cancelled", "malformed, by status", "memory grows by"
    for name, run in data["runs"].items():
        grows = run["growth_kib_per_minute"]
        yield (
            name,
            *(str(run[key]) for key in ("answers", "differ_at_a_tie", "wrong", "cancelled")),
            ", ".join(f"{status}: {n}" for status, n in run["malformed"].items()),
            f"{grows['slope']:.1f} +- {grows['error']:.1f} KiB a minute",
        )


def under_load_note(data: Json) -> str:
    """Say what was run."""
    failed = sum(len(run["failures"]) for run in data["runs"].values())
    return (
        f"llama-server with the demo at half its bytes, {data['clients']} clients each for "
        f"{data['seconds'] / 60:g} minutes, side by side; {failed} failures. At a tie: the first "
        "token that differs from the serial run's was as likely there as the best, up to rounding."
    )


def coverage_table(data: Json) -> Iterable[Row]:
    """Yield how much of the package the tests run, and of the files of which they run least."""
    yield "", "lines", "of", "branches", "of", "together"
    for name, found in {"all": data, **data["lowest"]}.items():
        numbers = [*found["lines"], *found["branches"]]
        yield name.removeprefix("mone_export/"), *map(str, numbers), f"{found['percent']:.1f}%"


def coverage_note(data: Json) -> str:
    """Say what was run."""
    tests = data["tests"]
    return (
        f"{tests['passed']} tests passed, {tests['failed']} failed, {tests['skipped']} skipped. A branch "
        f"counts once for each way that was taken; below {data['asked_percent']:.0f}% it would be a failure."
    )


TABLES: dict[str, Callable[[Json], Iterable[Row]]] = {
    "coverage": coverage_table,
    "faults": faults_table,
    "fuzz": fuzz_table,
    "under_load": under_load_table,
}
NOTES: dict[str, Callable[[Json], str]] = {
    "coverage": coverage_note,
    "faults": faults_note,
    "fuzz": fuzz_note,
    "under_load": under_load_note,
}
