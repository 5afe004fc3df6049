#!/usr/bin/env python3
"""llama.cpp with the patches under sanitizers: its programs on pruned files, and its loader on broken ones.

    python tools/trust/sanitizers.py [--part PART ...] [--mutants 2000] [--without CHECK] [-o FILE.json]

Builds the patched libraries with AddressSanitizer (leaks included) and UBSan, and those of ggml, whose
threads compute, with ThreadSanitizer, beside the other builds; and the programs that a patch touches. All
others are the usual ones, which then take these libraries. `programs` runs generation, server, imatrix,
quantize, split files, RPC and the tests of the patches under the first, `threads` generation and tests under
the second.
`mutants` gives the first one's loader broken files, half of them broken where only pruned files have
something: they load and decode, or are refused in words; no crash, no hang, no memory beyond `MEMORY` and
`TIMES` the file.

The sound files stay in `build/sanitizers`, with what is said about broken ones that show a fault.
A report is ours if one of its places is a line that a patch has written, or if all that is wrong with a file
is in what ordinary files do not have; others are upstream's, and named.
`--without CHECK` gives the mutants to a loader that lacks one of our checks, to show that they find it.
Prints its figures as JSON; returns 1 where a check failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from figures import keep
from sanitizer_reports import Lines, Report, logs, reports, written_lines

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).parent)]

PARTS = ("programs", "mutants", "threads")
KEPT = ROOT / "build" / "sanitizers"
# programs of which a patch wrote lines
SOURCES = {
    "llama-imatrix": "tools/imatrix/imatrix.cpp",
    "test-backend-ops": "tests/test-backend-ops.cpp",
    "test-mul-mat-id-skip": "tests/test-mul-mat-id-skip.cpp",
}
LIBRARIES = ("-lllama", "-lggml", "-lggml-base", "-lggml-cpu")
TARGETS = {"address": ("llama",), "thread": ("ggml",)}  # the threads of a model's computation are ggml's
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
# every null pointer ends in AddressSanitizer; looking for them beforehand doubles the time to compile
FLAGS = {"address": "address,undefined -fno-sanitize=null,vptr", "thread": "thread"}
OPTIONS = {"address": (), "thread": ("-DGGML_OPENMP=OFF",)}  # libgomp's barriers are not instrumented
COMPILED = "-O1 -g1 -fno-omit-frame-pointer -fsanitize={}"
ENVIRONMENT = {
    "ASAN_OPTIONS": "handle_abort=1:exitcode=99:allocator_may_return_null=1:quarantine_size_mb=32",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "exitcode=0:history_size=4",
    "GGML_NO_BACKTRACE": "1",
}
PROMPT = 'def read_file(path):\n    """Read'
SLOW, MEMORY, TIMES = 60.0, 256 * 2**10, 6  # seconds; KiB, and times the file
# messages of the C++ library: what is wrong with the file cannot be known from them
VAGUE = (
    "std::",
    "vector::",
    "basic_string::",
    "map::at",
    "array::at",
    "stoi",
    "stol",
    "regex_error",
    "bad_alloc",
)
# check -> the condition in src/llama-model.cpp that is taken away, and what is broken to show it
CHECKS = {
    "sizes": ("novices.tier_sizes.size() != size_t(n_tiers) * hparams.n_layer_all", "a length"),
    "slots": ("ids[id] != int32_t(id)", "ids"),
}


