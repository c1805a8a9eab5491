"""docs/PICTURES.md shows every kind, with a light example."""

from __future__ import annotations

import re
from pathlib import Path

from spt_kernels.cli.plot import KINDS

DOCS = Path(__file__).parents[2] / "docs"


def test_every_kind_has_its_words_and_its_example() -> None:
    text = (DOCS / "PICTURES.md").read_text()
    shown = re.findall(r"!\[[^]]+\]\(plots/(\w+)\.png\)", text)
    assert sorted(shown) == sorted(KINDS)
    for kind in KINDS:
        assert f"`{kind}`" in text
        assert f"spt-kernels plot {kind} " in text
        assert (DOCS / "plots" / f"{kind}.png").stat().st_size < 60_000
    assert {path.stem for path in (DOCS / "plots").iterdir()} == set(KINDS)
