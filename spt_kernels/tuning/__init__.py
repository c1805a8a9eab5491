"""A model and a `Plan` become a tuned model."""

from .tuning import Tuning, apply, replace_module
from .whole import train_whole

__all__ = ["Tuning", "apply", "replace_module", "train_whole"]
