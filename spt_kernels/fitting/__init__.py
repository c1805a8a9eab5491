"""What makes a training step fit into a given memory."""

from .allocation import PlanWithin, allocate_within

__all__ = ["PlanWithin", "allocate_within"]
