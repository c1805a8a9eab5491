"""Which of the fonts of this machine have letters that the one of our pictures lacks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable

_NO_LETTERS = "Last Resort"  # a font that has a box for each


def fonts_with(letters: Iterable[str]) -> list[str]:
    """Names of as few as have most of these letters, each time the same ones."""
    missing = {ord(letter) for letter in letters}
    found: list[str] = []
    while missing:
        has = {name: len(missing & known) for name, known in _letters_of_fonts().items()}
        best = max(
            has, key=lambda name: (has[name], "Sans" in name, "Mono" not in name, name), default=""
        )
        if not has.get(best):
            break
        found.append(best)
        missing -= _letters_of_fonts()[best]
    return found


@functools.cache
def _letters_of_fonts() -> dict[str, frozenset[int]]:
    """Name of a font -> what its regular face has; a second of work where there are many."""
    from matplotlib import font_manager

    found: dict[str, frozenset[int]] = {}
    for font in font_manager.fontManager.ttflist:
        is_regular = font.style == "normal" and font.weight in (400, "normal", "regular")
        if is_regular and font.name not in found and not font.name.startswith(_NO_LETTERS):
            with contextlib.suppress(OSError, RuntimeError):  # gone since, or none that can be read
                found[font.name] = frozenset(font_manager.get_font(font.fname).get_charmap())
    return found
