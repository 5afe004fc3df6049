"""llama.cpp's programs as the tests run them: one completion, a server in the background, questions to it."""

import json
import os
import re
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

PROMPT = 'def read_file(path):\n    """Read'


class Completion(NamedTuple):
    """Generated text, the start of the name of each backend that ran expert matrices, and the log."""

    text: str
    experts_on: set[str]
    log: str


def run(*command: object) -> str:
    """Run a program, which must succeed; returns what it printed."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr)[-2000:]
    return result.stdout + result.stderr


class Server(NamedTuple):
    """A running llama-server."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        """The number of its process."""
        return self.process.pid


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def complete(
    bin_folder: Path, model: Path, *options: object, env: Mapping[str, str] | None = None
) -> Completion:
    """Have llama-server continue `PROMPT` by 48 tokens, always the likeliest."""
    env = {"GGML_SCHED_DEBUG": "2", **(env or {})}
    question = {"prompt": PROMPT, "n_predict": 48, "temperature": 0, "ignore_eos": True}
    with running_server(bin_folder, "-m", model, "-c", 512, "-v", *options, env=env) as server:
        text = post(f"{server.url}/completion", question)["content"]
        log = server.log.read_text(encoding="utf-8", errors="replace")
    nodes = re.findall(r"\( *MUL_MAT_ID\):.*?\[ *(\w+)", log)
    return Completion(text, set(nodes), log)


@contextmanager
def running_server(
    bin_folder: Path, *options: object, env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run llama-server on loopback; yields it when it is ready."""
    port = free_port()
    command = [bin_folder / "llama-server", "--host", "127.0.0.1", "--port", port, "-t", 2, *options]
    with (
        tempfile.NamedTemporaryFile() as log,
        subprocess.Popen(
            [str(part) for part in command], stdout=log, stderr=log, env={**os.environ, **(env or {})}
        ) as process,
    ):
        server = Server(f"http://127.0.0.1:{port}", process, Path(log.name))
        try:
            _wait_for(server, process)
            yield server
        finally:
            process.terminate()


@contextmanager
def running_rpc_server(bin_folder: Path) -> Iterator[str]:
    """Run ggml-rpc-server on loopback; yields host:port."""
    port = free_port()
    command = [bin_folder / "ggml-rpc-server", "-H", "127.0.0.1", "-p", str(port), "-t", "2"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _wait_for_port(port, process)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


def post(url: str, body: Mapping[str, Any]) -> Any:
    """Send JSON, return the JSON of the answer."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def _wait_for(server: Server, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        if process.poll() is not None:
            raise RuntimeError(f"llama-server has ended: {server.log.read_text(errors='replace')[-2000:]}")
        try:
            with urllib.request.urlopen(f"{server.url}/health") as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(server.url)


def _wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(100):
        assert process.poll() is None, "ggml-rpc-server has ended"
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(port)