@dataclass
class Watch:
    """Sanitized libraries, and what the programs that use them have said so far."""

    kind: str
    libraries: Path
    usual: Path  # the folder of the usual programs
    lines: Lines
    folder: Path  # of the logs
    runs: list[dict[str, Any]] = field(default_factory=list)

    def env(self, logs_in: Path) -> dict[str, str]:
        """Return the variables by which a process takes the libraries, and keeps its reports in a folder."""
        logs_in.mkdir(parents=True, exist_ok=True)
        found = dict(ENVIRONMENT)
        for name in ("ASAN_OPTIONS", "UBSAN_OPTIONS", "TSAN_OPTIONS"):
            found[name] += f":log_path={logs_in}/{name[:4].lower()}"
        asked = subprocess.run(
            ["c++", f"-print-file-name={RUNTIMES[self.kind]}"], capture_output=True, text=True, check=True
        )
        return found | {"LD_PRELOAD": asked.stdout.strip(), "LD_LIBRARY_PATH": str(self.libraries)}

    def compiled(self, name: str, source: Path, *options: object) -> Path:
        """Compile a program of one file against the libraries, unless it is there."""
        from mone_export import runtime

        build = self.libraries.parent  # named after its options, in a folder named after the patches
        tree, program = runtime.tree(whole=True), KEPT / f"{build.parent.name}-{build.name}" / name
        if program.exists() and program.stat().st_mtime > source.stat().st_mtime:
            return program
        program.parent.mkdir(parents=True, exist_ok=True)
        include = [f"-I{tree / part}" for part in ("include", "ggml/include", "src", "common", "vendor")]
        places = [f"-L{self.libraries}", f"-L{self.usual}"]
        places += [f"-Wl,-rpath,{self.libraries}:{self.usual}", "-Wl,--allow-shlib-undefined"]
        flags = [*COMPILED.format(FLAGS[self.kind]).split(), "-std=c++17", "-w", "-pthread"]
        command = ["c++", *flags, *include, source, "-o", program, *options, *places, *LIBRARIES]
        subprocess.run([str(part) for part in command], check=True)
        return program

    def run(self, what: str, action: Callable[[dict[str, str]], str | None]) -> None:
        """Run something under watch: its reports are kept, and what it returns or raises as a failure."""
        logs_in, start = self.folder / f"{len(self.runs)}", time.monotonic()
        try:
            failure = action(self.env(logs_in))
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            failure = f"{type(error).__name__}: {str(error)[-400:]}"
        found = [report for text in logs(logs_in) for report in reports(text)]
        ours = [report for report in found if report.is_ours(self.lines)]
        if found and not ours and all(report.kind == "leak" for report in found):
            failure = None  # upstream's leaks alone make a program end with the sanitizer's status
        self.runs.append(
            {"what": what, "under": self.kind, "seconds": round(time.monotonic() - start, 1)}
            | {"failure": failure, "ours": counted(ours), "upstream": counted(set(found) - set(ours))}
        )
        print(f"{self.kind}, {what}: {self.runs[-1]}", file=sys.stderr)

    def path(self, name: str) -> Path:
        """Return a program: compiled for this where a patch touches it, else the usual one."""
        if name not in SOURCES:
            return self.usual / name
        from mone_export import runtime

        return self.compiled(name, runtime.tree(whole=True) / SOURCES[name], "-lllama-common")

    def program(self, what: str, name: str, *arguments: object) -> None:
        """Run a program of the build."""
        self.run(what, lambda env: self.ended(env, name, *arguments))

    def ended(self, env: Mapping[str, str], name: str, *arguments: object) -> str | None:
        """Run a program to its end; returns what is wrong with how it ended."""
        command = [str(self.path(name)), *map(str, arguments)]
        done = subprocess.run(
            command, env=os.environ | env, capture_output=True, text=True, errors="replace", timeout=1800
        )
        said = (done.stdout + done.stderr)[-300:]
        return f"{name} ends with {done.returncode}: {said}" if done.returncode else None


def counted(found: Sequence[Report] | set[Report]) -> dict[str, int]:
    """Return how often each kind of report came from each place."""
    return dict(Counter(f"{report.kind}; {report.place}" for report in found).most_common())


def watch(kind: str, folder: Path) -> Watch:
    """Build what is needed, and return it."""
    from mone_export import runtime
    from mone_export.runtime import builds
    from mone_export.runtime.upstream import prepare, source

    def told(done: int, total: int, what: str) -> None:
        print(f"{what} {done}/{total or '?'}", end="\r", file=sys.stderr)

    flags = COMPILED.format(FLAGS[kind])
    args = [f"-DCMAKE_{language}_FLAGS_RELEASE={flags}" for language in ("C", "CXX")]
    build = builds.build("cpu", (*OPTIONS[kind], *args), targets=TARGETS[kind], progress=told)
    stock, ours = source(patched=False), source()
    prepare(stock, told)
    texts = [patch.read_text(encoding="utf-8") for patch in ours.patches]
    names = {line[6:] for text in texts for line in text.splitlines() if line.startswith("+++ b/")}
    lines = written_lines(stock.tree, ours.tree, sorted(names))
    return Watch(kind, build.bin, runtime.path(), lines, folder / kind)


