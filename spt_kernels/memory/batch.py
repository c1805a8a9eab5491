"""What a rehearsed step is given: the shape of an input, or of each tensor of a mapping."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    return _sizes("batch_shape", batch_shape)


def _sizes(name: str, value: Iterable[int]) -> tuple[int, ...]:
    """The sizes that the argument of this name holds; errors are those of `batch_form`."""
    try:
        sizes = tuple(operator.index(size) for size in value)
    except TypeError:
        got = reprlib.repr(value)  # which may be a batch itself, with all its numbers
        raise TypeError(
            f"{name} must be a sequence of whole numbers, or a mapping to tensors, got {got}"
        ) from None
    if not sizes or min(sizes) < 1:
        raise ValueError(f"{name} must hold sizes of at least 1, got {sizes}")
    return sizes


class BatchesOf:
    """Batches of any size, of inputs of one shape, or of samples like those of a mapping.

    Args:
        image_shape: of one input, `(3, height, width)`; or a batch that is a mapping, as
            `estimate_memory` takes it, of however many samples.
        loss_fn: of the step.

    Raises:
        TypeError: it is neither whole numbers nor a mapping to tensors.
        ValueError: a size below 1, or tensors that are no batch for `loss_fn`.
    """

    def __init__(
        self, image_shape: Sequence[int] | Mapping[str, Tensor], loss_fn: Callable[..., Any] | None
    ) -> None:
        self._sample: tuple[int, ...] | dict[str, Tensor]
        if isinstance(image_shape, Mapping):
            self._sample = check_batch("image_shape", image_shape, loss_fn)
        else:
            self._sample = _sizes("image_shape", image_shape)
        self.input = input_of(self.of(1), loss_fn)

    def of(self, size: int) -> BatchForm:
        """The batch of so many."""
        if not isinstance(self._sample, dict):
            return (size, *self._sample)
        return {
            name: torch.empty((size, *t.shape[1:]), dtype=t.dtype, device="meta")
            for name, t in self._sample.items()
        }


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
