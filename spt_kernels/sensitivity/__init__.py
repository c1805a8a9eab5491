"""How sensitive a task is to each parameter: a model and batches become a `Sensitivity`."""

from .account import Share, account_of
from .measure import find_head, measure_sensitivity
from .scores import Sensitivity
from .synthetic import skewed_sensitivity, uncalled_weights

__all__ = [
    "Sensitivity",
    "Share",
    "account_of",
    "find_head",
    "measure_sensitivity",
    "skewed_sensitivity",
    "uncalled_weights",
]
