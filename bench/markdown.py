"""Rows of text as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column flush left, all others flush right."""
    lines = [titles, ("---",) + ("---:",) * (len(titles) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
