#!/usr/bin/env python3
"""Feed broken files to what reads files of strangers, and count what comes out. Prints its figures as JSON.

    python tools/trust/fuzz.py [--seconds 60] [--reader NAME ...] [--seed 0] [-o docs/measurements/fuzz.json]

Each reader gets sound files with bytes, lengths and places changed, cut and repeated, and with values of
their JSON replaced by odd ones. A case is read, or refused by a `MoneError` of one line; everything else is a
failure and is kept in `build/fuzz`: another exception, more than `SLOW` seconds of the processor's time, much
more memory than the file has bytes. A reader runs in a process of its own, so that a crash is a failure, too.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from figures import ROOT, keep
from readers import MAKERS

KEPT = ROOT / "build" / "fuzz"
SLOW, MEMORY = 10.0, 512 * 2**20  # seconds of a case, bytes more than before
ODD = (None, True, -1, 0, 1, 2**31, 2**63, -(2**63), 10**30, 1e308, "", "x", "../../x", "/etc/passwd")
ODD += ("\u0000", "\ud800", "9" * 5000, [], {}, [[]], {"": {}}, [0] * 5000)
NUMBERS = (0, 1, 2**31 - 1, 2**31, 2**32, 2**60, 2**63 - 1, 2**63, 2**64 - 1)
DEEP = 5000


def main() -> int:
    """Run the readers one after the other; returns 1 where any failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="for each reader (default 60)")
    parser.add_argument("--reader", choices=MAKERS, action="append", help="only this one, repeatable")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "-o", type=Path, dest="out", help="put the figures into this file; other readers' stay"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(fuzz(args.reader[0], args.seconds, args.seed)))
        return 0
    figures = {name: in_a_process(name, args.seconds, args.seed) for name in args.reader or MAKERS}
    before = json.loads(args.out.read_text())["readers"] if args.out and args.out.exists() else {}
    keep("fuzz", {"readers": before | figures}, args.out)
    return int(any(found["failures"] for found in figures.values()))


def in_a_process(name: str, seconds: float, seed: int) -> dict[str, Any]:
    """Fuzz a reader in a process of its own; the figures say when, for how long, with which seed."""
    how = {"date": time.strftime("%Y-%m-%d"), "seconds": seconds, "seed": seed}
    command = [sys.executable, __file__, "--child", "--reader", name]
    command += ["--seconds", str(seconds), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds * 3 + 300, check=False)
    if done.returncode:
        end = done.stderr.strip().splitlines()[-1:]
        return how | {"cases": 0, "failures": {f"the process ended with {done.returncode}: {end}": 1}}
    return how | json.loads(done.stdout.splitlines()[-1])


def fuzz(name: str, seconds: float, seed: int) -> dict[str, Any]:
    """Return how many files a reader read, refused and failed on, and its longest case in seconds."""
    from mone_export.errors import MoneError

    dice = random.Random(f"{name} {seed}")
    counts: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    longest, most = 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        sound, read = MAKERS[name](Path(folder))
        read(sound)
        data, end = sound.read_bytes(), time.monotonic() + seconds
        broken = sound.with_name(f"broken{sound.suffix}")
        while time.monotonic() < end:
            content = mutated(data, dice)
            broken.write_bytes(content)
            before, start, failure = peak(), busy(), ""
            try:
                read(broken)
                counts["read"] += 1
            except MoneError as error:
                failure = "" if len(str(error).splitlines()) == 1 else "a message of several lines"
                counts["refused"] += not failure
            except BaseException as error:  # a panic of a library in Rust is no Exception
                at = traceback.extract_tb(error.__traceback__)[-1]
                failure = f"{type(error).__name__} in {Path(at.filename).name}:{at.lineno}: {error}"[:160]
            took, grown = busy() - start, peak() - before
            longest, most = max(longest, took), max(most, grown)
            if took > SLOW:
                failure = "too slow"
            if grown > MEMORY + 4 * len(content):
                failure = f"too much memory: {grown >> 20} MiB"
            if failure and not failures[failure]:
                KEPT.mkdir(parents=True, exist_ok=True)
                (KEPT / f"{name}-{len(failures)}{sound.suffix}").write_bytes(content)
            failures.update([failure] if failure else [])
    n = sum(counts.values()) + sum(failures.values())
    figures = {"cases": n, "read": counts["read"], "refused": counts["refused"], "failures": dict(failures)}
    return figures | {"busy_s": round(busy()), "longest_s": round(longest, 3), "memory_grown_mib": most >> 20}


def busy() -> float:
    """Return the processor's time that this process and its children have taken, in seconds."""
    return sum(os.times()[:4])


def peak() -> int:
    """Return the most memory this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def mutated(data: bytes, dice: random.Random) -> bytes:
    """Return a file with something wrong in it."""
    json_at = json_part(data)
    if json_at and dice.random() < 0.6:
        start, stop = json_at
        text = json.dumps(replaced(json.loads(data[start:stop]), dice)).encode("utf-8", "surrogatepass")
        length = len(text).to_bytes(8, "little") if start == 8 else data[:start]
        return length + text + data[stop:]
    found = bytearray(data)
    edge = len(found) if dice.random() < 0.3 else min(len(found), 20_000)  # most heads are no longer
    for _ in range(dice.choice((1, 1, 1, 2, 5, 30))):
        at, kind = dice.randrange(max(1, edge)), dice.randrange(6)
        piece = bytes(found[at : at + dice.randrange(1, 64)])
        if kind == 0:
            found[at : at + 1] = bytes([dice.randrange(256)])
        elif kind == 1:
            found[at : at + 8] = dice.choice(NUMBERS).to_bytes(8, "little")
        elif kind == 2:
            del found[at : at + dice.choice((1, 4, 8, 100, len(found)))]
        elif kind == 3:
            found[at:at] = piece * dice.choice((1, 2, 1000))
        elif kind == 4:
            found[at : at + len(piece)] = bytes(len(piece))
        else:
            found[at:at] = dice.choice((b"[" * DEEP, b'{"a":' * DEEP, b"\xff\xfe", b"\x00" * 9, b'"', b"\n"))
    return bytes(found)


def json_part(data: bytes) -> tuple[int, int] | None:
    """Return where the JSON of a file lies: all of it, a safetensors' head, or one line of many."""
    if data[8:9] == b"{":
        return 8, 8 + int.from_bytes(data[:8], "little")
    if data[:1] == b"{":
        stop = data.find(b"\n{") + 1
        return 0, stop or len(data)
    return None


def replaced(value: Any, dice: random.Random) -> Any:
    """Return JSON with one of its values replaced, a key renamed, or an entry left out or doubled."""
    if isinstance(value, str) and value.startswith("{") and dice.random() < 0.9:
        return json.dumps(replaced(json.loads(value), dice))
    if isinstance(value, (dict, list)) and value and dice.random() < 0.85:
        found = dict(value) if isinstance(value, dict) else list(value)
        keys = list(found) if isinstance(found, dict) else list(range(len(found)))
        key = dice.choice(keys)
        if dice.random() < 0.1:
            del found[key]
        elif isinstance(found, dict) and dice.random() < 0.05:
            found[dice.choice(("x", "", "-1", "99999"))] = found.pop(key)
        else:
            found[key] = replaced(found[key], dice)
        return found
    if dice.random() < 0.05:
        deep: Any = 0
        for _ in range(900):
            deep = [deep]
        return deep
    return dice.choice(ODD)


if __name__ == "__main__":
    sys.exit(main())
