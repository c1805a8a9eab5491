"""A model and a `Plan` become a tuned model."""

from .frozen_base import FrozenBase, unwatch_state_dicts
from .tuning import Tuning, apply, apply_to_known, replace_module

__all__ = [
    "FrozenBase",
    "Tuning",
    "apply",
    "apply_to_known",
    "replace_module",
    "unwatch_state_dicts",
]
