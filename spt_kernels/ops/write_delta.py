"""Delta write: base + delta into the trained positions of many weights at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..reference import write_delta as reference
from .dtypes import FLOATS
from .launching import mark_mutated, register

MAX_NUMEL = 2**31  # flat positions are int32

torch.library.define(
    "spt::write_delta",
    "(Tensor(a!)[] targets, Tensor[] indices, Tensor[] originals, Tensor[]? deltas) -> ()",
)


def write_delta(
    targets: Sequence[Tensor],
    indices: Sequence[Tensor],
    originals: Sequence[Tensor],
    deltas: Sequence[Tensor] | None,
) -> None:
    """Write `target.view(-1)[index] = original + delta` for every tensor, one launch per device.

    The sum is taken in fp32 and rounded to nearest into the target's dtype. Without deltas the
    originals themselves are written: the base weights are back bit for bit.

    Args:
        targets: weights, mutated; fp32, bf16 or fp16, contiguous, at most 2³¹ elements.
        indices: int32 `[nnz]`, flat positions, unique and in range. This is not checked here: it
            would cost more than the write.
        originals: `[nnz]` in the target's dtype, the base values at `index`.
        deltas: fp32 `[nnz]`, or None to restore.

    Raises:
        ValueError: lengths, shapes, devices or memory layout do not fit.
        TypeError: a dtype does not fit.
    """
    columns = [list(targets), list(indices), list(originals)]
    columns += [] if deltas is None else [list(deltas)]
    for name, column in zip(("indices", "originals", "deltas"), columns[1:], strict=False):
        if len(column) != len(columns[0]):
            raise ValueError(f"{name} has {len(column)} items, expected {len(columns[0])}")
    for m, row in enumerate(zip(*columns, strict=True)):
        check_target(f"targets[{m}]", row[0], row[1], row[2])
        if deltas is not None:
            check_values(f"deltas[{m}]", row[3], torch.float32, row[1])
    with torch.no_grad():
        for device in dict.fromkeys(target.device for target in columns[0]):
            chosen = [m for m, target in enumerate(columns[0]) if target.device == device]
            picked = [[column[m] for m in chosen] for column in columns]
            torch.ops.spt.write_delta(*picked, *([None] if deltas is None else []))


def gather_original(target: Tensor, index: Tensor) -> Tensor:
    """The values of a weight at flat positions, as `write_delta` wants its originals: `[nnz]`.

    Args:
        target: as in `write_delta`.
        index: int32 `[nnz]`, flat positions in range.
    """
    check_layout("target", target)
    _check_index("index", index, target)
    return target.detach().view(-1).index_select(0, index)


def check_target(name: str, target: Tensor, index: Tensor, original: Tensor) -> None:
    """Refuse, by name, a target that cannot be written through this index from these originals."""
    check_layout(name, target)
    _check_index(f"the index of {name}", index, target)
    check_values(f"the original of {name}", original, target.dtype, index)


def check_values(name: str, values: Tensor, dtype: torch.dtype, index: Tensor) -> None:
    """Refuse, by name, values that are not `[nnz]`, contiguous, of this dtype, beside the index."""
    if values.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {values.dtype}")
    if values.shape != index.shape:
        raise ValueError(
            f"{name} must have the shape of its index, {tuple(index.shape)}, "
            f"got {tuple(values.shape)}"
        )
    if not values.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {values.stride()}")
    if values.device != index.device:
        raise ValueError(f"{name} must be on {index.device}, got {values.device}")


def check_layout(
    name: str, target: Tensor, advice: str = " (a channels-last weight needs .contiguous())"
) -> None:
    """Refuse, by name, a weight that no delta can be written into; `advice` is on its strides."""
    if target.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {target.dtype}")
    if not target.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, got shape {tuple(target.shape)} with strides "
            f"{target.stride()}{advice}"
        )
    if target.numel() > MAX_NUMEL:
        raise ValueError(
            f"{name} must have at most {MAX_NUMEL} elements, for positions are int32, "
            f"got {target.numel()}"
        )


def _check_index(name: str, index: Tensor, target: Tensor) -> None:
    if index.dtype != torch.int32:
        raise TypeError(f"{name} must be torch.int32, got {index.dtype}")
    if index.dim() != 1 or not index.is_contiguous():
        raise ValueError(f"{name} must be a contiguous vector, got shape {tuple(index.shape)}")
    if index.device != target.device:
        raise ValueError(f"{name} must be on {target.device}, got {index.device}")


# The kernels get what the schema lists, in its order.
def _cpu(targets: list[Tensor], *others: Any) -> None:
    backend = native if native.available() else reference
    backend.write_delta(targets, *others)
    mark_mutated(targets)


def _cuda(targets: list[Tensor], *others: Any) -> None:
    from ..kernels import write_delta as kernels

    with torch.cuda.device_of(targets[0]):  # Triton launches on the current device
        kernels.write_delta(targets, *others)
    mark_mutated(targets)


register("spt::write_delta", "cpu", _cpu)
register("spt::write_delta", "cuda", _cuda)
torch.library.register_fake("spt::write_delta", lambda *arguments: None)
