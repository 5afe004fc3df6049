"""Models from the Hub, from a stand-in of its HTTP interface; every process has a cache of its own."""

import json
import os
import re
import resource
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import TOKEN, HubServer, hub_server
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mone_export.errors import MoneError
from mone_export.source import hub

pytestmark = pytest.mark.slow  # it waits for servers

ID = "someone/tiny-MoE"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

# prints what it found as JSON, or a MoneError's text; anything else is a traceback
DRIVER = """
import json, os, sys
from mone_export.source import hub
from mone_export.errors import MoneError
steps = []
try:
    model, revision = hub.parse(sys.argv[2])
    snapshot = hub.metadata(model, revision)
    files = hub.weight_files(snapshot.folder)
    if sys.argv[1] == "weights":
        hub.weights(snapshot, files, lambda *step: steps.append(step))
    if sys.argv[1] == "headers":
        hub.headers(snapshot, files)
    print(json.dumps([snapshot.revision, str(snapshot.folder), sorted(os.listdir(snapshot.folder)), steps]))
except MoneError as error:
    print(error)
"""


@dataclass
class Found:
    revision: str
    folder: Path
    files: list[str]
    steps: list[tuple[int, int, str]]


@pytest.fixture
def server() -> Iterator[HubServer]:
    with hub_server() as server:
        yield server


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model in two shards, and what else lies in such repositories."""
    folder = tmp_path / "model"
    (folder / "original").mkdir(parents=True)
    random = np.random.default_rng(0)
    shards = [{f"layer.{n}.weight": random.standard_normal((300, 1000), np.float32)} for n in range(2)]
    for name, tensors in zip(SHARDS, shards, strict=True):
        save_file(tensors, folder / name, metadata={"format": "pt"})
    weight_map = {key: name for name, tensors in zip(SHARDS, shards, strict=True) for key in tensors}
    (folder / hub.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name, text in {
        "config.json": '{"model_type": "olmoe"}',
        "tokenizer.json": "[" + "1, " * 3000 + "1]",
        "README.md": "---\nlicense: mit\n---\n",
        "modeling_tiny.py": "raise SystemExit",
        "chat_template.jinja": "{{ messages }}",
        "original/params.json": "{}",
        "original/model.safetensors": "another copy",
        "consolidated.safetensors": "and another",
        "pytorch_model.bin": "and another",
        "mtp.safetensors": "outside the index",
    }.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def fetch(server: HubServer, tmp_path: Path) -> Callable[..., Any]:
    def run(name: str = ID, *, what: str = "weights", largest: int = -1, **env: str) -> Found | str:
        environment = os.environ | server.environment(tmp_path / "home", **env)
        if largest >= 0:  # nor may `make trust-coverage` write its data
            environment = {name: value for name, value in environment.items() if "COVERAGE" not in name}
        command = [sys.executable, "-c", DRIVER, what, name]
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest)),
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        (line,) = done.stdout.splitlines()
        if not line.startswith("["):
            return line
        revision, folder, files, steps = json.loads(line)
        return Found(revision, Path(folder), files, steps)

    return run


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("org/model", ("org/model", None)),
        ("allenai/OLMoE-1B-7B-0125", ("allenai/OLMoE-1B-7B-0125", None)),
        ("org/model@main", ("org/model", "main")),
        ("org/model@refs/pr/1", ("org/model", "refs/pr/1")),
        ("demo", None),
    ],
)
def test_ids_are_read(name: str, found: tuple[str, str | None] | None) -> None:
    assert hub.parse(name) == found


@pytest.mark.parametrize(
    "name",
    [
        "my models/olmoe",
        "models/my olmoe",
        ".",
        "..",
        "./model",
        "../model",
        "/a/b",
        "~/model",
        "a/b/c",
        "org/",
    ]
    + [
        "/model",
        "org/model@",
        "org/model@a b",
        "org/..",
        "org/a--b",
        "C:\\models\\x",
        "modèles/x",
        "",
        "org/m\n",
    ],
)
def test_what_is_no_id_is_one_line(name: str) -> None:
    with pytest.raises(
        MoneError, match=r"(is neither a folder nor a Hugging Face id like org/model|after the @)"
    ) as caught:
        hub.parse(name)
    assert "\n" not in str(caught.value)


def test_small_files_come_first_and_alone(server: HubServer, model: Path, fetch: Callable[..., Any]) -> None:
    commit = server.add(ID, model)
    found = fetch(what="metadata")
    assert found.revision == commit == found.folder.name
    assert found.files == sorted(
        ["README.md", "chat_template.jinja", "config.json", hub.INDEX, "tokenizer.json"]
    )
    asked = [path.rpartition("/")[2] for _, path, _ in server.asked("/resolve/")]
    assert asked[0] == "config.json"


def test_weights_are_those_of_the_index(server: HubServer, model: Path, fetch: Callable[..., Any]) -> None:
    server.add(ID, model)
    found = fetch()
    assert [name for name in found.files if name.endswith((".safetensors", ".bin"))] == list(SHARDS)
    assert not server.asked("original|consolidated|mtp|pytorch_model")
    for name in SHARDS:
        assert (found.folder / name).read_bytes() == (model / name).read_bytes()
    done, total, what = found.steps[-1]
    assert (done, total, what) == (2, 2, "downloading (MiB)")
    assert [step[0] for step in found.steps] == sorted(step[0] for step in found.steps)


def test_single_file_needs_no_index(server: HubServer, model: Path, fetch: Callable[..., Any]) -> None:
    (model / hub.INDEX).unlink()
    (model / SHARDS[0]).rename(model / hub.SINGLE)
    server.add(ID, model)
    assert [name for name in fetch().files if name.endswith(".safetensors")] == [hub.SINGLE]


def test_revisions_are_told_apart(
    server: HubServer, model: Path, tmp_path: Path, fetch: Callable[..., Any]
) -> None:
    older = tmp_path / "older"
    older.mkdir()
    (older / "config.json").write_text('{"model_type": "mixtral"}')
    save_file({"w": np.zeros(2, np.float32)}, older / hub.SINGLE)
    tag = server.add(ID, older, revision="v1")
    main = server.add(ID, model)
    assert fetch().revision == main
    found = fetch(f"{ID}@v1")
    assert found.revision == tag and "mixtral" in (found.folder / "config.json").read_text()
    assert fetch(f"{ID}@{main}").revision == main
    assert fetch(f"{ID}@v2") == (
        f"{ID} has no revision v2: choose one of {server.endpoint}/{ID}/commits, or leave it out"
    )


def test_broken_connection_is_taken_up_where_it_broke(
    server: HubServer, model: Path, fetch: Callable[..., Any]
) -> None:
    save_file({"layer.0.weight": np.arange(6_000_000, dtype=np.float32)}, model / SHARDS[0])
    server.add(ID, model)
    server.cut_off(SHARDS[0], 12_000_000, 11_000_000)
    found = fetch()
    assert (found.folder / SHARDS[0]).read_bytes() == (model / SHARDS[0]).read_bytes()
    ranges = [given for method, _, given in server.asked(f"blobs/.*{SHARDS[0]}") if method == "GET"]
    assert ranges == [None, "bytes=10485760-", "bytes=20971520-"], "huggingface_hub keeps pieces of 10 MiB"
    assert found.steps[-1][:2] == [24, 24], "nothing is counted twice"


def test_what_is_complete_is_not_fetched_again(
    server: HubServer, model: Path, fetch: Callable[..., Any]
) -> None:
    """The connection breaks off in the second file, again and again."""
    server.add(ID, model)
    server.cut_off(SHARDS[1], *[1000] * 10)
    assert fetch().startswith(f"cannot download {ID} from {server.endpoint} (")
    server.cut_off(SHARDS[1])
    assert set(SHARDS) <= set(fetch().files)
    assert len(server.asked(f"blobs/.*{SHARDS[0]}")) == 1


def test_second_run_needs_no_network(server: HubServer, model: Path, fetch: Callable[..., Any]) -> None:
    server.add(ID, model)
    first = fetch()
    server.requests.clear()
    again = fetch(HF_HUB_OFFLINE="1")
    assert (again.revision, again.folder, again.files) == (first.revision, first.folder, first.files)
    assert not server.requests and not again.steps
    assert fetch("someone/else", HF_HUB_OFFLINE="1").endswith(
        "and HF_HUB_OFFLINE is set: unset it, or pass a folder"
    )


def test_offline_with_the_weights_missing_says_so(
    server: HubServer, model: Path, fetch: Callable[..., Any]
) -> None:
    server.add(ID, model)
    fetch(what="metadata")
    assert "is not complete in " in fetch(HF_HUB_OFFLINE="1")


@pytest.mark.parametrize("status", [401, 403])
def test_gated_model_names_the_way_in(
    server: HubServer, model: Path, fetch: Callable[..., Any], status: int
) -> None:
    server.add(ID, model, gate=status)
    assert fetch() == (
        f"{ID} is gated: accept its licence on {server.endpoint}/{ID} and log in with `hf auth login`"
    )
    assert set(SHARDS) <= set(fetch(HF_TOKEN=TOKEN).files)
    elsewhere = server.asked("/blobs/")
    assert elsewhere, "large files come from another host"


def test_unknown_model_is_one_line(server: HubServer, fetch: Callable[..., Any]) -> None:
    assert fetch("someone/typo") == (
        f"someone/typo is neither a folder nor a model on {server.endpoint} that you may see: check the "
        "spelling, and if it is private, log in with `hf auth login`"
    )


def test_model_without_config_is_one_line(server: HubServer, model: Path, fetch: Callable[..., Any]) -> None:
    (model / "config.json").unlink()
    server.add(ID, model)
    assert fetch() == f"{ID} on the Hub has no config.json: pass a model in Hugging Face's format"
    assert not server.asked("safetensors")


def test_model_without_safetensors_is_one_line(
    server: HubServer, model: Path, fetch: Callable[..., Any]
) -> None:
    (model / hub.INDEX).unlink()
    server.add(ID, model)
    assert "lacks 1 of its weight files, such as model.safetensors" in fetch()
    assert f"{ID} has no model.safetensors: only models" in fetch(what="headers")


def test_broken_index_is_one_line(server: HubServer, model: Path, fetch: Callable[..., Any]) -> None:
    (model / hub.INDEX).write_text('{"weight_map": {"a": "../../x.safetensors"}}')
    server.add(ID, model)
    assert "it names no files of its own folder" in fetch()


def test_server_that_fails_is_one_line(server: HubServer, fetch: Callable[..., Any]) -> None:
    server.status = 418
    assert fetch() == f"{server.endpoint} answers for {ID} with status 418: try again later"


@pytest.mark.nightly
def test_server_that_says_nothing_is_one_line(
    server: HubServer, model: Path, fetch: Callable[..., Any]
) -> None:
    server.add(ID, model)
    first = fetch()
    server.silent = "."
    impatient = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    assert fetch(**impatient) == replace(first, steps=[]), "the cache has it"
    found = fetch(HF_HOME="/nowhere", **impatient)
    assert found.startswith(f"cannot download {ID} from {server.endpoint} (") and "timed out" in found, found


def test_nobody_there_is_one_line(server: HubServer, fetch: Callable[..., Any]) -> None:
    dead = "http://127.0.0.1:9"
    found = fetch(HF_ENDPOINT=dead)
    assert found.startswith(f"cannot download {ID} from {dead} (") and "refused" in found, found
    assert "check the connection" in found


def test_cache_that_cannot_be_made_is_one_line(
    server: HubServer, model: Path, tmp_path: Path, fetch: Callable[..., Any]
) -> None:
    server.add(ID, model)
    home = tmp_path / "file"
    home.touch()
    cannot = f"cannot write to {home / 'hub'} (Not a directory): free some space there, or set HF_HOME"
    assert fetch(HF_HOME=str(home)) == f"{cannot} to a folder elsewhere"


def test_disk_that_is_full_is_one_line(server: HubServer, model: Path, fetch: Callable[..., Any]) -> None:
    """Files may have 100 kB: the small ones fit, the system refuses a weight file."""
    server.add(ID, model)
    found = fetch(largest=100_000)
    assert "hub (File too large): free some space there, or set HF_HOME" in found, found
    assert not set(SHARDS) & set(fetch(what="metadata").files)


def test_space_is_checked_before_a_download(server: HubServer, model: Path, tmp_path: Path) -> None:
    server.add(ID, model)
    code = """
