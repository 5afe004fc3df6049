"""The page and the card of a pruned file: every number is the record's, and nothing is asked for."""

import hashlib
import json
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from command import Command, names

from mone_export import cli_eval
from mone_export.paths import FIGURES
from mone_export.pipeline import export
from mone_export.publishing.page import render
from mone_export.publishing.record import load_record
from mone_export.publishing.shown import FORMS, at
from mone_export.terminal import as_size

pytestmark = pytest.mark.slow  # a whole command each

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_EMPTY = ("meta", "link", "br", "img")  # tags that nothing ends
_OWN = (
    r"(?!(?:update\.googleapis|clients\d\.google|accounts\.google)\.com)"  # what the browser asks its maker
)
_NAMES = re.compile(r"SHA-256|4-grams|99(\.9)?%")  # digits that are names, not measurements


class Page(HTMLParser):
    """What a page shows: the values with their places, and all other text outside of figures and commands."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.values: list[tuple[str, str, str]] = []
        self.rest: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self._inside: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [found["id"] or ""] if "id" in found else []
        self.links += [found[key] or "" for key in ("src", "href", "xlink:href", "action") if key in found]
        if tag not in _EMPTY:
            self._inside.append((tag, found))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _EMPTY:
            self._inside.pop()

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        last = self._inside[-1][1] if self._inside else {}
        skipped = {"style", "svg", "pre", "title"}
        if "data-at" in last:
            self.values.append((last["data-at"] or "", last["data-form"] or "", data))
        elif "data-name" not in last and not skipped & {tag for tag, _ in self._inside}:
            self.rest.append(data)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo at half of its experts, its page and its card."""
    folder = tmp_path_factory.mktemp("published")
    export(
        "demo",
        ratio=0.5,
        outfile=folder / "half.gguf",
        n_row=8,
        report=folder / "half.html",
        card=folder / "card",
        command="mone-export demo --ratio 0.5 <&> 'quoted'",
    )
    return folder


def differences(page: Page, record: Any) -> list[Any]:
    """Return what a page shows otherwise than the record has it."""
    wrong: list[Any] = []
    for place, form, text in page.values:
        if form == "key":
            outer, _, last = place.rpartition("/")
            wrong += [] if text in at(record, outer) and text == last.replace("~1", "/") else [place]
        elif text.strip() != FORMS[form](at(record, place)).strip():
            wrong.append((place, text, at(record, place)))
    return wrong


def test_every_number_of_the_page_is_the_records(published: Path) -> None:
    page = Page((published / "half.html").read_text(encoding="utf-8"))
    record = json.loads((published / "half.json").read_text(encoding="utf-8"))
    assert len(page.values) > 80
    assert not differences(page, record)
    assert not [text for text in page.rest if re.search(r"\d", _NAMES.sub("", text))]
    record["export"]["size"] += 10**7  # the check can fail
    assert differences(page, record)


def test_the_record_is_what_the_file_is(published: Path) -> None:
    record = load_record(published / "half.json")
    size = (published / "half.gguf").stat().st_size
    assert record["export"]["size"] == record["file"]["size"] == size
    by_layer = {layer["layer"]: layer["n_by_fate"] for layer in record["export"]["layers"]}
    assert by_layer == {layer["layer"]: layer["fates"] for layer in record["file"]["layers"]}
    for layer in record["export"]["layers"]:
        assert sum(layer["use"]) == pytest.approx(1) == pytest.approx(sum(layer["use_by_fate"].values()))


def test_the_page_asks_for_nothing_and_is_small(published: Path) -> None:
    file = published / "half.html"
    page = Page(file.read_text(encoding="utf-8"))
    assert file.stat().st_size < 1e6
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    assert "<script" not in file.read_text(encoding="utf-8")


def test_what_others_wrote_is_text(published: Path) -> None:
    record = load_record(published / "half.json")
    record["export"]["remarks"] = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>"]
    record["file"]["file"] = '"><b>.gguf'
    record["export"]["model"]["name"] = "<i>"
    text = render(record)
    assert not re.search(r"<script|<img|<b>|<i>", text)
    assert "&lt;script&gt;" in text


def test_the_same_export_gives_the_same_page(published: Path) -> None:
    record = load_record(published / "half.json")
    assert render(record) == (published / "half.html").read_text(encoding="utf-8")


