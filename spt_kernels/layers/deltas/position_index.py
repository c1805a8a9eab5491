"""The check of an index of trained positions, made where a layer is built or loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...model.quantized import is_quantized, logical_numel
from .row_major import layout_problem


@dataclass(frozen=True, eq=False)
class CheckedIndex:
    """Flat positions that `checked_index` has let through, int32 `[nnz]`, and for which target."""

    index: Tensor
    target: Tensor


def checked_index(
    name: str, index: Tensor | CheckedIndex, target_name: str, target: Tensor
) -> CheckedIndex:
    """A contiguous int32 copy of flat positions, if they are positions in `target`.

    Args:
        name: of the argument, for messages.
        index: int32 or int64 `[nnz]`, sorted, without duplicates, on the target's device; or what
            this function made of it for this target before.
        target_name: of the tensor that is indexed, for messages.
        target: floating tensor, contiguous or channels-last; or quantized.

    Raises:
        TypeError: the index is not an int32 or int64 tensor, or the target is not floating.
        ValueError: anything else is wrong with them.
    """
    if isinstance(index, CheckedIndex):
        if index.target is not target:
            raise ValueError(f"{name} was checked for another tensor than {target_name}")
        return index
    if not isinstance(index, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(index).__name__}")
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {index.dtype}")
    if index.dim() != 1:
        raise ValueError(f"{name} must be a vector, got shape {tuple(index.shape)}")
    if not is_quantized(target):
        if not target.is_floating_point():
            raise TypeError(f"{target_name} must be floating, got {target.dtype}")
        layout = layout_problem(target_name, target)
        if layout:
            raise ValueError(layout)
    if index.device != target.device:
        raise ValueError(
            f"{name} must be on {target.device} like {target_name}, got {index.device}"
        )
    if index.is_meta and index.numel():
        raise ValueError(
            f"{name} is on the meta device, which holds no positions: tune the layer elsewhere, "
            'then move it with .to("meta")'
        )
    problem = position_problem(index, logical_numel(target))
    if problem:
        raise ValueError(f"{name} {problem}")
    return CheckedIndex(index.to(torch.int32, copy=True).contiguous(), target)


def position_problem(index: Tensor, numel: int) -> str:
    """What is wrong with flat positions into `numel` elements; empty when nothing is."""
    if numel >= 2**31:
        return f"holds int32 positions, and the tensor has {numel} elements"
    if index.numel() == 0:
        return ""
    ascending = bool((index[1:] > index[:-1]).all())
    if ascending and int(index[0]) >= 0 and int(index[-1]) < numel:
        return ""
    low, high = index.aminmax()
    if int(low) < 0 or int(high) >= numel:
        return f"must lie in [0, {numel}), got {int(low)} to {int(high)}"
    steps = index[1:] - index[:-1]
    if bool((steps < 0).any()):
        return "must be sorted in ascending order"
    position = int(index[1:][steps == 0][0])
    return f"must not repeat a position, got {position} more than once"
