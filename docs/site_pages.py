"""Brings pages from outside of docs/ into the site, and keeps links right wherever a page lies."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parent.parent
# of the repository -> of the site
BROUGHT = {
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
    "bench/ROOFLINE.md": "ROOFLINE.md",
    "examples/README.md": "EXAMPLES.md",
}
_HOME = {"README.md": "index.md"}  # both are where a stranger begins
_LINK = re.compile(r"\[([^]\[]*)\]\(([^)\s:#]+)(#[^)\s]*)?\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages that people expect at the root of a repository, or beside what they are of."""
    from mkdocs.structure.files import File

    for path, page in BROUGHT.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Make the links of the repository those of the site.

    A link to a file that is no page, as of code, becomes its words: the site has no such file. A
    link whose words are the path itself gets the page's heading: a site has no file names.
    """
    place = {site: path for path, site in BROUGHT.items()}.get(
        page.file.src_uri, f"docs/{page.file.src_uri}"
    )

    def rewritten(found: re.Match[str]) -> str:
        words, target, anchor = found[1], found[2], found[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
        if not (ROOT / path).exists():
            return found[0]  # code that looks like a link, or a mistake that mkdocs names
        in_site = {**BROUGHT, **_HOME}.get(path, path.removeprefix("docs/"))
        if not files.get_file_from_path(in_site):
            return words
        if words == target:
            words = (ROOT / path).read_text().partition("\n")[0].removeprefix("# ")
        return f"[{words}]({in_site}{anchor})"

    return _LINK.sub(rewritten, markdown)
