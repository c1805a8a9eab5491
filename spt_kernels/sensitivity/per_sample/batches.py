"""Reading an exact number of samples from whatever yields batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .losses import samples_of


@dataclass(frozen=True)
class Batch:
    """Samples on the device of the measurement."""

    index: int
    input: Any
    target: Any
    size: int

    def samples(self, start: int, stop: int) -> Batch:
        """Some of the samples as a batch of their own."""
        return Batch(
            self.index,
            samples_of(self.input, self.size, start, stop),
            samples_of(self.target, self.size, start, stop),
            stop - start,
        )


def take_samples(batches: Iterable[Any], num_samples: int, device: torch.device) -> Iterator[Batch]:
    """Yield batches of `num_samples` samples in all, or of all there are; the last one is cut.

    No batch is drawn beyond the last one needed.

    Raises:
        TypeError: `batches` cannot be iterated.
        ValueError: there is no batch, or one is not a pair of an input and a target whose tensors
            have one row per sample.
    """
    try:
        iterator = iter(batches)
    except TypeError as error:
        raise TypeError(
            f"batches: expected an iterable of (input, target), got {type(batches).__name__}"
        ) from error
    remaining = num_samples
    for index, item in enumerate(iterator):
        input, target = _pair(item, index)
        size = _size(input, target, index)
        batch = Batch(index, _moved(input, device), _moved(target, device), size)
        if size > remaining:
            batch = batch.samples(0, remaining)
        remaining -= batch.size
        yield batch
        if remaining == 0:
            return
    if remaining == num_samples:
        raise ValueError("batches: expected at least one batch of samples, got none")


def _pair(item: Any, index: int) -> tuple[Any, Any]:
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return item[0], item[1]
    got = f"{len(item)} things" if isinstance(item, (tuple, list)) else type(item).__name__
    raise ValueError(f"batches: expected pairs of (input, target), got {got} as batch {index}")


def _size(input: Any, target: Any, index: int) -> int:
    sizes = {
        place: [
            leaf.shape[0] if leaf.ndim else None
            for leaf in pytree.tree_leaves(tree)
            if isinstance(leaf, Tensor)
        ]
        for place, tree in (("input", input), ("target", target))
    }
    if not sizes["input"]:
        raise ValueError(f"batches: expected a tensor as input, got none in batch {index}")
    size = sizes["input"][0]
    if not size:
        raise ValueError(f"batches: batch {index} has no samples")
    for place, found in sizes.items():
        for other in found:
            if other != size:
                raise ValueError(
                    f"{place}: expected {size} rows in batch {index}, one for each sample of the "
                    f"input, got {'a scalar' if other is None else other}"
                )
    return size


def _moved(tree: Any, device: torch.device) -> Any:
    def move(value: Any) -> Any:
        return value.detach().to(device) if isinstance(value, Tensor) else value

    return pytree.tree_map(move, tree)
