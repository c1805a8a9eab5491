"""What launchers ask of the card they launch on; its answers cost no wait."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton

from ..gradient_ways.capability import CAPABILITIES as CAPABILITIES
from ..gradient_ways.capability import capability_of as capability_of
from ..gradient_ways.capability import nearest as nearest

# Whether kernels run in Triton's interpreter, on the CPU: settled when they were defined
INTERPRETED: bool = triton.knobs.runtime.interpret


@dataclass(frozen=True)
class Launch:
    """How a program walks the tokens, and how many share a multiprocessor.

    Attributes:
        tokens: read at a time.
        num_warps: per program.
        num_stages: depth of software pipelining.
        programs_per_sm: that a multiprocessor holds at once.
        least_tokens: of a split, which begins with an empty pipeline and ends with a partial sum.
        most_splits: of a sum over all tokens.
    """

    tokens: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    least_tokens: int = 512
    most_splits: int = 32

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told of it."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def cdiv(number: int, by: int) -> int:
    """A quotient rounded up; Triton's own takes the host as long as half a launch."""
    return -(-number // by)


@functools.lru_cache
def multiprocessors_of(device: torch.device) -> int:
    """How many multiprocessors the card has."""
    if device.type != "cuda":
        return 8  # the interpreter's: any number will do
    return torch.cuda.get_device_properties(device).multi_processor_count
