"""What is shipped beside the code agrees with it: the citation, the pinned environment, links."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import spt_kernels as spt

ROOT = Path(__file__).parent.parent


def plain(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is of Python 3.11")
def test_the_pinned_environment_has_all_that_tests_and_linters_want() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["cli"], *extras["test"], *extras["lint"]]
    names = {plain(re.split(r"[<>=\[ ;]", requirement)[0]) for requirement in wanted}
    text = (ROOT / "requirements" / "test.txt").read_text()
    pinned = {plain(name) for name in re.findall(r"^([\w.-]+)==", text, re.MULTILINE)}
    assert names - {"spt-kernels"} <= pinned, "run `make lock`"
    blocks = re.split(r"\n(?=\S)", text.split("\n", 2)[2])  # after the two lines of the heading
    for block in filter(None, map(str.strip, blocks)):
        assert "--hash=sha256:" in block, block.splitlines()[0]


def test_the_citation_and_the_changelog_are_of_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {spt.__version__}\n" in citation
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == spt.__version__


@pytest.mark.parametrize("name", ["SECURITY.md", "CONTRIBUTING.md"])
def test_links_point_somewhere(name: str) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / name).read_text()):
        assert (ROOT / target).exists(), f"{name} links to {target}"
