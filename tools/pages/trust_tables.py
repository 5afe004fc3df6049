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


def sanitizers_table(data: Json) -> Iterable[Row]:
    """Yield what ran under which sanitizer, and whose reports came of it."""
    yield "under", "what", "runs", "seconds", "failed", "reports of ours", "of upstream's"
    names = {"address": "AddressSanitizer, UBSan", "thread": "ThreadSanitizer"}
    groups: dict[tuple[str, str], list[Json]] = {}
    for run in data["runs"]:
        groups.setdefault((run["under"], run["what"].split(",")[0]), []).append(run)
    for (under, what), runs in groups.items():
        seconds, failed = sum(run["seconds"] for run in runs), sum(bool(run["failure"]) for run in runs)
        reports = [sum(sum(run[whose].values()) for run in runs) for whose in ("ours", "upstream")]
        yield names[under], what, str(len(runs)), f"{seconds:.0f}", str(failed), *map(str, reports)


def sanitizers_note(data: Json) -> str:
    """Say what was run."""
    return "Failed: a program that did not end as it should. A report is ours if a line of a patch led to it."


def broken_ggufs_table(data: Json) -> Iterable[Row]:
    """Yield what became of the broken files, by what was broken."""
    ends = ("loaded", "refused", "undecoded", "crashed", "hung")
    yield "broken", "files", *ends
    for kind, what in (
        ("aimed", "experts: counts, tiers, slots, types, shapes, names"),
        ("bytes", "any bytes"),
    ):
        found = [data["mutants"]["ended"].get(f"{kind}, {end}", 0) for end in ends]
        yield what, str(sum(found)), *map(str, found)


def broken_ggufs_note(data: Json) -> str:
    """Say what was run, and what was found."""
    found = data["mutants"]
    crashes = ", ".join(f"{n} × {name}" for name, n in found["upstream"].items()) or "none"
    return (
        f"Faults of ours: {sum(found['ours'].values())}. Longest file {found['longest_s']} s, most memory "
        f"{found['peak_mib']} MiB. Upstream's faults, by kind, function and file: {crashes}."
    )


TABLES: dict[str, Callable[[Json], Iterable[Row]]] = {
    "faults": faults_table,
    "fuzz": fuzz_table,
    "sanitizers": sanitizers_table,
    "sanitizers/files": broken_ggufs_table,
}
NOTES: dict[str, Callable[[Json], str]] = {
    "faults": faults_note,
    "fuzz": fuzz_note,
    "sanitizers": sanitizers_note,
    "sanitizers/files": broken_ggufs_note,
}
