"""Frozen weights and optimizer state on the host, on the device only while they are used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .offloaded_adamw import OffloadedAdamW as OffloadedAdamW
    from .offloading import Offload as Offload
    from .offloading import blocks_on_host as blocks_on_host
    from .offloading import brought_back as brought_back
    from .offloading import offload as offload
    from .offloading import why_not_offloaded as why_not_offloaded
    from .words import WHAT as WHAT
    from .words import OffloadWords as OffloadWords

# a recipe names what is offloaded, and is read without torch
_HOME = {
    "WHAT": "words",
    "Offload": "offloading",
    "OffloadWords": "words",
    "OffloadedAdamW": "offloaded_adamw",
    "blocks_on_host": "offloading",
    "brought_back": "offloading",
    "offload": "offloading",
    "why_not_offloaded": "offloading",
}

__all__ = [
    "WHAT",
    "Offload",
    "OffloadWords",
    "OffloadedAdamW",
    "blocks_on_host",
    "brought_back",
    "offload",
    "why_not_offloaded",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value  # the next access is an ordinary one
    return value
