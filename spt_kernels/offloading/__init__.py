"""Frozen weights and optimizer state on the host, on the device only while they are used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..files.first_use import names_on_first_use

if TYPE_CHECKING:
    from .offloaded_adamw import OffloadedAdamW as OffloadedAdamW
    from .offloading import Offload as Offload
    from .offloading import blocks_on_host as blocks_on_host
    from .offloading import brought_back as brought_back
    from .offloading import is_streamed as is_streamed
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
    "is_streamed": "offloading",
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
    "is_streamed",
    "offload",
    "why_not_offloaded",
]

__getattr__ = names_on_first_use(__name__, _HOME)
