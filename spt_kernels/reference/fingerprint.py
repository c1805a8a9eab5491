"""A 128-bit hash of the bytes of tensors: the specification.

It is a sum over 64-bit words, so that any number of threads may share it and that it can be brought
up to date for a few changed words. Each word goes through steps that can be undone, with a key
of its own position added first: two tensors that differ in one word never have the same sum, and
others by a chance of 2⁻¹²⁸ or so. No secret is in it: it tells accidents, not forgeries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_STEP = 0x9E3779B97F4A7C15 - 2**64  # between the keys of neighbouring words, as int64
_FACTORS = (0x7FEB352A, 0x6C8E9CF6, 0x5851F42E)  # even, so that `_mixed` can be undone
_LAST_FACTOR = 0x7A1D1B36
_LOW = 0xFFFFFFFF  # int64 wraps around as an unsigned number would, but shifts its sign in
_CHUNK = 2**20  # words whose intermediate values are in memory at one time


def fingerprint(
    tensors: Sequence[Tensor], indices: Sequence[Tensor], originals: Sequence[Tensor]
) -> Tensor:
    """See `spt_kernels.ops.fingerprint.fingerprint`."""
    found = [_of_one(*row) for row in zip(tensors, indices, originals, strict=True)]
    return torch.stack(found) if found else torch.empty(0, 2, dtype=torch.int64, device="cpu")


def _of_one(tensor: Tensor, index: Tensor, original: Tensor) -> Tensor:
    if len(index):
        tensor = tensor.reshape(-1).index_put((index.long(),), original)
    data = tensor.reshape(-1).view(torch.uint8)
    words = F.pad(data, (0, -len(data) % 8)).view(torch.int64)  # little-endian
    total = words.new_zeros(2)
    for start in range(0, len(words), _CHUNK):
        x = words[start : start + _CHUNK]
        x = x + torch.arange(start + 1, start + len(x) + 1, device=x.device) * _STEP
        for factor in _FACTORS:
            x = _mixed(x, factor)
            x = (x << 32) | ((x >> 32) & _LOW)  # halves swapped
        total += torch.stack([x.sum(), _mixed(x, _LAST_FACTOR).sum()])
    return total


def _mixed(x: Tensor, factor: int) -> Tensor:
    return x ^ ((x & _LOW) * factor)
