"""Writing base + delta into weights, tensor by tensor: the specification."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def write_delta(
    targets: Sequence[Tensor],
    indices: Sequence[Tensor],
    originals: Sequence[Tensor],
    deltas: Sequence[Tensor] | None,
) -> None:
    """See `spt_kernels.ops.write_delta.write_delta`."""
    for m, (target, index, original) in enumerate(zip(targets, indices, originals, strict=True)):
        values = original if deltas is None else (original.float() + deltas[m]).to(target.dtype)
        target.view(-1)[index.long()] = values
