"""The compute capability by which a card is taken for one of those that kernels are made for."""

from __future__ import annotations

from collections.abc import Iterable

import torch

# Ten times that of the cards that launch configurations are made for: A100, RTX 3090, H100 and H200
CAPABILITIES = (80, 86, 90)


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
