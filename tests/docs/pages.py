"""The pages of the documentation and what stands in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
README, EXAMPLES = ROOT / "README.md", ROOT / "examples" / "README.md"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the reason for which it is not to be run."""

    language: str
    text: str
    reason: str | None


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page, in their order."""
    found = re.findall(r"^```(\w*)([^\n]*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    titles = [re.search(r'title="([^"]+)"', words) for _, words, _ in found]
    return [
        Block(language, text, title and title[1])
        for (language, _, text), title in zip(found, titles, strict=True)
    ]


def prose_of(page: Path) -> str:
    """A page without its blocks and code."""
    return re.sub(r"`[^`]*`", "", _text_of(page))


def codes_of(page: Path) -> list[str]:
    """What is set as code within the sentences of a page."""
    return re.findall(r"`([^`]+)`", _text_of(page))


def _text_of(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
