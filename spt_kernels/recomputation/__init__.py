"""What the backward computes again, so that the forward need not keep it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..files.first_use import names_on_first_use

if TYPE_CHECKING:
    from .by_words import blocks_by as blocks_by
    from .by_words import parts_of as parts_of
    from .by_words import recompute_by as recompute_by
    from .choice import Recomputation as Recomputation
    from .choice import recompute as recompute
    from .words import RecomputeWords as RecomputeWords

# a recipe names what is computed again, and is read without torch
_HOME = {
    "Recomputation": "choice",
    "RecomputeWords": "words",
    "blocks_by": "by_words",
    "parts_of": "by_words",
    "recompute": "choice",
    "recompute_by": "by_words",
}

__all__ = ["Recomputation", "RecomputeWords", "blocks_by", "parts_of", "recompute", "recompute_by"]

__getattr__ = names_on_first_use(__name__, _HOME)
