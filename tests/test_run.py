"""The written file at work: llama-cli, llama-server, llama-cpp-python, and unpatched llama.cpp."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_logits import logits
from programs import post, running_server

from mone_export import runtime
from mone_export.pipeline import export

pytestmark = [pytest.mark.slow, pytest.mark.upstream]

PROMPT = "def read_file(path):"
TOKENS = list(range(300, 364))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module", params=["f32", "bf16", "q8_0", "q4_k_m"])
def novice_file(request: pytest.FixtureRequest, folder: Path, text: Path) -> Path:
    outfile = folder / f"{request.param}.gguf"
    options: dict[str, Any] = {"files": [text], "n_row": 16, "seq_len": 256, "stats": folder / "stats"}
    export("demo", ratio=0.5, outfile=outfile, outtype=request.param, **options)
    return outfile


@pytest.fixture(scope="module")
def ordinary_file(folder: Path, text: Path) -> Path:
    outfile = folder / "ordinary.gguf"
    export("demo", ratio=0, outfile=outfile, outtype="f32", files=[text], n_row=16, seq_len=256)
    return outfile


@pytest.fixture
def server(novice_file: Path) -> Iterator[str]:
    with running_server(runtime.path(), "-m", novice_file, "-c", 512) as found:
        yield found.url


def tool(name: str) -> Path:
    return runtime.path() / name


def run(*command: object) -> subprocess.CompletedProcess[str]:
    arguments = [str(part) for part in command]
    return subprocess.run(arguments, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)


def test_llama_cli_answers(novice_file: Path) -> None:
    result = run(
        tool("llama-cli"), "-m", novice_file, "-p", PROMPT, "-n", 24, "--temp", 0, "-st", "--simple-io"
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(result.stdout) > len(PROMPT)


def test_llama_completion_generates(novice_file: Path) -> None:
    result = run(
        tool("llama-completion"),
        "-m",
        novice_file,
        "-p",
        PROMPT,
        "-n",
        24,
        "--temp",
        0,
        "-no-cnv",
        "--simple-io",
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(result.stdout.split(PROMPT, 1)[1].strip()) > 10


def test_llama_server_completes_and_chats(server: str) -> None:
    completion = post(f"{server}/completion", {"prompt": PROMPT, "n_predict": 24, "temperature": 0})
    assert completion["tokens_predicted"] > 0
    assert completion["content"].strip()
    messages = [{"role": "user", "content": "What does open() do?"}]
    chat = post(f"{server}/v1/chat/completions", {"messages": messages, "max_tokens": 24, "temperature": 0})
    assert chat["choices"][0]["message"]["content"].strip()


def test_llama_cpp_python_generates(novice_file: Path) -> None:
    import llama_cpp

    llama = llama_cpp.Llama(str(novice_file), n_ctx=512, n_threads=2, verbose=False)
    text = llama(PROMPT, max_tokens=24, temperature=0)["choices"][0]["text"]
    assert text.strip()
    values = logits(novice_file, TOKENS, n_batch=len(TOKENS))
    assert values.shape[0] == len(TOKENS)
    assert np.isfinite(values).all()


def test_unpatched_llama_cpp_refuses_the_file(novice_file: Path, stock_libraries: Path) -> None:
    with pytest.raises(RuntimeError, match="tensor 'blk.0.ffn_(gate|down|up)_exps.weight' has wrong shape"):
        logits(novice_file, TOKENS, n_batch=1, libraries=stock_libraries)


def test_an_ordinary_file_gives_equal_logits_patched_and_unpatched(
    ordinary_file: Path, stock_libraries: Path
) -> None:
    for n_batch in (1, len(TOKENS)):
        patched = logits(ordinary_file, TOKENS, n_batch=n_batch)
        stock = logits(ordinary_file, TOKENS, n_batch=n_batch, libraries=stock_libraries)
        np.testing.assert_array_equal(patched, stock)
