"""What the backward computes again, so that the forward need not keep it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value  # the next access is an ordinary one
    return value
