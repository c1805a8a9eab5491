"""docs/APPROXIMATE.md has the figures that are committed."""

from __future__ import annotations

from bench.approximation import report


def test_the_page_is_what_the_results_say() -> None:
    assert report.write(only_check=True) == 0
    assert all(len(table().splitlines()) > 4 for table in report.TABLES.values())
