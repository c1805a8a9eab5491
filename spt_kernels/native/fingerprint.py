"""Fingerprints of tensors in C++."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import check
from .module import module


def fingerprint(
    tensors: Sequence[Tensor], indices: Sequence[Tensor], originals: Sequence[Tensor]
) -> Tensor:
    """See `spt_kernels.ops.fingerprint.fingerprint`; tensors are contiguous, of any dtype.

    Raises:
        ValueError: a layout, dtype or length does not fit, or a position is out of range.
    """
    for i, (tensor, index, original) in enumerate(zip(tensors, indices, originals, strict=True)):
        check(f"tensors[{i}]", tensor, (tensor.dtype,))
        check(f"indices[{i}]", index, (torch.int32,))
        check(f"originals[{i}]", original, (tensor.dtype,), index.numel())
    found = torch.empty(len(tensors), 2, dtype=torch.int64, device="cpu")
    module().fingerprint(
        [t.data_ptr() for t in tensors],
        [t.numel() for t in tensors],
        [t.element_size() for t in tensors],
        [t.data_ptr() for t in indices],
        [t.data_ptr() for t in originals],
        [t.numel() for t in indices],
        found.data_ptr(),
        torch.get_num_threads(),
    )
    return found
