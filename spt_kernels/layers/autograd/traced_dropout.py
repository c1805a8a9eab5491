"""Dropout in calls that a compiler fuses: its mask is made again from a few words."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.dropout import threshold_of

_SIGN = 2**31


def draw_words(x: Tensor) -> Tensor:
    """Random words, int32 `[tokens + features]`, from the generator of the device."""
    count = x.shape[:-1].numel() + x.shape[-1]
    return torch.randint(-_SIGN, _SIGN, (count,), dtype=torch.int32, device=x.device)


def dropped(x: Tensor, probability: float, words: Tensor | None) -> Tensor:
    """`x`, of which each element is zero with a probability; `x` itself without words.

    An element is settled by a hash of the words of its token and its feature, all of it in int32:
    what the partitioner of `torch.compile` makes again in a backward has no constants that other
    layers use, and no value four times as small as what it comes from.
    """
    if words is None:
        return x
    tokens, features = words.split((x.shape[:-1].numel(), x.shape[-1]))
    h = tokens.view(*x.shape[:-1], 1) ^ features
    # "lowbias32"; products wrap around
    h = (h ^ _shifted(h, 16)) * 0x7FEB352D
    h = (h ^ _shifted(h, 15)) * (0x846CA68B - 2**32)
    h = h ^ _shifted(h, 16)
    return x * (h >= threshold_of(probability) - _SIGN)


def _shifted(h: Tensor, bits: int) -> Tensor:
    return h >> bits & (1 << 32 - bits) - 1  # without the copies of the sign
