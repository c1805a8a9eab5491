"""What the backward computes again, so that the forward need not keep it."""

from .recompute import Recomputation, recompute

__all__ = ["Recomputation", "recompute"]
