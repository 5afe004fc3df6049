"""llama-server with a pruned file, as others talk to it: the openai client, a browser where it has a page."""

import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, OPTIONS
from programs import PROMPT, Server, post, running_server

from mone_export import runtime
from mone_export.pipeline import export

pytestmark = [pytest.mark.slow, pytest.mark.upstream]

GREEDY: dict[str, Any] = {"max_tokens": 24, "temperature": 0, "seed": 0}


@pytest.fixture(scope="module")
def server(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """llama-server with the demo, half of whose experts' bytes are gone."""
    file = tmp_path_factory.mktemp("server") / "half.gguf"
    export("demo", ratio=0.5, outfile=file, outtype="f32", files=[text], n_row=8, seq_len=128)
    with running_server(runtime.path(), "-m", file, "-c", 512, "-np", 1, "--alias", "half") as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    openai = pytest.importorskip("openai")
    own = openai.DefaultHttpxClient(trust_env=False)  # no proxy between this machine and itself
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=own) as found:
        yield found


def test_completions_are_the_servers_own(client: Any, server: Server) -> None:
    asked = {"prompt": PROMPT, "n_predict": GREEDY["max_tokens"], "temperature": 0}
    expected = post(f"{server.url}/completion", asked)["content"]
    found = client.completions.create(model="half", prompt=PROMPT, **GREEDY)
    assert expected and found.choices[0].text == expected
    assert found.usage.completion_tokens == GREEDY["max_tokens"]


def test_chat_streams_what_it_says_at_once(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["half"]
    asked = {"model": "half", "messages": [{"role": "user", "content": "def main():"}], **GREEDY}
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.message.content and whole.finish_reason in ("stop", "length")
    parts = client.chat.completions.create(**asked, stream=True)
    assert (
        "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        == whole.message.content
    )


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_web_page_has_a_place_to_type(server: Server, tmp_path: Path) -> None:
    """Not run with the usual build, which leaves the page out: making it needs npm or a download."""
    try:
        with urllib.request.urlopen(f"{server.url}/") as answer:
            assert answer.headers["Content-Type"].startswith("text/html")
    except urllib.error.HTTPError as error:
        assert error.code == 404
        pytest.skip("this llama-server was built without its web page")
    command = [str(CHROMIUM), *OPTIONS, f"--user-data-dir={tmp_path}", "--virtual-time-budget=10000"]
    shown = subprocess.run([*command, "--dump-dom", f"{server.url}/"], capture_output=True, text=True)
    assert "<textarea" in shown.stdout and "llama.cpp" in shown.stdout
