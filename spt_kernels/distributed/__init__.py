"""What the processes of a `torch.distributed` group tell each other; no stage of its own."""

from .processes import Processes
from .sum import sum_in_place

__all__ = ["Processes", "sum_in_place"]
