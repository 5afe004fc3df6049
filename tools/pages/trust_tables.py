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


TABLES: dict[str, Callable[[Json], Iterable[Row]]] = {
    "faults": faults_table,
    "fuzz": fuzz_table,
    "mutants": mutants_table,
    "mutants/survivors": mutants_survivors,
}
NOTES: dict[str, Callable[[Json], str]] = {
    "faults": faults_note,
    "fuzz": fuzz_note,
    "mutants": mutants_note,
    "mutants/survivors": survivors_note,
}
