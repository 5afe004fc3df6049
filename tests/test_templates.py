"""Chat templates are programs of strangers: they end, they stay small, they reach nothing."""

import json
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import Command

from mone_export.source import sandbox
from mone_export.source.sandbox import Sandbox, StoppedError, TemplateFailedError
from mone_export.source.tokenizing import TextReader, TransformersReader, load_tokenizer

CHAT = [{"role": "user", "content": "hello"}]
LOOP = "{% for _ in range(99999) %}" * 3 + "{% endfor %}" * 3
DOUBLED = (
    "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
    "{{ ns.x }}"
)
TWICE = "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
ENDLESS = {"loops": LOOP, "a macro that calls itself twice": TWICE}
REFUSED = {
    "a text that doubles": DOUBLED,
    "a text times a number": "{{ 'a' * 10 ** 11 }}",
    "a number that grows": "{{ 'x' if 9 ** 9 ** 9 > 1 }}",
    "a wide format": "{{ '%99999999999d' | format(1) }}",
    "a wide centre": "{{ 'a' | center(99999999999) }}",
    "a huge range": "{% for i in range(10 ** 12) %}{% endfor %}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "Python's classes": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "a file": "{% include '/etc/passwd' %}",
    "its own loader": "{{ self._TemplateReference__context.environment.loader.load('x') }}",
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_template_that_takes_too_much_fails(case: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cell = time.monotonic(), Sandbox(seconds=60)
    with pytest.raises((TemplateFailedError, StoppedError)):
        rendered = cell.render(REFUSED[case], {"messages": CHAT})
        assert "root:" not in rendered and "class" not in rendered
        raise TemplateFailedError("it rendered nothing that it should not know")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 2**18, "256 MiB"
    assert cell.render("{{ messages[0].content }}", {"messages": CHAT}) == "hello", (
        "and the next one is served"
    )
    print(f"{time.monotonic() - start:.1f} s")


@pytest.mark.parametrize("case", ENDLESS)
def test_a_template_that_does_not_end_is_stopped(case: str) -> None:
    cell, start = Sandbox(seconds=2), time.monotonic()
    with pytest.raises(StoppedError, match="was stopped: one chat took more than 2 s"):
        cell.render(ENDLESS[case], {"messages": CHAT})
    assert time.monotonic() - start < 30


def of_checkpoint(model: Path, template: str) -> TextReader:
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = template
    return TransformersReader(tokenizer)


def test_the_export_ends_with_one_line(
    command: Command, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one time limit for each of a thousand chats."""
    model = shutil.copytree(small, tmp_path / "model")
    (model / "chat_template.jinja").write_text(LOOP)
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(1000)))
    monkeypatch.setattr(sandbox.Sandbox.__init__, "__kwdefaults__", {"seconds": 2, "memory": 2**30})
    start = time.monotonic()
    done = command("-o", tmp_path / "x.gguf", model=model, text=chats)
    done.is_one_line("chat template was stopped: one chat took more than 2 s")
    assert time.monotonic() - start < 60


GIVEN: dict[str, Callable[[Any], Any]] = {
    "plain": lambda tokenizer: {},
    "asking": lambda tokenizer: {"add_generation_prompt": True},
}


@pytest.mark.parametrize("case", GIVEN)
def test_a_real_template_gives_what_transformers_gives(small: Path, case: str) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{% generation %}<{{ m.role }}>{{ m.content | trim }}"
        "{{ m | tojson }}{% endgeneration %}{% if loop.last %}{% break %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}{{ tools }}"
    )
    reader = of_checkpoint(small, template)
    tokenizer = load_tokenizer(small)
    asking = case == "asking"
    wanted = tokenizer.apply_chat_template(
        CHAT, chat_template=template, tokenize=False, add_generation_prompt=asking
    )
    assert reader.render(CHAT, None, "", asking=asking) == wanted
