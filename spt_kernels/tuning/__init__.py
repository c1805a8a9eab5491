"""A model and a `Plan` become a tuned model."""

from .tuning import Tuning, apply, replace_module
from .whole import is_coarse, train_whole

__all__ = ["Tuning", "apply", "is_coarse", "replace_module", "train_whole"]
