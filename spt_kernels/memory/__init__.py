"""What a step takes of memory, told without a card."""

from .estimate import DEVICES, DTYPES, MemoryEstimate
from .fit import LargestBatch, PeakByBatch, largest_batch
from .rehearsal import Rehearsal, estimate_memory

__all__ = [
    "DEVICES",
    "DTYPES",
    "LargestBatch",
    "MemoryEstimate",
    "PeakByBatch",
    "Rehearsal",
    "estimate_memory",
    "largest_batch",
]