import shutil, sys
from types import SimpleNamespace
from mone_export.source import hub
snapshot = hub.metadata(sys.argv[1])
shutil.disk_usage = lambda _folder: SimpleNamespace(free=1000)
try:
    hub.weights(snapshot, hub.weight_files(snapshot.folder))
except hub.MoneError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, ID],
        env=os.environ | server.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    wanted = rf"the weights of {ID} take [\d.]+ [kM]B, 1.00 kB are free in "
    assert re.match(wanted, done.stdout), done
    assert not server.asked("resolve/.*safetensors$")


def test_headers_come_by_range_and_make_a_hollow_model(
    server: HubServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(ID, model)
    code = """
import sys, shutil
from mone_export.source import hub
snapshot = hub.metadata(sys.argv[1])
with hub.skeleton_folder(snapshot) as folder:
    shutil.copytree(folder, sys.argv[2])
    disk = sum(file.stat().st_blocks * 512 for file in folder.iterdir())
print(folder.name, disk, folder.exists())
"""
    copy = tmp_path / "copy"
    done = subprocess.run(
        [sys.executable, "-c", code, ID, str(copy)],
        env=os.environ | server.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
        check=True,
    )
    name, disk, exists = done.stdout.split()
    assert name == "tiny-MoE" and exists == "False" and int(disk) < 200_000
    asked = [given for _, path, given in server.asked("safetensors$") if path.startswith("/blobs")]
    assert asked == ["bytes=0-100000"] * 2, "no more than the headers"
    for shard in SHARDS:
        with safe_open(copy / shard, "np") as hollow, safe_open(model / shard, "np") as true:
            assert list(hollow.keys()) == list(true.keys()) and hollow.metadata() == true.metadata()
        assert not any(tensor.any() for tensor in load_file(copy / shard).values())
    assert json.loads((copy / hub.INDEX).read_text()) == json.loads((model / hub.INDEX).read_text())
    assert (copy / "config.json").read_bytes() == (model / "config.json").read_bytes()


def test_skeleton_serves_checks_and_converter(server: HubServer, small: Path, tmp_path: Path) -> None:
    """The size of the file comes out as it does from the weights, of which none are read."""
    server.add(ID, small)
    code = """
import sys
from pathlib import Path
from mone_export.source import hub
from mone_export.output.writing import measure
from mone_export.pruning.planning import plan_without_scores
from mone_export.recipe import Recipe
from mone_export.source import open_source
with hub.skeleton_folder(hub.metadata(sys.argv[1])) as skeleton:
    for path in (skeleton, Path(sys.argv[2])):
        source = open_source(path)
        source.check()
        for ratio in (0, 0.5):
            plan = plan_without_scores(source.spec, Recipe(ratio=ratio))
            print(source.spec, measure(source, plan, outtype="q8_0"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, ID, str(small)],
        env=os.environ | server.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    shapes, _, sizes_said = zip(*(line.rpartition(" ") for line in lines), strict=True)
    sizes = [int(size) for size in sizes_said]
    # the name in the file is the folder's
    assert shapes[0] == shapes[2] and sizes[0] > sizes[1]
    assert abs(sizes[0] - sizes[2]) <= 64 and abs(sizes[1] - sizes[3]) <= 64, sizes
    asked = [given for _, path, given in server.asked("safetensors$") if path.startswith("/blobs")]
    assert asked == ["bytes=0-100000"]


def test_a_model_that_is_here_is_its_own_skeleton(model: Path) -> None:
    with hub.skeleton_folder(hub.Snapshot(ID, "0" * 40, model)) as folder:
        assert folder == model
    assert model.is_dir()


@pytest.mark.parametrize("content", [b"", b"\1", struct.pack("<Q", 5) + b"{not}", b"<html>not found</html>"])
def test_local_file_without_header_is_one_line(model: Path, content: bytes) -> None:
    (model / SHARDS[0]).write_bytes(content)
    with pytest.raises(MoneError, match=r"cannot read .*safetensors: .*; download it again$"):
        hub.headers(hub.Snapshot(ID, "0" * 40, model), SHARDS)
