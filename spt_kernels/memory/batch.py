"""What a rehearsed step is given: the shape of an input, or of each tensor of a mapping."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model.call import check_batch, parted

# a shape, or tensors without values by name, as `model(**batch)` takes them
BatchForm = tuple[int, ...] | dict[str, Tensor]


def batch_form(
    batch_shape: Sequence[int] | Mapping[str, Tensor], loss_fn: Callable[..., Any] | None
) -> BatchForm:
    """The form that an argument of this name tells.

    Raises:
        TypeError: it is neither whole numbers nor a mapping to tensors.
        ValueError: a size below 1, or tensors that are no batch for `loss_fn`.
    """
    if isinstance(batch_shape, Mapping):
        batch = check_batch("batch_shape", batch_shape, loss_fn)
        return {name: torch.empty_like(t, device="meta") for name, t in batch.items()}
    try:
        shape = tuple(operator.index(size) for size in batch_shape)
    except TypeError:
        raise TypeError(
            "batch_shape must be a sequence of whole numbers, or a mapping to tensors, got "
            f"{batch_shape!r}"
        ) from None
    if not shape or min(shape) < 1:
        raise ValueError(f"batch_shape must hold sizes of at least 1, got {shape}")
    return shape


def shape_of(form: BatchForm) -> tuple[int, ...]:
    """Of the input, or of the first tensor of a mapping."""
    return tuple(next(iter(form.values())).shape) if isinstance(form, dict) else form


def input_of(
    form: BatchForm, loss_fn: Callable[..., Any] | None
) -> tuple[int, ...] | dict[str, Tensor]:
    """The shape of one input, or of a mapping what the model is given: a `Rehearsal` has either."""
    return parted(form, loss_fn)[0] if isinstance(form, dict) else form[1:]


def empty_batch(form: BatchForm, dtype: torch.dtype | None) -> Any:
    """A tensor, or a mapping to tensors, with arbitrary values; floats in `dtype` if it is given.

    On the CPU, where a mode for fakes is active as fakes.
    """
    if not isinstance(form, dict):
        return torch.empty(form, dtype=dtype)
    return {
        name: torch.empty(t.shape, dtype=dtype if dtype and t.is_floating_point() else t.dtype)
        for name, t in form.items()
    }
