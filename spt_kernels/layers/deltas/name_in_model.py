"""What a tuned layer is called in messages: its name in the model, as far as it has one."""

from __future__ import annotations

from typing import Any


def name_in_model(layer: Any) -> str:
    """The name that `apply` tuned it under; empty for a layer that was tuned by hand."""
    name: str = vars(layer).get("_spt_name", "")
    return name


def told_as(layer: Any) -> str:
    """Its name, or else its type."""
    return name_in_model(layer) or type(layer).__name__
