"""A model and a `Plan` become a tuned model."""

from .frozen_base import FrozenBase, unwatch_state_dicts, watch_state_dicts
from .tuning import Tuning, apply, apply_to_known, check_fits, replace_module
from .whole import train_cast_heads, train_whole

__all__ = [
    "FrozenBase",
    "Tuning",
    "apply",
    "apply_to_known",
    "check_fits",
    "replace_module",
    "train_cast_heads",
    "train_whole",
    "unwatch_state_dicts",
    "watch_state_dicts",
]
