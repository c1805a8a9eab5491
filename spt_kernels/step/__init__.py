"""A step of training: the eager one, and the same as CUDA graphs."""

from .captured_step import CapturedStep, capture_step
from .training_step import TrainingStep

__all__ = ["CapturedStep", "TrainingStep", "capture_step"]
