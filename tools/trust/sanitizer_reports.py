"""What AddressSanitizer, LeakSanitizer, UBSan and ThreadSanitizer print, as values: what, where, whose."""

import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

Lines = Mapping[str, frozenset[int]]
"""The lines of each file that a patch has written."""

_STARTS = (
    re.compile(r"ERROR: (AddressSanitizer): ([\w-]+)"),
    re.compile(r"WARNING: (ThreadSanitizer): ([\w -]+?) \("),
    re.compile(r"^(Direct|Indirect) (leak) of"),
    re.compile(r"(runtime error): (.*)"),
)
_FRAME = re.compile(r"^\s+#\d+ (?:0x[0-9a-f]+ in )?(.+) (\S+?):(\d+)(?::\d+)?(?: \(.*\))?$")
_HEAD = re.compile(r"(\S+?):(\d+):\d+: runtime error")
_TREE = "vendor/llama.cpp/"
_NOT_GUILTY = ("ggml_abort", "operator new", "ggml_print_backtrace")
_NAMES = {"Direct": "leak", "Indirect": "leak", "runtime error": "undefined"}
_HUNK = re.compile(r"^@@ -\S+ \+(\d+)(?:,(\d+))? @@", re.MULTILINE)


@dataclass(frozen=True)
class Frame:
    """A place in llama.cpp's tree."""

    function: str
    file: str
    line: int


@dataclass(frozen=True)
class Report:
    """One report: its kind, what it says, and the places in llama.cpp that led there, the last first."""

    kind: str
    frames: tuple[Frame, ...]

    @property
    def place(self) -> str:
        """Name the function and the file where it happened, outside llama.cpp if nothing in it did."""
        guilty = (frame for frame in self.frames if frame.function not in _NOT_GUILTY)
        frame = next(guilty, None)
        return f"{frame.function}, {frame.file}" if frame else "outside llama.cpp"

    def is_ours(self, lines: Lines) -> bool:
        """Whether a line that a patch has written is among its places."""
        return any(frame.line in lines.get(frame.file, ()) for frame in self.frames)


def reports(text: str) -> list[Report]:
    """Return the reports that a log holds."""
    found, kind, head, frames = list[Report](), "", list[Frame](), list[Frame]()
    for line in [*text.splitlines(), "Direct leak of"]:  # which ends the last one
        start = next((match for each in _STARTS if (match := each.search(line))), None)
        if start:
            found += [Report(kind, tuple(frames or head))] if kind else []
            kind, head, frames = _kind(start), [*_head(line)], []
        elif kind and (frame := _frame(line)):
            frames.append(frame)
    return found


def _kind(start: re.Match[str]) -> str:
    name = _NAMES.get(start[1], start[2])
    return f"{name}: {re.sub('0x[0-9a-f]+|[0-9]+', 'N', start[2])}"[:90] if name == "undefined" else name


def _head(line: str) -> Iterator[Frame]:
    if (match := _HEAD.search(line)) and _TREE in match[1]:
        yield Frame("", match[1].rpartition(_TREE)[2], int(match[2]))


def _frame(line: str) -> Frame | None:
    match = _FRAME.match(line)
    if not match or _TREE not in match[2]:
        return None
    return Frame(short(match[1]), match[2].rpartition(_TREE)[2], int(match[3]))


def short(function: str) -> str:
    """Return a function's name without its arguments."""
    function = function.replace("(anonymous namespace)::", "").replace("operator()", "operator")
    return re.sub(r"[(<].*", "", function).split(" ")[-1] or function[:60]


def logs(folder: Path) -> Iterable[str]:
    """Yield what each process has written into a folder of logs."""
    for file in sorted(folder.glob("*")):
        yield file.read_text(encoding="utf-8", errors="replace")


def written_lines(stock: Path, patched: Path, files: Iterable[str]) -> Lines:
    """Return the lines of a patched tree that the stock one has not."""
    found = {}
    for name in files:
        pair = [str(tree / name) if (tree / name).exists() else "/dev/null" for tree in (stock, patched)]
        done = subprocess.run(["diff", "-U0", *pair], capture_output=True, text=True, check=False)
        hunks = ((int(start), int(n or 1)) for start, n in _HUNK.findall(done.stdout))
        found[name] = frozenset(line for start, n in hunks for line in range(start, start + n))
    return found
