"""The site has every page once, links lead somewhere, the reference names what is public."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import spt_kernels as spt
from tests.docs.pages import EXAMPLES, PAGES, ROOT, prose_of


@pytest.fixture(scope="module")
def site_pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "site_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation_once(site_pages: ModuleType) -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    shown = [
        page for part in config["nav"] for row in part.values() for p in row for page in p.values()
    ]
    assert sorted(shown) == sorted([*(p.name for p in PAGES), *site_pages.BROUGHT.values()])
    assert all((ROOT / path).exists() for path in site_pages.BROUGHT)


@pytest.mark.parametrize("page", [*PAGES, EXAMPLES], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#\s]+)", prose_of(page)):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


class Place:
    """A page, and a site of those that are named."""

    def __init__(self, page: str, *pages: str) -> None:
        self.file, self.src_uri, self.pages = self, page, pages

    def get_file_from_path(self, path: str) -> bool:
        return path in self.pages


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("CHANGELOG.md", "[it](docs/HEAD.md#the-head)", "[it](HEAD.md#the-head)"),
        ("HEAD.md", "[it](../CONTRIBUTING.md)", "[it](CONTRIBUTING.md)"),
        ("CHANGELOG.md", "[docs/index.md](docs/index.md)", "[Quick start](index.md)"),
        ("ROOFLINE.md", "![it](../docs/bench/growth.png)", "![it](bench/growth.png)"),
        ("EXAMPLES.md", "[it](../README.md)", "[it](index.md)"),
        ("HEAD.md", "[`mkdocs.yml`](../mkdocs.yml)", "`mkdocs.yml`"),  # no page of the site
        ("HEAD.md", "methods[name](model)", "methods[name](model)"),  # no link at all
        ("HEAD.md", "[it](https://x.org/a.md)", "[it](https://x.org/a.md)"),
    ],
)
def test_links_of_the_repository_become_those_of_the_site(
    site_pages: ModuleType, page: str, link: str, expected: str
) -> None:
    pages = ("HEAD.md", "CONTRIBUTING.md", "index.md", "bench/growth.png")
    here = Place(page, *pages)
    assert site_pages.on_page_markdown(link, page=here, config=None, files=here) == expected


def test_the_reference_names_all_that_is_public() -> None:
    shown = set(re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "API.md").read_text(), re.M))
    public = {
        f"spt_kernels.{name}"
        for name in spt.__all__
        if name not in ("__version__", "ops", "methods")
    }
    assert public | {f"spt_kernels.ops.{name}" for name in spt.ops.__all__} <= shown
    if importlib.util.find_spec("peft") is None:
        shown = {name for name in shown if not name.startswith("spt_kernels.peft.")}
    for name in shown:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
