#!/usr/bin/env python3
"""llama-server under load, with pruned files: clients that ask, that go away and that talk nonsense.

    python tools/trust/server.py [--seconds 1200] [--clients 16] [-o docs/measurements/under_load.json]

Of the demo at half its bytes, with constants and with thin experts, a server each, side by side: greedy
questions with prompts of 1 to 300 words, most of them answered whole, some cancelled in mid-stream, malformed
requests between them. Afterwards: the server answers as it did before, whole answers are those of the serial
run, no malformed request got an answer, memory in use does not grow, and the server ends by itself when told
to. `--answers-of unpruned` holds the answers against another model's, to show that the check can fail. Needs
a C compiler, for `heap.c`. Prints its figures as JSON; returns 1 where a check failed. Linux.
"""

import argparse
import http.client
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from threading import Event
from typing import Any

from figures import keep
from parallel_clients import QUESTIONS, Answer, ask, judged, slots
from programs import Server, running_server

from measuring.server import resident_bytes
from mone_export.runtime.toolchain import n_core

KINDS = {"constants": ("--novice", "least-squares"), "thin experts": ("--novice", "thin")}
WARM = 300  # seconds in which caches and pools may grow; memory is judged only in runs of twice that
N_BLOCK = 20  # means of as many stretches of time, so that neighbouring samples do not count as independent
GROWTH = 64.0  # KiB a minute that may stay unseen: 90 MiB a day
MALFORMED: Sequence[tuple[str, str, bytes]] = (
    ("POST", "/completion", b"{"),
    ("POST", "/completion", b"\xff\xfe\x00"),
    ("POST", "/completion", b"[]"),
    ("POST", "/completion", b'{"prompt": {"a": [[[[]]]]}}'),
    ("POST", "/completion", b'{"prompt": [999999999]}'),
    ("POST", "/completion", b'{"prompt": "a", "n_predict": "many"}'),
    ("POST", "/completion", b'{"prompt": "a", "grammar": "root ::= ("}'),
    ("POST", "/completion", b"[" * 5000),
    ("POST", "/v1/chat/completions", b'{"messages": 7}'),
    ("POST", "/v1/chat/completions", b'{"messages": [{"role": null}]}'),
    ("POST", "/completion", json.dumps({"prompt": "word " * 20_000}).encode()),
    ("GET", "/nothing/here", b""),
    ("DELETE", "/completion", b""),
)


@dataclass
class Load:
    """What clients have met so far."""

    server: Server
    over: Event = field(default_factory=Event)
    answers: list[tuple[int, Answer]] = field(default_factory=list)
    n_cancelled: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)

    def asks(self, number: int) -> None:
        """Ask one question after the other, each client from another start."""
        for question in islice(cycle(range(len(QUESTIONS))), number, None):
            self.answers.append((question, ask(self.server, question)))
            if self.over.is_set():
                return

    def cancels(self, number: int) -> None:
        """Have answers streamed and go away after a few tokens, or before the first one."""
        dice = random.Random(number)
        while not self.over.is_set():
            prompt, _ = QUESTIONS[dice.randrange(len(QUESTIONS))]
            body = json.dumps({"prompt": prompt, "n_predict": 400, "stream": True, "ignore_eos": True})
            connection = self._connection()
            connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
            if dice.random() < 0.7:
                answer = connection.getresponse()
                for _ in range(dice.randrange(1, 30)):
                    answer.readline()
            connection.close()
            self.n_cancelled += 1
            time.sleep(dice.uniform(0, 0.2))

    def talks_nonsense(self, number: int) -> None:
        """Send one malformed request after the other; none of them may be answered as if it were sound."""
        for method, path, body in islice(cycle(MALFORMED), number, None):
            connection = self._connection()
            connection.request(method, path, body, {"Content-Type": "application/json"})
            status = connection.getresponse().status
            connection.close()
            self.statuses[status] += 1
            if not 400 <= status < 600:
                self.accepted[f"{status}: {method} {path} {body[:40]!r}"] += 1
            if self.over.wait(0.3):
                return

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.server.url.removeprefix("http://"), timeout=120)


def main() -> int:
    """Run both kinds of files; returns 1 where a check failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1200.0, help="default 1200")
    parser.add_argument("--clients", type=int, default=16, help="of each server (default 16, at least 3)")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this one, repeatable")
    parser.add_argument("--answers-of", choices=("unpruned",), help="expect another model's answers")
    parser.add_argument("-o", type=Path, dest="out", help="keep the figures in this file, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        files = made(Path(place), args.kind or list(KINDS))
        answers_of = files.pop("unpruned") if args.answers_of else None
        files.pop("unpruned", None)
        with ThreadPoolExecutor() as pool:  # the servers run beside each other
            # threads that wait for each other spin: more of them than cores, and clients wait for minutes
            threads = ("-t", max(1, n_core() // len(files)))
            started = {
                kind: pool.submit(under_load, file, answers_of or file, args.seconds, args.clients, threads)
                for kind, file in files.items()
            }
        runs = {kind: run.result() for kind, run in started.items()}
    settings = {"seconds": args.seconds, "clients": args.clients, "answers_of": args.answers_of}
    keep("under_load", {**settings, "runs": runs}, args.out)
    return int(any(run["failures"] for run in runs.values()))


def made(folder: Path, kinds: Sequence[str]) -> dict[str, Path]:
    """Make the demo's files: unpruned, and pruned in some ways; in F32, so that batches round alike."""
    from mone_export.cli import main as export

    text = folder / "text.txt"
    text.write_text("\n\n".join(prompt for prompt, _ in QUESTIONS * 20))
    stats = ("--stats", str(folder / "stats"), "-f", str(text), "--chunks", "16")
    options = {"unpruned": ("--ratio", "0")}
    options |= {kind: ("--ratio", "0.5", *stats, *KINDS[kind]) for kind in kinds}
    files = {name: folder / f"{name.replace(' ', '-')}.gguf" for name in options}
    for name, file in files.items():
        if export(["demo", "-q", "--outtype", "f32", "-o", str(file), *options[name]]):
            raise SystemExit(f"the file of {name} cannot be made")
    return files


