"""What a step takes of memory, told without a card."""

from .block_use import BlockUse
from .estimate import DEVICES, DTYPES, MemoryEstimate
from .fit import LargestBatch, PeakByBatch, largest_batch
from .made_up import made_up_plan, made_up_sensitivity
from .rehearsal import Rehearsal, estimate_memory
from .rows import Answer, estimate_methods
from .tunable import tunable_parts
from .work import Call, Work

__all__ = [
    "DEVICES",
    "DTYPES",
    "Answer",
    "BlockUse",
    "Call",
    "LargestBatch",
    "MemoryEstimate",
    "PeakByBatch",
    "Rehearsal",
    "Work",
    "estimate_memory",
    "estimate_methods",
    "largest_batch",
    "made_up_plan",
    "made_up_sensitivity",
    "tunable_parts",
]
