"""The write of deltas in C++."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import DTYPE_NUMBERS, check, check_target
from .module import module


def write_delta(
    targets: Sequence[Tensor],
    indices: Sequence[Tensor],
    originals: Sequence[Tensor],
    deltas: Sequence[Tensor] | None,
) -> None:
    """See `spt_kernels.ops.write_delta.write_delta`; targets are mutated.

    Raises:
        ValueError: a layout, dtype or length does not fit, or a position is out of range. Nothing
            has been written then.
    """
    for i, (target, index, original) in enumerate(zip(targets, indices, originals, strict=True)):
        check_target(i, target, index, original, index.numel())
    for i, (index, delta) in enumerate(zip(indices, deltas or (), strict=deltas is not None)):
        check(f"deltas[{i}]", delta, (torch.float32,), index.numel())
    module().write_delta(
        [t.data_ptr() for t in targets],
        [DTYPE_NUMBERS[t.dtype] for t in targets],
        [t.numel() for t in targets],
        [t.data_ptr() for t in indices],
        [t.data_ptr() for t in originals],
        [t.data_ptr() for t in deltas or ()],
        [t.numel() for t in indices],
        torch.get_num_threads(),
    )