def sound_files(folder: Path) -> dict[str, Path]:
    """Make the demo model's files: whole, with novices, thin experts, and types expert by expert."""
    from mone_export.pipeline import export

    wanted: dict[str, dict[str, Any]] = {
        "whole": {"ratio": 0, "outtype": "q8_0"},
        "novices": {"ratio": 0.5, "novice": "mean", "outtype": "q8_0"},
        "thin": {"ratio": 0.5, "novice": "thin", "outtype": "f16"},
        "mixed": {"fit": 5_000_000},  # types expert by expert
    }
    files = {}
    for name, options in wanted.items():
        files[name] = folder / f"{name}.gguf"
        if not files[name].exists():
            export("demo", outfile=files[name], n_row=16, seq_len=128, **options)
    return files


def small_files(folder: Path) -> dict[str, Path]:
    """Make random files of both versions: slots, tables by token, biases, merged matrices, optional ones."""
    from gguf_models import quantised, tiny_gguf
    from gguf_parts import put_together, taken_apart
    from gguf_tiers import fates_for, tiered, untiered

    files = {}
    for name in ("qwen3moe", "gpt-oss", "deepseek2 in groups", "deepseek4 hashed", "mimo2"):
        parts = taken_apart(tiny_gguf(name, folder))
        for kind, change in (("tiers", tiered), ("novices", untiered)):
            file = folder / f"{name.replace(' ', '-')}-{kind}-f32.gguf"
            if not file.exists():
                file.write_bytes(put_together(change(parts, fates_for(parts))))
            files[f"{name}, {kind}"] = quantised(file, "Q8_0")
    return files


def programs(watched: Watch, files: Mapping[str, Path], grouped: Path, folder: Path) -> None:
    """Run what users run, and the tests of the patches."""
    text = folder / "text.txt"
    text.write_text("\n\n".join(path.read_text() for path in sorted((ROOT / "mone_export").glob("*.py"))[:6]))
    for name, file in files.items():
        generation(watched, name, file)
        watched.run(f"server, {name}", partial(served, watched.usual, file))
        imatrix, small = folder / f"{name}.imatrix", folder / f"{name}-q4.gguf"
        options = ("-m", file, "-f", text, "-o", imatrix, "-c", 128, "--chunks", 2, "-t", 2)
        watched.program(f"imatrix, {name}", "llama-imatrix", *options)
        options = ("--allow-requantize", "--imatrix", imatrix, file, small, "Q4_K_M", 2)
        watched.program(f"quantize, {name}", "llama-quantize", *options)
        generation(watched, f"{name} in Q4_K_M", small)
    less, part, whole = folder / "less.gguf", folder / "part", folder / "merged.gguf"
    file = files["thin"]
    watched.program("layers dropped", "llama-quantize", "--prune-layers", 1, file, less, "copy")
    generation(watched, "layers dropped", less)
    watched.program("split", "llama-gguf-split", "--split-max-tensors", 10, file, part)
    first = next(folder.glob("part-00001-of-*.gguf"), part)
    generation(watched, "a split file", first)
    watched.program("merge", "llama-gguf-split", "--merge", first, whole)
    generation(watched, "slots and tiers", grouped)
    watched.run("RPC", partial(through_rpc, watched, file))
    watched.program("save and load again", "test-llama-archs", "-a", "^(olmoe|qwen3moe)$")
    tests(watched)


def generation(watched: Watch, what: str, file: Path, *options: object, n_thread: int = 2) -> None:
    """Have a model continue a text, its prompt in batches of several sizes."""
    fixed = ("-m", file, "-p", PROMPT * 3, "-n", 16, "-c", 256, "-t", n_thread, "-b", 32, "-ub", 16)
    fixed += ("--temp", 0, "--ignore-eos", "-no-cnv", "-fit", "off", "--no-warmup")
    watched.program(f"generation, {what}", "llama-completion", *fixed, *options)


