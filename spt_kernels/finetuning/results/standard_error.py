"""How far a mean over a few runs may be from that over many."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection


def standard_error(values: Collection[float]) -> float | None:
    """Of the mean: the standard deviation over the root of their number; `None` of fewer than 2."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
