"""A process that renders chat templates, which are other people's programs: run by `sandbox`, never imported.

Jinja keeps a template away from Python, with the settings, functions and names that transformers gives one;
the system keeps the process within its memory and its time. Each line of stdin is `[template, values]` as
JSON, each line of stdout `["text", what it rendered]` or `["error", why it did not]`. Nothing of ours is
imported, so that it starts at once.
"""

import functools
import json
import signal
import sys
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


def serve(seconds: int, n_byte: int) -> None:
    """Render until stdin ends; a template that takes longer, or more memory, ends the process or fails."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this one
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (n_byte, n_byte))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        if sys.platform != "win32":
            signal.alarm(seconds)
        try:
            template, values = json.loads(line)
            answer = json.dumps(["text", _compiled(template).render(values)])
        except MemoryError:
            answer = json.dumps(["error", "it takes too much memory"])
        except Exception as error:  # a template is a program: it may fail in any way
            answer = json.dumps(["error", str(error)[:2000] or type(error).__name__])
        if sys.platform != "win32":
            signal.alarm(0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


class _Generation(Extension):
    """`{% generation %}`, which marks what the assistant says, is no more than its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Names(Namespace):
    """A template's `namespace`, which keeps no name that Python gives a meaning to."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace keeps no name like {name}")
        super().__setitem__(name, value)


def _namespace(*given: Any, **values: Any) -> _Names:
    names = _Names()
    for name, value in dict(*given, **values).items():
        names[name] = value
    return names


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    options: dict[str, Any] = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


@functools.lru_cache(maxsize=4)
def _compiled(source: str) -> Template:
    """Return a template that sees no more of Python than a chat template needs."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "namespace": _namespace}
    return environment.from_string(source)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