def served(bin_folder: Path, file: Path, env: dict[str, str]) -> str | None:
    """Ask a server several things at once, then end it as a service manager does."""
    from programs import post, running_server

    with running_server(bin_folder, "-m", file, "-c", 512, "-np", 2, "-fit", "off", env=env) as server:
        chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
        questions = [("/completion", {"prompt": PROMPT, "n_predict": 16})] * 3
        questions += [("/v1/chat/completions", chat), ("/tokenize", {"content": PROMPT})]
        with ThreadPoolExecutor(3) as pool:
            answers = [pool.submit(post, server.url + path, body) for path, body in questions]
        found = [answer.result() for answer in answers]
    return None if len(found[0]["content"]) > 0 else "the server says nothing"


def through_rpc(watched: Watch, file: Path, env: dict[str, str]) -> str | None:
    """Generate with the weights on an RPC server, which is under watch, too."""
    from programs import free_port

    port, own = free_port(), os.environ | env
    command = [str(watched.usual / "ggml-rpc-server"), "-H", "127.0.0.1", "-p", str(port), "-t", "2"]
    with subprocess.Popen(command, env=own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            time.sleep(5)
            options = ("-m", file, "-p", PROMPT, "-n", 8, "-c", 128, "-no-cnv", "-fit", "off", "--no-warmup")
            rpc = ("--rpc", f"127.0.0.1:{port}", "-ngl", 99)
            return watched.ended(env, "llama-completion", *options, *rpc)
        finally:
            server.terminate()


def tests(watched: Watch) -> None:
    """Run the C++ tests of the patches."""
    watched.program("test-mul-mat-id-skip", "test-mul-mat-id-skip")
    for operation, cases in (("MUL_MAT_ID", "skipped="), ("MUL_MAT_VEC_FUSION", "n_ids=8"), ("ADD_ID", "")):
        options = ("test", "-b", "CPU", "-o", operation, *(("-p", cases) if cases else ()))
        watched.program(f"test-backend-ops, {operation}", "test-backend-ops", *options)


def loader(watched: Watch, without: str | None) -> Path:
    """Compile the program that loads broken files, or one whose loader lacks a check."""
    from mone_export import runtime

    source = Path(__file__).with_name("loader.cpp")
    if without is None:
        return watched.compiled("loader", source)
    old, _ = CHECKS[without]
    text = (runtime.tree(whole=True) / "src" / "llama-model.cpp").read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise SystemExit(f"{without}: {old} is not in src/llama-model.cpp once")
    changed = KEPT / f"without-{without}.cpp"
    changed.write_text(text.replace(old, "false"), encoding="utf-8")
    library = watched.compiled(f"libwithout-{without}.so", changed, "-fPIC", "-shared")
    # it stands before libllama, so that its functions are taken
    return watched.compiled(f"loader-without-{without}", source, library, f"-Wl,-rpath,{library.parent}")


@dataclass
class Verdicts:
    """What became of broken files."""

    lines: Lines
    n: Counter[str] = field(default_factory=Counter)
    ours: Counter[str] = field(default_factory=Counter)
    upstream: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)
    peak_kib: int = 0
    longest_s: float = 0.0

    def add(self, made: Any, found: Mapping[str, Any], said: str) -> bool:
        """Judge a file; returns whether it shows a fault."""
        aimed = "aimed" if made.number % 2 == 0 else "bytes"
        self.n[f"{aimed}, {found['status']}"] += 1
        self.peak_kib = max(self.peak_kib, found["peak_kib"])
        self.longest_s = max(self.longest_s, found["seconds"])
        faults = [
            (f"{each.kind}; {each.place}", made.only_ours or each.is_ours(self.lines))
            for each in reports(said)
        ]
        if found["status"] == "hung" or (found["status"] == "crashed" and not faults):
            faults.append((f"{found['status']} with {found['code']}, nothing said", True))
        if found["peak_kib"] > MEMORY + TIMES * len(made.content) // 1024:
            faults.append(("too much memory", True))
        if found["status"] in ("refused", "undecoded") and (unclear := vague(said)):
            faults.append((f"unclear: {unclear}", aimed == "aimed"))
        for name, is_ours in set(faults):
            (self.ours if is_ours else self.upstream)[name] += 1
            self.first.setdefault(name, made.number)
        return bool(faults)

    def figures(self) -> dict[str, Any]:
        """Return them as figures."""
        found = {"files": sum(self.n.values()), "ended": dict(self.n), "ours": dict(self.ours)}
        found |= {"upstream": dict(self.upstream.most_common()), "first": self.first}
        return found | {"peak_mib": self.peak_kib >> 10, "longest_s": round(self.longest_s, 1)}


