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
    yield "reader", "minutes", "files", "read", "refused", "failed", "longest, s", "memory grown, MiB"
    for name, found in data["readers"].items():
        numbers = [f"{found['seconds'] / 60:g}", *(found[key] for key in ("cases", "read", "refused"))]
        numbers += [sum(found["failures"].values()), found["longest_s"], found["memory_grown_mib"]]
        yield name, *map(str, numbers)


def fuzz_note(data: Json) -> str:
    """Say what was run."""
    return "Sound files with bytes, lengths, places and values changed; refused means one line of ours."


_MEMORY = "in use, KiB a minute", "resident, KiB a minute"


def under_load_table(data: Json) -> Iterable[Row]:
    """Yield what a server with each file answered, and how its memory went."""
    yield "file", "whole answers", "at a tie", "wrong", "cancelled", "malformed, by status", *_MEMORY
    for name, run in data["runs"].items():
        yield (
            name,
            *(str(run[key]) for key in ("answers", "differ_at_a_tie", "wrong", "cancelled")),
            ", ".join(f"{status}: {n}" for status, n in run["malformed"].items()),
            _growth(run["in_use"]),
            _growth(run["resident"]),
        )


def _growth(memory: Json) -> str:
    grows = memory.get("kib_per_minute")
    return f"{grows['slope']:.1f} +- {grows['error']:.1f}" if grows else "too short a run"


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


def supply_table(data: Json) -> Iterable[Row]:
    """Yield what was looked at of dependencies, builds and Pythons, and what was found."""
    yield "what", "looked at", "found"
    if found := data.get("lock"):
        looked_at = f"{found['packages']} packages, {found['hashes']} hashes"
        yield "locked dependencies", looked_at, verdict(found["failed"], "all wanted, installed as locked")
    if found := data.get("audit"):
        looked_at = f"{found['packages']} versions, {found['not_asked']} without an answer"
        told = "nothing known" if not found["explained"] else f"{len(found['explained'])} explained"
        unasked = found["state"] == "could not ask"
        answer = "**could not ask**" if unasked else verdict(found["failed"], told)
        yield "advisories (pip-audit)", looked_at, answer
    if found := data.get("builds"):
        yield "two builds", ", ".join(found["files"]), verdict(found["failed"], "the same bytes")
    for name, counts in {**data.get("claims", {}).get("tests", {}), **pythons_of(data)}.items():
        ran = counts.get("tests", 0) - counts.get("skipped", 0)
        yield name, f"{ran} tests", counts.get("state") or verdict(counts["failed"], "passed")


def pythons_of(data: Json) -> Json:
    """Return what became of the fast tests on each Python."""
    found = data.get("pythons", {}).get("fast_tests", {})
    return {f"some fast tests, Python {name}": counts for name, counts in found.items()}


def verdict(failed: Sequence[str], sound: str) -> str:
    """Say how a check ended."""
    return f"**{len(failed)} failed**: {failed[0]}" if failed else sound


def supply_note(data: Json) -> str:
    """Say what the words mean."""
    oldest = "; lowest-direct: the oldest that `pyproject.toml` allows" if data.get("claims") else ""
    return (
        f"Locked: the versions that `make` installs, on Python 3.11 tested by `make test`{oldest}. The "
        "runtime's wheel was not built twice; a test packs the same files twice."
    )


def mutants_table(data: Json) -> Iterable[Row]:
    """Yield how many mutants of each module the tests have killed."""
    yield "module", "mutants", "tried", "killed", "survived", "killed, %"
    for module, found in data["modules"].items():
        numbers = [str(found[key]) for key in ("mutants", "tried", "killed", "survived", "percent")]
        yield module, *numbers


def mutants_survivors(data: Json) -> Iterable[Row]:
    """Yield for each function of which mutants survived how many they are, by the reason."""
    yield "function", "survivors", "why"
    for module, found in data["modules"].items():
        functions = dict.fromkeys(each["function"] for each in found["survivors"])
        for function in functions:
            own = [each["reason"] for each in found["survivors"] if each["function"] == function]
            why = "; ".join(f"{n} {reason}" for reason, n in Counter(own).items())
            yield f"{module.rpartition('/')[2]}, `{function}`", str(len(own)), why


def mutants_note(data: Json) -> str:
    """Say what was run."""
    modules = data["modules"].values()
    seeds = ", ".join(str(seed) for seed in sorted({found["seed"] for found in modules}))
    late = sum(found["timeouts"] for found in modules)
    return f"A random choice of each module's mutants, seed {seeds}; {late} ran into the time limit."


def survivors_note(data: Json) -> str:
    """Say how many there are of all that were tried."""
    modules = data["modules"].values()
    return f"{sum(each['survived'] for each in modules)} of {sum(each['tried'] for each in modules)} tried."


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
    "coverage": coverage_table,
    "faults": faults_table,
    "fuzz": fuzz_table,
    "under_load": under_load_table,
    "supply": supply_table,
    "mutants": mutants_table,
    "mutants/survivors": mutants_survivors,
    "sanitizers": sanitizers_table,
    "sanitizers/files": broken_ggufs_table,
}
NOTES: dict[str, Callable[[Json], str]] = {
    "coverage": coverage_note,
    "faults": faults_note,
    "fuzz": fuzz_note,
    "under_load": under_load_note,
    "supply": supply_note,
    "mutants": mutants_note,
    "mutants/survivors": survivors_note,
    "sanitizers": sanitizers_note,
    "sanitizers/files": broken_ggufs_note,
}
