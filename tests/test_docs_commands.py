"""Every command of the README and of the pages in docs/ is run, or has its reason in `NOT_RUN`.

The blocks of a page run in order in one folder. The models and the text that they name are not here: small
ones stand in for them under their names. Text is cut (`SMALL_TEXT`, `CUT`), and servers get a free port.
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from itertools import islice
from pathlib import Path
from shutil import copy, copytree
from typing import Any, NamedTuple

import pytest
from command import SMALL_TEXT
from hub_server import HubServer, hub_server
from programs import post, run, running_server
from tiny import save_small

from mone_export import cli, runtime
from mone_export.calibration.documents import builtin_documents

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"sh", "python", "diff", "text", "json", "yaml"}
HUB_ID = "allenai/OLMoE-1B-7B-0125"
GGUFS = ("OLMoE-1B-7B-Q4_K_M.gguf", "model-Q4_K_M.gguf")
CUT = {"llama-perplexity": "-c 64 --chunks 2", "mone-eval": "--chunks 2"}
SERVERS = ("llama-server", "ggml-rpc-server")

# what is not run, by a pattern of its beginning, and why; `mone-export` lines are still read by its parser
NOT_RUN = {
    r"\. \.venv/bin/activate$": "the Python that runs the tests is the one that is meant",
    r"make \w": "installs and compiles; `make -n` knows the target",
    r"mone-llama build": "compiles for minutes; a stand-in says what it was told to build",
    r"apt install ": "needs root and the network",
    r"pip install ": "needs the network; the extra that is named exists, or tests/test_wheel.py runs it",
    r"pytest ": "the tests run it; it is collected",
    r"python tools/": "measures or trains for hours, or rewrites files of the checkout; the file exists",
    r"torchrun ": "takes as many processes as there are GPUs; tests/test_work.py runs it",
}


class Block(NamedTuple):
    """A fenced block of a page."""

    line: int
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page in order."""
    found: list[Block] = []
    inside = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            inside = not inside
            if inside:
                found.append(Block(number, line.removeprefix("```"), ""))
        elif inside:
            found[-1] = found[-1]._replace(text=f"{found[-1].text}{line}\n")
    assert not inside, f"{page.name}: a block does not end"
    return found


def commands(page: Path) -> list[str]:
    """Return the commands of a page in order, each as one line without its comment."""
    text = "".join(block.text for block in blocks(page) if block.language == "sh")
    lines = (re.sub(r"(^|\s+)# .*", "", line).strip() for line in text.replace("\\\n", " ").splitlines())
    return [line for line in lines if line]


def scripts() -> dict[str, Callable[[Sequence[str]], int]]:
    """Return the package's commands by name."""
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    parts = {name: home.split(":") for name, home in named.items()}
    return {name: getattr(import_module(module), function) for name, (module, function) in parts.items()}


def reason(line: str) -> str | None:
    """Say why a command is not run."""
    return next((why for pattern, why in NOT_RUN.items() if re.match(pattern, line)), None)


WITH_COMMANDS = [page for page in PAGES if commands(page)]
BY_NAME = {"argvalues": WITH_COMMANDS, "ids": [page.stem for page in WITH_COMMANDS]}


def test_blocks_say_what_they_hold() -> None:
    """So that no command hides in a block without a language, or of another one."""
    wrong = [
        f"{page.name}:{block.line}"
        for page in PAGES
        for block in blocks(page)
        if block.language not in LANGUAGES
        or (
            block.language == "text"
            and re.search(r"^\$?\s*(mone-|python |pip |make |llama-|\$\()", block.text, re.M)
        )
    ]
    assert not wrong


@pytest.mark.parametrize("page", **BY_NAME)
def test_the_parser_takes_them(page: Path) -> None:
    """Run or not: what `mone-export` is asked for on a page are options that it has."""
    for line in commands(page):
        words = shlex.split(line)
        if words[0] == "mone-export":
            cli.parse(words[1:])
        elif words[0] == "torchrun":
            cli.parse(words[words.index("mone_export") + 1 :])


def test_the_help_texts_examples_parse() -> None:
    examples = re.findall(r"^  mone-export (.*?)(?:   .*)?$", cli.make_parser().epilog or "", re.M)
    assert len(examples) == 5
    for example in examples:
        cli.parse(shlex.split(example))


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What the compiler is asked for, which is not there; one entry of backend and targets a call."""
    asked: list[str] = []

    def build(backend: runtime.Backend, options: Sequence[str], **more: Any) -> runtime.Build:
        asked.append(" ".join((backend, *(more["targets"] or ()))))
        return runtime.Build(tmp_path, backend, more["patched"], "", (), tuple(options), "any")

    monkeypatch.setattr(runtime, "build", build)
    monkeypatch.setattr(runtime, "install_python_binding", lambda *_, **__: None)
    return asked


@pytest.mark.parametrize("page", **BY_NAME)
def test_what_is_not_run_exists(page: Path, builds: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line in filter(reason, commands(page)):
        words = shlex.split(line)
        if words[0] == "make":
            assert subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True).returncode == 0
        elif words[:2] == ["mone-llama", "build"]:
            assert scripts()["mone-llama"](words[1:]) == 0
            named = [words[i + 1] for i, word in enumerate(words) if word in ("--backend", "--target")]
            assert builds[-1].split()[-len(named) :] == named or not named, line
        elif words[0] == "pip":
            named = re.findall(r"\[(.*)\]", line)
            # an extra, or what `make wheel` made
            assert set(named[0].split(",")) <= extras.keys() if named else words[2:] == ["dist/*.whl"], line
        elif words[0] in ("python", "pytest"):
            files = [word for word in words if word.endswith(".py")]
            assert all((ROOT / name).is_file() for name in files), line


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A Hub that has the model whose id the pages name."""
    with hub_server() as server:
        server.add(HUB_ID, save_small(tmp_path_factory.mktemp("hub") / "model"))
        yield server