def vague(said: str) -> str | None:
    """Return what is unclear in a refusal, or None if it says what is wrong with the file."""
    words = [
        line for line in said.splitlines() if ": " in line and not line.startswith(("print_info", "load:"))
    ]
    errors = [line for line in words if any(word in line for word in ("error", "failed", "invalid", "not "))]
    if not errors:
        return "no message"
    reasons = [line for line in errors if "error loading model" in line] or errors[-1:]
    return next((line[-120:] for line in reasons if any(word in line for word in VAGUE)), None)


def mutants(
    watched: Watch, files: Mapping[str, Path], args: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """Give broken files to the loader."""
    from broken_ggufs import broken
    from gguf_parts import taken_apart

    program, sound = loader(watched, args.without), {name: taken_apart(file) for name, file in files.items()}
    only = CHECKS[args.without][1] if args.without else None
    verdicts, step, own = Verdicts(watched.lines), 50, dict(ENVIRONMENT)
    own["ASAN_OPTIONS"] += ":alloc_dealloc_mismatch=0"  # the loader's operator new is its own
    for start in range(0, args.mutants, step):
        numbers = range(start, min(start + step, args.mutants))
        made = [broken(number, sound, args.seed, only) for number in numbers]
        places = [folder / f"{each.number}.gguf" for each in made]
        for each, place in zip(made, places, strict=True):
            place.write_bytes(each.content)
        names = "".join(f"{place}\n" for place in places)
        done = subprocess.run(
            [program, str(SLOW)], input=names, capture_output=True, text=True, env=os.environ | own
        )
        found = [json.loads(line) for line in done.stdout.splitlines()]
        for each, place, became in zip(made, places, found, strict=True):
            log = Path(f"{place}.log")
            if verdicts.add(each, became, log.read_text(errors="replace")):
                log.replace(KEPT / log.name)
            place.unlink()
            log.unlink(missing_ok=True)
        print(f"{start + len(made)}/{args.mutants} {dict(verdicts.n)} {dict(verdicts.ours)}", file=sys.stderr)
    return verdicts.figures()


def main() -> int:
    """Build, run, judge; returns 1 where a check failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="only this one, repeatable")
    parser.add_argument("--mutants", type=int, default=2000, metavar="N", help="broken files (default 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without", choices=CHECKS, help="a check of ours that the loader then lacks")
    parser.add_argument("-o", type=Path, dest="out", help="keep the figures in this file, too")
    args = parser.parse_args()
    parts = args.part or (("mutants",) if args.without else PARTS)
    figures: dict[str, Any] = {"seed": args.seed, "without": args.without}
    (made := KEPT / "files").mkdir(parents=True, exist_ok=True)
    files, small = sound_files(made), small_files(made)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if set(parts) & {"programs", "mutants"}:
            watched = watch("address", folder)
            if "programs" in parts:
                programs(watched, files, small["deepseek2 in groups, tiers"], folder)
                runs += watched.runs
            if "mutants" in parts:
                demo = {f"demo, {name}": files[name] for name in ("novices", "thin", "mixed")}
                figures["mutants"] = mutants(watched, small | demo, args, folder)
        if "threads" in parts:
            watched = watch("thread", folder)
            for name, file in files.items():
                generation(watched, name, file, n_thread=4)
            tests(watched)
            runs += watched.runs
    figures["runs"] = runs
    keep("sanitizers", joined(figures, args.out), args.out)
    failed = any(run["ours"] or run["failure"] for run in runs)
    return int(failed or bool(figures.get("mutants", {}).get("ours")))


def joined(figures: dict[str, Any], out: Path | None) -> dict[str, Any]:
    """Return figures with those that a file has of other parts, so that each can run by itself."""
    old = json.loads(out.read_text(encoding="utf-8")) if out and out.exists() else {}
    again = {run["under"] for run in figures["runs"]}
    runs = [run for run in old.get("runs", ()) if run["under"] not in again] + figures["runs"]
    return {"mutants": old.get("mutants"), **figures, "runs": runs}


if __name__ == "__main__":
    sys.exit(main())
