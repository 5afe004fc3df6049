"""Run the steps of the Containerfile without a container engine: in a fresh Debian, by chroot.

    python tools/release/container.py [--arg NAME=VALUE]... [--folder PATH]...      (make check-container)

Needs root, debootstrap and the wheels of `make wheel`. After the steps, the user whom the file names prunes
the demo model and has llama-completion continue a text. What an engine does besides (layers, a network of its
own, limits) is not tried.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mone_export.errors import MoneError

ROOT = Path(__file__).resolve().parents[2]
CONTAINER = Path(__file__).with_name("Containerfile")
RESOLVER = "etc/resolv.conf"
PROMPT = "def read_file(path):"
TRIED = (
    "mone-export demo --ratio 0.5 -o x.gguf",
    f"$(mone-llama path)/llama-completion -m x.gguf -p '{PROMPT}' -n 16 --temp 0 -no-cnv 2> /dev/null",
)
_MOUNT = re.compile(r"--mount=type=bind,source=([^,\s]+),target=(\S+)\s*")


def main(argv: Sequence[str] | None = None) -> int:
    """Run all steps; 0 when every one succeeded, 1 otherwise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE", help="for a step ARG")
    parser.add_argument("--folder", action="append", default=[], type=Path, help="seen inside as here")
    args = parser.parse_args(argv)
    try:
        if os.geteuid() or not shutil.which("debootstrap"):
            raise MoneError("needs root and debootstrap: sudo apt install debootstrap")
        if not list((ROOT / "dist").glob("mone_llama-*.whl")):
            raise MoneError("needs the wheels: make wheel")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "root"
            run_steps(steps(CONTAINER.read_text()), folder, dict(map(_pair, args.arg)), args.folder)
    except MoneError as error:
        print(f"container.py: {error}", file=sys.stderr)
        return 1
    return 0


def steps(text: str) -> list[tuple[str, str]]:
    """Return the steps of a Containerfile: (instruction, rest), continued lines joined."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in joined)]


def run_steps(
    todo: Sequence[tuple[str, str]], root: Path, given: Mapping[str, str], folders: Sequence[Path]
) -> None:
    """Run the steps in `root`, which they make, then what is tried there."""
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", **given}
    seen = {str(folder): str(folder) for folder in folders}
    user, place = "root", "/"
    for name, rest in todo:
        start = time.monotonic()
        if name == "FROM":
            release = rest.rpartition(":")[2].removesuffix("-slim")
            _checked(["debootstrap", "--variant=minbase", release, str(root)])
            shutil.copy(Path("/", RESOLVER), root / RESOLVER)
        elif name == "RUN":
            mounts = {target: str(ROOT / source) for source, target in _MOUNT.findall(rest)}
            _inside(root, _MOUNT.sub("", rest), environment, seen | mounts)
        elif name in ("ENV", "ARG"):
            key, value = _pair(rest)
            value = value.replace("$PATH", environment["PATH"])
            environment[key] = given.get(key, value) if name == "ARG" else value
        elif name == "USER":
            user = rest
        elif name == "WORKDIR":
            place = rest
        print(f"{time.monotonic() - start:6.1f} s  {name} {rest[:90]}", flush=True)
    # an engine puts a folder of the user's own where the files go
    _inside(root, f"mkdir -p {place} && chown {user} {place}", environment, seen)
    for command in (*TRIED, f"ls {place}"):
        start = time.monotonic()
        as_user = f"cd {place} && exec su {user} -s /bin/sh -p -c {shlex.quote(command)}"
        said = _inside(root, as_user, environment | {"HOME": f"/home/{user}"}, seen)
        print(f"{time.monotonic() - start:6.1f} s  {user}: {command}\n{said.strip()[-600:]}", flush=True)


def _pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value


def _inside(root: Path, command: str, environment: Mapping[str, str], mounts: Mapping[str, str]) -> str:
    """Run a shell's command in `root`, with folders mounted for its length; returns what it printed."""
    script = [f"mount -t proc proc {shlex.quote(str(root / 'proc'))}"]
    for target, source in mounts.items():
        (root / target[1:]).mkdir(parents=True, exist_ok=True)
        script.append(f"mount --bind {shlex.quote(source)} {shlex.quote(str(root / target[1:]))}")
    script.append(f"exec chroot {shlex.quote(str(root))} /bin/sh -c {shlex.quote(command)}")
    return _checked(["unshare", "--mount", "sh", "-ec", "\n".join(script)], environment)


def _checked(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise MoneError(f"{command[-1][-300:]} failed: {done.stdout.strip()[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    raise SystemExit(main())
