"""Sorted positions in a tensor as bytes: the gaps between them, seven bits to a byte.

A gap below 128 takes one byte, below 16,384 two. At most one gap in 16,384 elements can take three,
so `n` positions among `numel` elements never need more than `2 n + numel / 16384` bytes: at 0.4M of
ViT-B's 86M that is 2.02 bytes each at worst, wherever the positions lie. A gap counts the
elements *between* two positions, so that no bytes stand for an unsorted or repeated one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_MAX_BYTES = 5  # 35 bits of gap: more than the 31 that an index has
MAX_NUMEL = 2**31  # positions are int32 wherever they are used


def encode_positions(positions: Tensor) -> Tensor:
    """Encode sorted unique flat positions.

    Args:
        positions: `[nnz]` of any integer dtype, strictly increasing, none negative.

    Returns:
        uint8 `[n_bytes]`; the same positions give the same bytes.

    Raises:
        ValueError: the positions are unsorted, repeated, negative or too large for an index.
    """
    flat = positions.detach().cpu().numpy().astype(np.int64)
    gaps = np.diff(flat, prepend=-1) - 1
    if gaps.size and (gaps.min() < 0 or flat[-1] >= MAX_NUMEL):
        raise ValueError("positions must be sorted, unique and within 0..2**31-1")

    n_bytes = np.ones(gaps.shape, dtype=np.int64)
    for i in range(1, _MAX_BYTES):
        n_bytes += gaps >= 1 << (7 * i)
    starts = np.cumsum(n_bytes) - n_bytes
    encoded = np.zeros(int(n_bytes.sum()), dtype=np.uint8)
    for i in range(_MAX_BYTES):
        present = n_bytes > i
        more = (n_bytes[present] > i + 1).astype(np.uint8) << 7
        seven_bits = (gaps[present] >> (7 * i) & 127).astype(np.uint8)
        encoded[starts[present] + i] = seven_bits | more
    return torch.from_numpy(encoded)


def decode_positions(encoded: Tensor, count: int, numel: int) -> Tensor:
    """Decode what `encode_positions` wrote, with every check that a hostile file calls for.

    Args:
        encoded: uint8 `[n_bytes]`.
        count: how many positions there must be.
        numel: size of the tensor that they index.

    Returns:
        int64 `[count]`, strictly increasing, each in `0..numel-1`.

    Raises:
        ValueError: the bytes are not the encoding of exactly such positions.
    """
    if not 0 <= numel <= MAX_NUMEL:
        raise ValueError(f"expected a tensor of at most 2**31 elements, got {numel}")
    # a gap is below 2**35, so a sum of fewer than 2**28 of them cannot wrap around
    if not 0 <= count <= min(numel, 2**28 - 1):
        raise ValueError(f"{count} positions in a tensor of {numel} elements")
    data = encoded.numpy()
    ends = np.flatnonzero(data < 128)
    if len(ends) != count or (data.size and data[-1] >= 128):
        raise ValueError(f"expected {count} positions, got {len(ends)} or a cut one")
    n_bytes = np.diff(ends, prepend=-1)
    if count and n_bytes.max() > _MAX_BYTES:
        raise ValueError(f"a position takes {n_bytes.max()} bytes, expected at most {_MAX_BYTES}")
    if (data[ends[n_bytes > 1]] == 0).any():
        raise ValueError("a position takes more bytes than it needs")

    gaps = data[ends].astype(np.int64)  # the highest seven bits of each, then those below
    for i in range(1, n_bytes.max(initial=0)):
        longer = np.flatnonzero(n_bytes > i)
        gaps[longer] = gaps[longer] << 7 | (data[ends[longer] - i] & 127)
    positions = np.cumsum(gaps + 1) - 1
    if count and positions[-1] >= numel:
        raise ValueError(f"position {positions[-1]} is out of range for {numel} elements")
    return torch.from_numpy(positions)