def under_load(
    file: Path, answers_of: Path, seconds: float, n_client: int, threads: Sequence[object]
) -> dict[str, Any]:
    """Return what one server met and did, and what of it is a failure; `threads` is an option of it."""
    from mone_export import runtime

    options = (*slots(n_client), "--cache-ram", 0, *threads)
    heap, told = compiled(file.with_suffix(".so")), file.with_suffix(".heap")
    with running_server(runtime.path(), "-m", answers_of, *options) as server:
        expected = [ask(server, number) for number in range(len(QUESTIONS))]
    env = {"LD_PRELOAD": str(heap), "MONE_HEAP": str(told)}
    with running_server(runtime.path(), "-m", file, *options, env=env) as server:
        load = Load(server)
        with ThreadPoolExecutor(n_client) as pool:
            clients = [pool.submit(client, number) for number, client in enumerate(shared(load, n_client))]
            memory = list(sampled(server.pid, told, seconds, clients))
            load.over.set()
        broken = [repr(client.exception()) for client in clients if client.exception()]
        after = [(number, ask(server, number)) for number in range(len(QUESTIONS))] if not broken else []
    tally, again = judged(load.answers, expected), judged(after, expected)
    resident = growth([(at, n) for at, n, _ in memory])
    slope, error = growth([(at, n) for at, _, n in memory])
    failures = [*broken, *tally.wrong[:5], *again.wrong[:5], *load.accepted]
    long_enough = seconds >= 2 * WARM
    if long_enough and slope - 2 * error > GROWTH:
        failures.append(f"memory in use grows by {slope:.0f} +- {error:.0f} KiB a minute")
    if server.process.returncode:
        failures.append(f"the server ends with {server.process.returncode}")
    return {
        "answers": tally.n_answer,
        "differ_at_a_tie": tally.n_tie,
        "wrong": len(tally.wrong) + len(again.wrong),
        "cancelled": load.n_cancelled,
        "malformed": {str(status): n for status, n in sorted(load.statuses.items())},
        "resident": of_memory(memory[-1][1], resident if long_enough else None),
        "in_use": of_memory(memory[-1][2], (slope, error) if long_enough else None),
        "failures": failures,
    }


def compiled(library: Path) -> Path:
    """Compile what tells how much memory a server has in use."""
    source = Path(__file__).with_name("heap.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-lpthread"], check=True)
    return library


def of_memory(n_byte: int, grows: tuple[float, float] | None) -> dict[str, Any]:
    """Return how much memory there was in the end, and how it grew, unless the run was too short to say."""
    found: dict[str, Any] = {"mib": round(n_byte / 2**20, 1)}
    if grows:
        found["kib_per_minute"] = {"slope": round(grows[0], 2), "error": round(grows[1], 2)}
    return found


def shared(load: Load, n_client: int) -> list[Callable[[int], None]]:
    """Share clients out: an eighth goes away in mid-stream, an eighth talks nonsense, the others ask."""
    few = max(1, n_client // 8)
    return [load.cancels] * few + [load.talks_nonsense] * few + [load.asks] * (n_client - 2 * few)


def sampled(
    pid: int, heap: Path, seconds: float, clients: Sequence[Future[None]]
) -> Iterator[tuple[float, int, int]]:
    """Yield (seconds, bytes resident, in use) of a process while time goes on and no client has ended."""
    start, told = time.monotonic(), 0.0
    while (now := time.monotonic() - start) < seconds and not any(client.done() for client in clients):
        yield now, resident_bytes(pid), int(heap.read_text())
        if now - told > 60:
            told = now
            print(f"{now / 60:.0f} of {seconds / 60:.0f} minutes", file=sys.stderr)
        time.sleep(min(1.0, seconds / 100))


def growth(memory: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Return by how many KiB a minute memory grows once the server is warm, and the standard error.

    A straight line through the means of `N_BLOCK` stretches, by least squares.
    """
    warm = [(at, n) for at, n in memory if at > min(WARM, memory[-1][0] / 2)]
    size = max(1, len(warm) // N_BLOCK)
    blocks = [warm[at : at + size] for at in range(0, size * (len(warm) // size), size)]
    minutes = [statistics.fmean(at / 60 for at, _ in block) for block in blocks]
    kib = [statistics.fmean(n / 1024 for _, n in block) for block in blocks]
    slope, start = statistics.linear_regression(minutes, kib)
    rest = sum((y - start - slope * x) ** 2 for x, y in zip(minutes, kib, strict=True))
    spread = sum((x - statistics.fmean(minutes)) ** 2 for x in minutes)
    return slope, (rest / (len(blocks) - 2) / spread) ** 0.5


if __name__ == "__main__":
    sys.exit(main())
