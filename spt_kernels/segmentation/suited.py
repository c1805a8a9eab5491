"""Which methods can tune a model that labels pixels."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ..methods.method import METHODS, Entry, entry_of

# PEFT wraps a model, which then is no Setr; NOAH's search goes by classes of images; an MLP head
# replaces a linear one
_OF_IMAGES = ("peft-", "noah", "mlp-")

SUITED: Mapping[str, Entry] = MappingProxyType(
    {name: entry for name, entry in METHODS.items() if not name.startswith(_OF_IMAGES)}
)


def check_suited(name: str) -> None:
    """Refuse a method that is for images as wholes.

    Raises:
        ValueError: it is, or there is none of that name.
    """
    if name.startswith(_OF_IMAGES):
        raise ValueError(
            f"method: {name!r} is for classification alone; expected one of {', '.join(SUITED)}"
        )
    entry_of(name, SUITED)