@pytest.fixture(scope="module")
def stand_ins(small: Path, text: Path, demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the pages name and do not make."""
    folder = tmp_path_factory.mktemp("stand-ins")
    copytree(small, folder / "my-model")
    copy(text, folder / "my-text.txt")
    run(runtime.path() / "llama-quantize", demo_gguf, folder / GGUFS[0], "Q4_K_M")
    held_out = islice(builtin_documents("held-out"), 8)
    (folder / "held-out.txt").write_text("\n\n".join(each.text for each in held_out), encoding="utf-8")
    for name in GGUFS[1:]:
        copy(folder / GGUFS[0], folder / name)
    return folder


@pytest.fixture
def place(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a page is tried, with its commands in `PATH`."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, main in scripts().items():
        file = bin_folder / name
        file.write_text(
            f'#!/bin/sh\nexec {sys.executable} -c "import sys; from {main.__module__} import main; '
            'sys.exit(main())" "$@"\n'
        )
        file.chmod(0o755)
    path = (bin_folder, runtime.path(), Path(sys.executable).parent, os.environ["PATH"])
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, path)))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = tmp_path / "page"
    copytree(stand_ins, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.slow
@pytest.mark.upstream
@pytest.mark.parametrize(
    "page", [page for page in WITH_COMMANDS if page.stem != "evaluation"], ids=lambda page: page.stem
)
@pytest.mark.by_day(1)
def test_they_run(page: Path, place: Path, hub: HubServer, tmp_path: Path) -> None:
    for line in commands(page):
        words = shlex.split(line)
        if reason(line):
            continue
        if words[0] in scripts() and "$" not in line:
            run_ours(words, hub.environment(tmp_path / "home"))
        elif server := re.match(rf"(?:\$\(mone-llama path\)/)?({'|'.join(SERVERS)}) (.*)", line):
            with running_server(runtime.path(), *shlex.split(server[2])) as running:
                assert post(f"{running.url}/completion", {"prompt": "Once", "n_predict": 4})["content"]
        else:
            shortened = f"{line} {CUT.get(words[0], '')}"
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", shortened],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"


OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
OURS = (
    ("mone-export", "--help-all"),
    ("mone-eval", "--help"),
    ("mone-inspect", "--help"),
    ("mone-llama", "build", "--help"),
    ("mone-stats", "merge", "--help"),
)
THEIRS = (
    "llama-server",
    "llama-cli",
    "llama-completion",
    "llama-perplexity",
    "llama-imatrix",
    "llama-gguf-split",
)
FILES = (
    "tools/pages/readme_tables.py",
    *(f"tools/trust/{path.name}" for path in sorted((ROOT / "tools" / "trust").glob("*.py"))),
    "tests/conftest.py",
    "tests/parallel_clients.py",
    "tools/patches/check_cuda.py",
    "tools/patches/llamacpp.py",
    "tools/release/lock.py",
)
ELSEWHERE = {"--nproc-per-node"}  # torchrun's


@pytest.mark.upstream
def test_options_named_in_passing_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """In code within a sentence: options of our commands, of llama.cpp's programs, or of the tools here."""
    for name, *arguments in OURS:
        with pytest.raises(SystemExit):
            scripts()[name](arguments)
    helps = [capsys.readouterr().out]
    helps += [run(runtime.path() / name, "--help") for name in THEIRS]
    helps += [(ROOT / name).read_text(encoding="utf-8") for name in FILES]
    known = {*ELSEWHERE, *OPTION.findall("\n".join(helps))}
    named = {
        (page.name, option)
        for page in PAGES
        for span in re.findall(
            r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        )
        for option in OPTION.findall(span)
    }
    assert len(named) > 100
    assert not [(page, option) for page, option in named if option not in known]


@pytest.mark.slow
@pytest.mark.upstream
def test_the_example_runs(place: Path) -> None:
    """Its cells in order, as in a notebook; and what it is there to show."""
    names: dict[str, Any] = {}
    for block in blocks(ROOT / "docs" / "example.md"):
        exec(compile("\n" * block.line + block.text, "example.md", "exec"), names)
    divergence = names["divergence"]
    assert 0 < divergence["thin.gguf"] < divergence["constants.gguf"] < 0.1


def test_every_python_block_is_run() -> None:
    """Those of python.md by tests/test_python_api.py, evaluation.md's by tests/test_evaluation_cli.py."""
    having = {page.stem for page in PAGES for block in blocks(page) if block.language == "python"}
    assert having == {"evaluation", "example", "python"}


def run_ours(words: Sequence[str], hub: dict[str, str]) -> None:
    """Run a command of the package, in this process unless it asks the Hub; what it writes must be there."""
    name, *arguments = words
    if name == "mone-export" and not {"--chunks", "--restore-check"} & set(arguments):
        arguments += SMALL_TEXT
    if HUB_ID in arguments:
        done = subprocess.run([name, *arguments], env=os.environ | hub, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr[-2000:]}"
    else:
        assert scripts()[name](arguments) == 0, shlex.join(words)
    if "-o" in arguments:
        out = Path(arguments[arguments.index("-o") + 1])
        assert list(out.glob("*.gguf")) if out.is_dir() else out.is_file(), shlex.join(words)
