"""The optimizer of a tuned model, and the groups of what it trains."""

from .groups import param_groups
from .sparse_adamw import SparseAdamW

__all__ = ["SparseAdamW", "param_groups"]
