"""What launchers ask of the card they launch on; its answers cost no wait."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton

# Whether kernels run in Triton's interpreter, on the CPU: settled when they were defined
INTERPRETED: bool = triton.knobs.runtime.interpret

# Ten times the compute capability of the cards that launch configurations are made for: A100,
# RTX 3090, H100 and H200.
CAPABILITIES = (80, 86, 90)


@dataclass(frozen=True)
class Launch:
    """How a program walks the tokens, and how many share a multiprocessor.

    Attributes:
        tokens: read at a time.
        num_warps: per program.
        num_stages: depth of software pipelining.
        programs_per_sm: that a multiprocessor holds at once.
    """

    tokens: int
    num_warps: int
    num_stages: int
    programs_per_sm: int

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told of it."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def capability_of(device: torch.device) -> int:
    """The last of `CAPABILITIES` that the card has; the first for older ones and the CPU."""
    if device.type != "cuda":
        return CAPABILITIES[0]  # the interpreter runs there
    major, minor = torch.cuda.get_device_capability(device)
    if major == 12:
        return 86  # GeForce of the Blackwell generation: as little shared memory as a 3090
    return nearest(10 * major + minor, CAPABILITIES)


def nearest(capability: int, known: Iterable[int]) -> int:
    """The highest that is known and not above `capability`, else the lowest that is known."""
    numbers = sorted(known)
    return max((number for number in numbers if number <= capability), default=numbers[0])


def multiprocessors_of(device: torch.device) -> int:
    """How many multiprocessors the card has."""
    if device.type != "cuda":
        return 8  # the interpreter's: any number will do
    return torch.cuda.get_device_properties(device).multi_processor_count
