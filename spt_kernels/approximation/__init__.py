"""Less memory for gradients that are approximate: opt-in, labelled, and undone by the same call.

Names load on first use, so that the command line can read `choice` without waiting for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {"Approximation": "choice", "approximate": "approximate", "parse_approximation": "choice"}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from .approximate import approximate as approximate
    from .choice import Approximation as Approximation
    from .choice import parse_approximation as parse_approximation


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value  # the next access is an ordinary one
    return value
