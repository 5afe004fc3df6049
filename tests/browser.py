"""Headless Chromium on pages served from a folder on loopback; a page tells by a request what it found."""

import functools
import json
import re
import shutil
import subprocess
import tempfile
import threading
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # nothing leaves this machine
)
REPORT = "/report?"
# what a script calls to end the visit; a browser lists what failed to load, too
TELL = f"""
function tell(value) {{
  const resources = performance.getEntriesByType("resource").map(each => each.name);
  fetch("{REPORT}" + encodeURIComponent(JSON.stringify([value, resources])));
}}"""


@dataclass
class Visit:
    """What a page told, what it loaded, and what stands in the browser's console."""

    told: Any = None
    loaded: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)


def visit(folder: Path, page: str, script: str, *, seconds: float = 30) -> Visit:
    """Open a page of a folder with a script added to it, until the script calls `tell(value)`."""
    found, done = Visit(), threading.Event()
    added = f"<script>{TELL}{script}</script></body>".encode()

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith(REPORT):
                found.told, found.loaded = json.loads(unquote(self.path.removeprefix(REPORT)))
                self.send_response(204)
                self.end_headers()
                done.set()
            elif self.path == f"/{page}":
                body = (folder / page).read_bytes().replace(b"</body>", added)
                self.send_response(200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.end_headers()
                self.wfile.write(body)
            else:
                super().do_GET()

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        found.console = _open(f"http://127.0.0.1:{server.server_port}/{page}", done, seconds)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert done.is_set(), f"{page} told nothing in {seconds} s: {found.console}"
    return found


def _open(url: str, done: threading.Event, seconds: float) -> list[str]:
    """Show a page until `done`; returns what it wrote to the console."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, tempfile.TemporaryFile() as log:
        command = [str(CHROMIUM), *OPTIONS, f"--user-data-dir={profile}", "--remote-debugging-port=0", url]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log) as process:
            try:
                done.wait(seconds)
            finally:
                process.terminate()
                process.wait()
        log.seek(0)
        return re.findall(r"CONSOLE.*\] (.*)", log.read().decode(errors="replace"))
