"""Top-τ in C++."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import DTYPE_NUMBERS, check
from .module import module


def top_tau(tensors: Sequence[Tensor], k: int, caps: Sequence[int]) -> list[Tensor]:
    """See `spt_kernels.ops.top_tau.top_tau`; tensors are contiguous, fp32 or bf16.

    Raises:
        ValueError: a score is NaN, infinite or negative, or the positive ones do not reach `k`.
    """
    return _select(tensors, k, caps)[0]


def top_tau_bytes_read(tensors: Sequence[Tensor], k: int, caps: Sequence[int]) -> int:
    """How many bytes of the scores `top_tau` reads: for tests and benches, which count passes."""
    return _select(tensors, k, caps)[1]


def _select(tensors: Sequence[Tensor], k: int, caps: Sequence[int]) -> tuple[list[Tensor], int]:
    if len(caps) != len(tensors):
        raise ValueError(f"caps has {len(caps)} items, expected {len(tensors)}, one per tensor")
    for m, tensor in enumerate(tensors):
        check(f"tensors[{m}]", tensor, (torch.float32, torch.bfloat16))
    selection = module().top_tau(
        [t.data_ptr() for t in tensors],
        [DTYPE_NUMBERS[t.dtype] for t in tensors],
        [t.numel() for t in tensors],
        list(caps),
        k,
        torch.get_num_threads(),
    )
    # wherever the default device is: C++ writes to these addresses
    positions = [  # [n] sorted
        torch.empty(n, dtype=torch.int64, device="cpu") for n in selection.counts()
    ]
    selection.write([p.data_ptr() for p in positions])
    return positions, selection.bytes_read()
