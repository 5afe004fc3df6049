"""The site of the pages: a strict build, links that lead somewhere, nothing from other sites, the search."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, visit

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "tools" / "pages" / "mkdocs.yml"
PAGES = [ROOT / "README.md", ROOT / "patches" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def build(config: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("material", reason="needs mkdocs-material")
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", config, "--site-dir", folder]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(CONFIG, folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_every_page_is_there(site: Path) -> None:
    pages = {file.relative_to(ROOT / "docs").with_suffix(".html") for file in (ROOT / "docs").rglob("*.md")}
    assert pages | {Path("patches.html"), Path("changelog.html")} <= {
        file.relative_to(site) for file in site.rglob("*.html")
    }


@pytest.mark.parametrize("wrong", ["[a](no_such_page.md)", "[a](#no-such-heading)", "![a](no_such.svg)"])
def test_link_that_leads_nowhere_is_an_error(wrong: str, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "mkdocs.yml").write_text(
        f"INHERIT: {CONFIG}\ndocs_dir: docs\nhooks: []\nextra_css: []\nnav: [index.md]\n"
    )
    (tmp_path / "docs" / "index.md").write_text("# Title\n\n[fine](#title)\n")
    assert build(tmp_path / "mkdocs.yml", tmp_path / "site").returncode == 0
    (tmp_path / "docs" / "index.md").write_text(f"# Title\n\n{wrong}\n")
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 1 and "no" in done.stderr, done.stderr


def test_pages_ask_nothing_of_other_sites(site: Path) -> None:
    """Links may lead elsewhere; what a browser loads by itself may not."""
    loaded = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*?\bsrc=\"?([^\s\">]+)|<link\b[^>]*?\bhref=\"?([^\s\">]+)"
    )
    found = [
        f"{file.relative_to(site)}: {''.join(match.groups(''))}"
        for file in site.rglob("*.html")
        for match in loaded.finditer(file.read_text(encoding="utf-8"))
    ]
    assert len(found) > 50
    assert not [each for each in found if "//" in each]
    styles = "".join(file.read_text(encoding="utf-8") for file in site.rglob("*.css"))
    assert not re.findall(r"url\(['\"]?(?:https?:)?//", styles)


def test_lists_are_lists(site: Path) -> None:
    """MkDocs wants an empty line before a list, GitHub does not."""
    for file in site.rglob("*.html"):
        paragraphs = re.findall(r"<p>(.*?)</p>", file.read_text(encoding="utf-8"), re.S)
        assert not [text for text in paragraphs if re.search(r"\n *(- |\d\. |\|)", text)], file


def headings(page: Path) -> Iterator[str]:
    """Yield the anchors that GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        yield re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_anchors_exist_on_github(page: Path) -> None:
    """Files are looked at by tests/test_house.py."""
    wrong = [
        f"{link}#{anchor}"
        for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text(encoding="utf-8"))
        if anchor not in headings((page.parent / link) if link else page)
    ]
    assert not wrong


def test_the_readme_is_read_in_five_minutes() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    seen = re.sub(r"<!--.*?-->|\]\([^)]*\)", " ", text)
    assert 800 < len(re.findall(r"\S*\w\S*", seen)) <= 1200


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_search_finds_pages_without_a_network(site: Path) -> None:
    found = visit(
        site,
        "index.html",
        "setTimeout(() => {"
        "  document.getElementById('__search').checked = true;"
        "  const input = document.querySelector('.md-search__input');"
        "  input.focus(); input.value = 'novice';"
        "  for (const kind of ['keyup', 'input']) input.dispatchEvent(new Event(kind, {bubbles: true}));"
        "}, 500);"
        "setInterval(() => {"
        "  const links = [...document.querySelectorAll('a.md-search-result__link')].map(each => each.href);"
        "  if (links.length) tell(links);"
        "}, 200);",
    )
    assert any("how_it_works.html" in link for link in found.told)
    assert len(found.loaded) > 3 and all(url.startswith("http://127.0.0.1:") for url in found.loaded)
    assert not found.console
