"""Dropout by a hash of each element's position: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

_UINT32 = 0xFFFFFFFF


def dropout(
    input: Tensor, output: Tensor, before: int, between: int, threshold: int, first: int
) -> None:
    """Copy the elements that are kept to `output`, which may be `input`; zeros for the others.

    Args:
        input: floating, contiguous.
        output: like `input`.
        before: word of the key that goes into the hash with the position.
        between: word of the key that goes into it half-way.
        threshold: an element is kept if its hash is this or more; below 2³².
        first: position of the first element.
    """
    positions = torch.arange(first, first + input.numel(), device=input.device)
    kept = hashes(positions, before, between) >= threshold
    output.copy_(torch.where(kept.view(input.shape), input, 0.0))


def hashes(positions: Tensor, before: int, between: int) -> Tensor:
    """32 random bits for each position, int64; positions count modulo 2³²."""
    # "lowbias32" in int64, of which the low 32 bits are kept: its products stay below 2^63
    x = (positions & _UINT32) ^ before
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _UINT32
    x = x ^ (x >> 15) ^ between
    x = (x * 0x846CA68B) & _UINT32
    return x ^ (x >> 16)
