"""Sandbox: chat templates rendered in a process of their own, with a limit of time and of memory."""

import json
import subprocess
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from threading import Timer
from typing import Any

from mone_export.errors import MoneError

SECONDS, MEMORY = 20, 2**30  # of one chat; a real template takes milliseconds
_PROGRAM = Path(__file__).with_name("rendering.py")


class StoppedError(MoneError):
    """A template that would not end: there is no use in trying it on other chats."""


class TemplateFailedError(Exception):
    """A template cannot render a chat; the text says why, as the template or Jinja says it."""


class Sandbox:
    """Renders templates; the process starts with the first one and ends with this object."""

    def __init__(self, *, seconds: int = SECONDS, memory: int = MEMORY) -> None:
        """Take the limits of one chat: seconds, bytes of the process."""
        self._limits = (str(seconds), str(memory))
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None

    def render(self, template: str, values: Mapping[str, Any]) -> str:
        """Return what a template makes of values, of which it sees what JSON holds and no more.

        Raises `TemplateFailedError` where it fails, and `StoppedError` where it takes too long.
        """
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        plain = json.dumps([template, values], default=lambda value: f"<{type(value).__name__}>")
        timer = Timer(self._seconds, process.kill)
        timer.start()
        try:
            process.stdin.write(plain + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            timer.cancel()
        if not answer.endswith("\n"):
            process.kill()
            process.wait()
            raise StoppedError(
                f"the model's chat template was stopped: one chat took more than {self._seconds} s or "
                f"{int(self._limits[1]) >> 20} MiB; get the model's template again, or pass the chats as text"
            )
        kind, text = json.loads(answer)
        if kind != "text":
            raise TemplateFailedError(text)
        return str(text)

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_PROGRAM), *self._limits],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                errors="surrogatepass",
            )
            weakref.finalize(self, _end, self._process)
        return self._process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except BrokenPipeError:  # what it had not read
                continue
