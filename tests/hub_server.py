"""A stand-in for the Hugging Face Hub on 127.0.0.1: folders as repositories, with revisions and faults.

It speaks the part of the Hub's HTTP interface that huggingface_hub uses to read models: repository and tree
listings, files by HEAD and GET with ranges, and large files behind a redirect to another host, as the Hub
serves them. `environment` points a process at it.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_stand_in"
LARGE = 2000  # bytes from which on a file is behind a redirect


@dataclass
class Repository:
    """Commits by SHA, branches and tags by name, and who may read."""

    commits: dict[str, Path] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    gate: int | None = None  # the status for those without the token: 401 or 403

    def commit(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.names.get(revision)


class HubServer(ThreadingHTTPServer):
    """`requests` lists all that was asked: (method, path, range or None)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, Path] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut: dict[str, list[int]] = {}
        self.status: int | None = None  # what every request is answered with, if set
        self.silent: str | None = None  # requests whose path matches get no answer for a while

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, name: str, folder: Path, *, revision: str = "main", gate: int | None = None) -> str:
        """Serve a folder, as it is now, as a commit of a repository; returns the commit's SHA."""
        repository = self.repositories.setdefault(name, Repository())
        repository.gate = gate
        digest = hashlib.sha1(str(folder).encode())
        for file in _files(folder):
            digest.update(f"{file} {_sha256(folder / file)}".encode())
            self.blobs[_sha256(folder / file)] = folder / file
        repository.commits[digest.hexdigest()] = folder
        repository.names[revision] = digest.hexdigest()
        return digest.hexdigest()

    def cut_off(self, file: str, *after: int) -> None:
        """Close the connection in the next responses with this file, each after so many bytes."""
        self.cut[file] = list(after)

    def asked(self, pattern: str) -> list[tuple[str, str, str | None]]:
        return [request for request in self.requests if re.search(pattern, request[1])]

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """What a process needs to take this for the Hub, with an own cache in `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            **more,
        }


@contextmanager
def hub_server() -> Iterator[HubServer]:
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def _files(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        self._form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode())
        if self.server.silent and re.search(self.server.silent, path):
            time.sleep(20)
            self.close_connection = True
        elif self.server.status:
            self._answer(self.server.status, b"out of order")
        elif blob := re.fullmatch(r"/blobs/(\w+)/(.+)", path):
            self._send_file(self.server.blobs[blob[1]], blob[2], {})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/(.+))?", path):
            self._with_commit(found[1], found[3] or "main", found[2] or "revision", None)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._with_commit(found[1], found[2], "resolve", found[3])
        else:
            self._answer(404, b"no such page")

    do_HEAD = do_POST = do_GET

    def log_message(self, *_args: object) -> None:
        """Nothing on stderr."""

    def _with_commit(self, name: str, revision: str, what: str, file: str | None) -> None:
        repository = self.server.repositories.get(name)
        if repository is None:
            self._answer(
                401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            )
            return
        if repository.gate and self.headers.get("Authorization") != f"Bearer {TOKEN}" and what == "resolve":
            self._answer(repository.gate, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"})
            return
        commit = repository.commit(revision)
        if commit is None:
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        folder = repository.commits[commit]
        if what == "resolve":
            assert file is not None
            self._resolve(folder, file, {"X-Repo-Commit": commit})
        elif what == "revision":
            siblings = [{"rfilename": file} for file in _files(folder)]
            self._send_json({"id": name, "sha": commit, "siblings": siblings, "private": False})
        else:
            wanted = self._form.get("paths", _files(folder))
            self._send_json([self._entry(folder, file) for file in _files(folder) if file in wanted])

    def _entry(self, folder: Path, file: str) -> dict[str, object]:
        size, sha256 = (folder / file).stat().st_size, _sha256(folder / file)
        entry: dict[str, object] = {"type": "file", "path": file, "size": size, "oid": sha256[:40]}
        return entry | ({"lfs": {"oid": sha256, "size": size, "pointerSize": 130}} if size > LARGE else {})

    def _resolve(self, folder: Path, file: str, headers: dict[str, str]) -> None:
        path = folder / file
        if not path.is_file():
            self._answer(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
            return
        sha256, size = _sha256(path), path.stat().st_size
        if size <= LARGE:
            self._send_file(path, file, headers | {"ETag": f'"{sha256[:40]}"'})
            return
        headers |= {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(size)}
        headers["Location"] = f"http://localhost:{self.server.server_port}/blobs/{sha256}/{file}"
        self._answer(302, b"", headers)

    def _send_file(self, path: Path, name: str, headers: dict[str, str]) -> None:
        data, start = path.read_bytes(), 0
        status, size = 200, len(data)
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(asked[1]), min(int(asked[2] or size), size - 1)
            status, data = 206, data[start : end + 1]
            headers = headers | {"Content-Range": f"bytes {start}-{end}/{size}"}
        cuts = self.server.cut.get(name) if self.command == "GET" else None
        self._answer(status, data, headers | {"Accept-Ranges": "bytes"}, cut=cuts.pop(0) if cuts else None)

    def _send_json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(
        self, status: int, data: bytes, headers: dict[str, str] | None = None, *, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:cut])
        if cut is not None:
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
