"""How sensitive a task is to each parameter: a model and batches become a `Sensitivity`."""

from .measure import measure_sensitivity
from .scores import Sensitivity
from .synthetic import skewed_sensitivity, uncalled_weights

__all__ = ["Sensitivity", "measure_sensitivity", "skewed_sensitivity", "uncalled_weights"]
