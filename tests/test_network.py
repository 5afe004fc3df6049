"""Nothing asks the network unless the user named what is there: every command runs where it is forbidden."""

import subprocess
import sys
from pathlib import Path

import pytest

WATCHED = """
import sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        sys.stderr.write(f"asked the network: {event} {arguments[1:]}\\n")
        sys.stderr.flush()
        import os
        os._exit(99)

sys.addaudithook(watch)
from importlib import import_module
sys.exit(import_module(sys.argv[1]).main(sys.argv[2:]))
"""


def run(module: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a command of the package; it ends with 99 at the first word to any host."""
    command = [sys.executable, "-c", WATCHED, f"mone_export.{module}", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_id_of_the_hub_asks_it() -> None:
    """So that the others could fail."""
    done = run("cli", "allenai/OLMoE-1B-7B-0125", "--ratio", 0.5, "--dry-run")
    assert done.returncode == 99 and "asked the network" in done.stderr


@pytest.mark.upstream
@pytest.mark.nightly
def test_no_other_model_does(small: Path, demo_gguf: Path, text: Path, tmp_path: Path) -> None:
    short = ("-f", text, "--chunks", 4, "-c", 64)
    half = tmp_path / "half.gguf"
    for words in (
        ("cli", demo_gguf, "--ratio", 0.5, *short, "-o", half, "--report", tmp_path / "page.html"),
        ("cli", small, "--ratio", 0.5, *short, "-o", tmp_path / "small.gguf", "--stats", tmp_path / "s"),
        ("cli", "demo", "--ratio", 0.5, "--dry-run"),
        ("cli", small, "--ratio", 0.5, "--hf-out", tmp_path / "pruned", "--novice", "mean", *short),
        ("cli_inspect", half),
        ("cli_inspect", small),
        ("cli_inspect", tmp_path / "s"),
        ("cli_eval", half, "--against", demo_gguf, "-f", text, "--chunks", 2, "-n", 4, "--no-speed"),
        ("cli_stats", "show", tmp_path / "s"),
        ("cli_llama", "info"),
    ):
        done = run(*words)
        assert done.returncode == 0, (words, done.stderr[-2000:])
