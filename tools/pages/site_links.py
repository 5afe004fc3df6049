"""What MkDocs does for the site besides: files from outside docs/, links that lead out of it, table pages.

The pages are read on GitHub, too, where a link may lead to any file of the repository. The site has no other
files: such a link becomes its text.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = {
    "patches.md": ROOT / "patches" / "README.md",
    "changelog.md": ROOT / "CHANGELOG.md",
    "site.css": Path(__file__).with_name("site.css"),
}
TABLE, TABLE_END = re.compile(r"<!-- table:\S+ -->"), re.compile(r"<!-- /table -->")
LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the files from outside docs/."""
    for uri, source in OUTSIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at the site's pages; those that lead to other files of the repository become text."""
    docs = Path(config["docs_dir"]).resolve()
    source = OUTSIDE.get(page.file.src_uri, docs / page.file.src_uri)
    if page.file.src_uri == "changelog.md":  # on GitHub a list may follow a line of text
        markdown = re.sub(r"(?m)^(\w.*)\n(?=- )", r"\1\n\n", markdown)
    pages = {file: uri for uri, file in OUTSIDE.items()}

    def led(match: re.Match[str]) -> str:
        text, link, anchor = match[1], match[2], match[3] or ""
        target = (source.parent / link).resolve()
        uri = pages.get(target) or (
            target.relative_to(docs).as_posix() if target.is_relative_to(docs) else ""
        )
        if uri:
            return f"[{text}]({os.path.relpath(uri, Path(page.file.src_uri).parent)}{anchor})"
        return text if target.exists() else match[0]

    if page.file.src_uri.startswith("tables/"):
        page.meta["hide"] = ["toc"]  # its room is the table's
    return TABLE_END.sub("\n</div>", TABLE.sub('<div class="numbers" markdown>\n', LINK.sub(led, markdown)))
