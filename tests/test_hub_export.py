"""`mone-export org/model`: the whole road by id, from a stand-in of the Hub; each process has a cache."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf_file
import pytest
from hub_server import HubServer, hub_server
from tiny import save_small

pytestmark = pytest.mark.slow  # a whole command each

ID = "someone/tiny-MoE"
WEIGHTS = "model.safetensors"
README = """---
license: apache-2.0
base_model: elsewhere/larger-MoE
tags:
- mixture
- small
---
# A model
"""
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with hub_server() as server:
        yield server


@pytest.fixture(scope="module")
def commits(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two commits of one repository: branch `main`, and tag `v1` of other weights."""
    found = {}
    for seed, revision in enumerate(("main", "v1")):
        folder = save_small(tmp_path_factory.mktemp("hub") / "model", seed=seed, intermediate_size=384)
        (folder / "README.md").write_text(README)
        (folder / "original").mkdir()
        shutil.copy(folder / WEIGHTS, folder / "original")
        found[revision] = server.add(ID, folder, revision=revision)
    return found


@pytest.fixture
def run(server: HubServer, commits: dict[str, str], text: Path, tmp_path: Path) -> Run:
    def run(*arguments: str, model: str = ID, home: str = "home", **env: str) -> Any:
        server.requests.clear()
        command = [sys.executable, "-m", "mone_export", model, "--ratio", "0.5", *arguments]
        command += ["-f", str(text), "--chunks", "2", "-c", "32"]
        environment = os.environ | server.environment(tmp_path / home, **env) | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    return run


def n_byte_asked(server: HubServer) -> int:
    """Bytes of weights that were asked for, at most; only their headers are less than a file."""
    ranges = [given for method, path, given in server.asked(WEIGHTS) if method == "GET" and "blobs" in path]
    assert all(given for given in ranges), "a whole file"
    bounds = [re.fullmatch(r"bytes=(\d+)-(\d+)", given or "") for given in ranges]
    return sum(int(found[2]) + 1 - int(found[1]) for found in bounds if found)


def test_a_typo_downloads_no_weights(server: HubServer, run: Run, tmp_path: Path) -> None:
    done = run("--outtype", "q4_k_typo", "-o", str(tmp_path / "x.gguf"), "-q")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("mone-export: unknown --outtype q4_k_typo: choose from "), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert n_byte_asked(server) <= 100_001 and not list((tmp_path / "home").rglob("*.safetensors"))
    assert not (tmp_path / "x.gguf").exists()


def test_export_by_id(server: HubServer, commits: dict[str, str], run: Run, tmp_path: Path) -> None:
    """Rehearsed from headers, downloaded through a connection that breaks, and again without a network."""
    out = tmp_path / "out.gguf"
    dry = run("--dry-run", "--allocate", "even")
    assert dry.returncode == 0, dry.stderr
    assert n_byte_asked(server) <= 100_001 and not list((tmp_path / "home").rglob("*.safetensors"))
    (size,) = re.findall(r"\((\d+) bytes\)", dry.stdout)

    server.cut_off(WEIGHTS, 200_000, 12_000_000)  # the header comes whole, the weights do not
    done = run("-o", str(out), "--allocate", "even")
    assert done.returncode == 0, done.stderr
    fetched = [given for method, path, given in server.asked(WEIGHTS) if method == "GET" and "blobs" in path]
    assert fetched[1:] == [None, "bytes=10485760-"], "huggingface_hub keeps pieces of 10 MiB"
    assert not server.asked("original"), "another copy of the weights"
    assert out.stat().st_size == int(size)
    keys = {name: value for name, (_, value) in gguf_file.read(out).keys.items()}
    assert keys["mone.source.id"] == ID and keys["mone.source.revision"] == commits["main"]
    assert keys["mone.source.name"] == "tiny-MoE"
    assert commits["main"] not in keys["general.name"] and "tiny" in keys["general.name"].lower()
    assert keys["general.license"] == "apache-2.0"
    bases = [keys[f"general.base_model.{number}.repo_url"] for number in range(2)]
    assert bases == [f"https://huggingface.co/{name}" for name in (ID, "elsewhere/larger-MoE")]
    assert {"mixture", "small"} <= set(keys["general.tags"])

    first = out.read_bytes()
    again = run("-o", str(out), "--allocate", "even", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert out.read_bytes() == first and not server.requests


def test_offline_without_a_cache_is_one_line(run: Run, tmp_path: Path) -> None:
    done = run("-o", str(tmp_path / "out.gguf"), "-q", home="empty", HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "is not complete in " in done.stderr and "HF_HUB_OFFLINE is set" in done.stderr


@pytest.mark.parametrize("arguments", [["--revision", "v1"], []], ids=["option", "at"])
@pytest.mark.by_day(1)
def test_a_revision_is_that_commit(
    commits: dict[str, str], run: Run, tmp_path: Path, arguments: list[str]
) -> None:
    out = tmp_path / "out.gguf"
    done = run("-o", str(out), "-q", *arguments, model=ID if arguments else f"{ID}@v1")
    assert done.returncode == 0, done.stderr
    assert gguf_file.read(out).keys["mone.source.revision"][1] == commits["v1"]
    assert [folder.name for folder in (tmp_path / "home").glob("hub/*/snapshots/*")] == [commits["v1"]]


def test_a_revision_that_is_not_there_is_one_line(server: HubServer, run: Run, tmp_path: Path) -> None:
    done = run("-o", str(tmp_path / "out.gguf"), "-q", "--revision", "v9")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert f"{ID} has no revision v9: choose one of {server.endpoint}/{ID}/commits" in done.stderr


def test_a_download_that_finds_the_disk_full_is_one_line(run: Run, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(home)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting takes the rights of root")
    try:
        done = run("-o", str(tmp_path / "out.gguf"), "-q")
        assert done.returncode == 1, done.stderr
        (line,) = done.stderr.splitlines()
        assert "free some space, or set HF_HOME to a folder elsewhere" in line, line
        assert not list(tmp_path.glob("out*")) and not list(home.rglob("*.safetensors"))
    finally:
        subprocess.run(["umount", str(home)], check=True)
