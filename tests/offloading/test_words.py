"""What is on the host, as a line of text says it."""

from __future__ import annotations

import pytest

from spt_kernels.offloading import OffloadWords


@pytest.mark.parametrize(
    ("text", "weights", "state"),
    [
        (None, "nothing", False),
        ("nothing", "nothing", False),
        ("frozen", "frozen", False),
        ("state", "nothing", True),
        ("forward-only, state", "forward-only", True),
        ("state,frozen", "frozen", True),
    ],
)
def test_lines(text: str | None, weights: str, state: bool) -> None:
    words = OffloadWords.parse(text)
    assert (words.weights, words.state) == (weights, state)
    assert bool(words) == (weights != "nothing" or state)


@pytest.mark.parametrize(
    "text",
    ["", "all", "frozen,forward-only", "state,state", "frozen;state", "nothing,state"],
)
def test_what_is_no_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"offload: expected frozen or forward-only.* got"):
        OffloadWords.parse(text)