def test_figures_are_files_too(published: Path) -> None:
    for name in ("fates", "scores", "use", "slots"):
        assert (published / f"half-{name}.svg").read_text(encoding="utf-8").startswith("<?xml")
        assert (published / f"half-{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [1000, 500])
def test_a_browser_finds_no_fault_and_asks_nobody(published: Path, width: int, tmp_path: Path) -> None:
    dom, complaints, asked = browsed(published / "half.html", width, tmp_path)
    assert "<h1>half.gguf</h1>" in dom
    assert not complaints and not asked


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_would_find_faults_and_requests(tmp_path: Path) -> None:
    (page := tmp_path / "bad.html").write_text("<img src='http://127.0.0.1:9/x'><script>no()</script>")
    _, complaints, asked = browsed(page, 500, tmp_path)
    assert complaints and asked == {"http://127.0.0.1:9/x"}


def browsed(page: Path, width: int, tmp_path: Path) -> tuple[str, str, set[str]]:
    """Return what a browser makes of a page: its DOM, what it complains of, whom it asks."""
    assert CHROMIUM is not None
    log = tmp_path / "net.json"
    quiet = (
        *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
        "--disable-features=NetworkTimeServiceQuerying",
    )
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync", *quiet),
            *(f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", "--enable-logging=stderr"),
            *(f"--window-size={width},900", "--virtual-time-budget=2000", "--dump-dom"),
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    complaints = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    asked = set(re.findall(rf'"url":"(https?://{_OWN}[^"]+)"', log.read_text(encoding="utf-8")))
    return done.stdout, complaints, asked


def test_the_card_is_valid_and_complete(published: Path) -> None:
    from huggingface_hub import ModelCard

    folder = published / "card"
    assert names(folder) == [
        *("README.md", "SHA256SUMS", "fates.png", "fates.svg", "report.json", "selection.json")
    ]
    text = (folder / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text, ignore_metadata_errors=False)
    assert card.data.to_dict() == {
        "library_name": "llama.cpp",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "moe", "pruned", "mone_export"],
    }
    for line in (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        wanted, name = line.split("  ")
        file = published / name if name.endswith(".gguf") else folder / name
        assert hashlib.sha256(file.read_bytes()).hexdigest() == wanted, name


def test_the_cards_selection_is_the_plans(command: Command, tmp_path: Path) -> None:
    out, plan, card = (tmp_path / name for name in ("out.gguf", "plan.json", "card"))
    command("-o", out, "--novice", "mean", "--plan-out", plan, "--card", card).is_fine()
    chosen = json.loads(plan.read_text(encoding="utf-8"))["layers"]
    selection = json.loads((card / "selection.json").read_text(encoding="utf-8"))["layers"]
    assert selection == {
        layer: {"whole": own["kept"], "constant": own["pruned"]} for layer, own in chosen.items()
    }
    text = (card / "README.md").read_text(encoding="utf-8")
    assert f"- {sum(len(own['pruned']) for own in chosen.values())}: a constant vector" in text
    assert f"{as_size(out.stat().st_size)}, in place of" in text


def test_what_mone_eval_finds_joins_page_and_card(
    published: Path, demo_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(published, tmp_path / "own")
    page, card, found = folder / "half.html", folder / "card", folder / "found.json"
    options = ["--chunks", "2", "-n", "0", "--no-speed", "-q", "-o", str(found)]
    places = ["--report", str(page), "--card", str(card)]
    assert cli_eval.main([str(folder / "half.gguf"), "--against", str(demo_gguf), *options, *places]) == 0
    said = capsys.readouterr().out
    record = load_record(page.with_suffix(".json"))
    assert record["evaluation"] == json.loads(found.read_text(encoding="utf-8"))
    assert record["evaluation"] == load_record(card / "report.json")["evaluation"]
    assert record["export"] == load_record(published / "half.json")["export"]
    shown = Page(page.read_text(encoding="utf-8"))
    assert not differences(shown, record)
    assert not [text for text in shown.rest if re.search(r"\d", _NAMES.sub("", text))]
    for text in record["evaluation"]["files"][0]["texts"]:
        value = FORMS["measured"](text["kl_mean"])
        assert f"| {text['name']} | {text['n_token']:,} | {value} |" in (card / "README.md").read_text(
            encoding="utf-8"
        )
        assert value in said and value.startswith(f"{text['kl_mean']['value']:.4f}"[:5])

    other = bytearray((folder / "half.gguf").read_bytes())
    other[-1] ^= 1  # of the same name and size
    (folder / "half.gguf").write_bytes(other)
    assert cli_eval.main([str(folder / "half.gguf"), *options, "--overwrite", *places]) == 1
    assert "half.html is of another file than" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("how", "fate"), [(("--stock",), r"\d+ channels"), (("--method", "drop"), "gone")], ids=["stock", "drop"]
)
def test_an_ordinary_file_says_that_any_llama_cpp_runs_it(
    how: tuple[str, ...], fate: str, command: Command, tmp_path: Path
) -> None:
    out, page = tmp_path / "out.gguf", tmp_path / "out.html"
    command("-o", out, *how, "--report", page).is_fine()
    text = page.read_text(encoding="utf-8")
    assert "mone-llama" not in text and "llama-cli -m out.gguf" in text
    assert re.search(f"<span data-name>{fate}</span>", text)


def test_names_with_dots_and_strange_names(command: Command, tmp_path: Path) -> None:
    out, page, card = tmp_path / "a$(x)|b.gguf", tmp_path / "Qwen2.5.html", tmp_path / "card"
    command("-o", out, "--novice", "mean", "--report", page, "--card", card).is_fine()
    figures = {f"Qwen2.5-{name}.{kind}" for name in FIGURES for kind in ("svg", "png")}
    assert {name for name in names(tmp_path) if name.endswith(("svg", "png"))} == figures
    text = (card / "README.md").read_text(encoding="utf-8")
    assert "# a$(x)\\|b.gguf" in text
    (program,) = [line for line in text.splitlines() if line.startswith("python -c")]
    assert shlex.split(program)[2] == (
        "from llama_cpp import Llama; print(Llama(\"a$(x)|b.gguf\")('Once', max_tokens=32))"
    )


def test_a_card_says_nothing_of_the_machine(command: Command, tmp_path: Path, text: Path) -> None:
    card, rare = tmp_path / "card", tmp_path / "rare text.txt"
    rare.write_bytes(text.read_bytes()[:9000])
    command("-o", tmp_path / "a.gguf", "--novice", "mean", "--card", card, "--protect", f"{rare}=1").is_fine()
    told = (card / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in told and str(text.parent) not in told
    assert "--protect 'rare text.txt=1'" in told and "tokens of calibration.txt" in told


def test_no_scores_are_shown_that_did_not_decide(command: Command, tmp_path: Path) -> None:
    page = tmp_path / "whole.html"
    command("-o", tmp_path / "whole.gguf", "--ratio", "0", "--report", page, text="").is_fine()
    assert not any(layer["scores"] for layer in load_record(page.with_suffix(".json"))["export"]["layers"])
    assert "How much each expert is needed" not in page.read_text(encoding="utf-8")
    assert not (tmp_path / "whole-scores.svg").exists()


def test_an_evaluation_alone_makes_a_card_of_what_is_known(
    published: Path, demo_gguf: Path, tmp_path: Path
) -> None:
    options = ["--chunks", "2", "-n", "0", "--no-speed", "-q", "--card", str(tmp_path / "card")]
    assert cli_eval.main([str(published / "half.gguf"), "--against", str(demo_gguf), *options]) == 0
    text = (tmp_path / "card" / "README.md").read_text(encoding="utf-8")
    assert "–, " not in text and "fates.png" not in text and "selection.json" not in text
    assert "| half.gguf | " in text and "a constant vector" in text


def test_a_strangers_files_stay(command: Command, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("mine", encoding="utf-8")
    command("-o", tmp_path / "a.gguf", "--report", tmp_path / "page.html").is_one_line(
        "is no file of mone-export"
    )
    command("-o", tmp_path / "a.gguf", "--report", tmp_path / "page.txt").is_one_line(
        "name a page, such as page.html"
    )
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "README.md").write_text("mine", encoding="utf-8")
    command("-o", tmp_path / "a.gguf", "--card", tmp_path / "own").is_one_line(
        "has a README.md that is not ours"
    )
    (tmp_path / "data.json").write_text("{}", encoding="utf-8")
    command("-o", tmp_path / "a.gguf", "--report", tmp_path / "data.html").is_one_line("data.json exists and")
    (tmp_path / "x-fates.svg").write_text("mine", encoding="utf-8")
    command("-o", tmp_path / "a.gguf", "--report", tmp_path / "x.html").is_one_line(
        "x-fates.svg exists, --rep"
    )
    (tmp_path / "sums").mkdir()
    (tmp_path / "sums" / "SHA256SUMS").write_text("mine", encoding="utf-8")
    command("-o", tmp_path / "a.gguf", "--card", tmp_path / "sums").is_one_line("SHA256SUMS that is not ours")
    assert names(tmp_path) == ["data.json", "own", "page.html", "sums", "x-fates.svg"]
