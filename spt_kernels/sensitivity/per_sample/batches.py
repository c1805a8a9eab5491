"""Reading an exact number of samples from whatever yields batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .losses import samples_of

_PATIENCE = 256


class NoSamples(ValueError):
    """There is nothing to measure on."""


@dataclass(frozen=True)
class Batch:
    """Some samples, once drawn on the device of the measurement."""

    index: int
    input: Any
    target: Any
    size: int

    def on(self, device: torch.device) -> Batch:
        """The same samples, moved."""
        return Batch(self.index, _moved(self.input, device), _moved(self.target, device), self.size)

    def keep(self, samples: list[int]) -> Batch:
        """Those with these numbers as a batch of their own."""

        def rows(value: Any) -> Any:
            is_batched = isinstance(value, Tensor) and value.ndim > 0
            is_batched = is_batched and value.shape[0] == self.size
            return value[torch.tensor(samples, device=value.device)] if is_batched else value

        input, target = pytree.tree_map(rows, (self.input, self.target))
        return Batch(self.index, input, target, len(samples))

    def samples(self, start: int, stop: int) -> Batch:
        """Some of the samples as a batch of their own."""
        return Batch(
            self.index,
            samples_of(self.input, self.size, start, stop),
            samples_of(self.target, self.size, start, stop),
            stop - start,
        )


def two_samples(batch: Batch) -> Batch:
    """The first two samples of a batch, or the only one twice."""
    if batch.size >= 2:
        return batch.samples(0, 2)

    def twice(value: Any) -> Any:
        return torch.cat([value, value]) if isinstance(value, Tensor) else value

    input, target = pytree.tree_map(twice, (batch.input, batch.target))
    return Batch(batch.index, input, target, 2)


class Samples:
    """Yields batches of `wanted` samples in all, or of all there are; the last one is cut.

    A sample that has no label counts as none: it is left out, and another one drawn in its place,
    first of all what was cut off. No batch is drawn beyond the last one needed.

    Args:
        batches: of `(input, target)`.
        wanted: how many samples.
        device: where to move them.
        labelled: which samples of a target have a label, None for all; given `(target, size)`.

    Raises:
        TypeError: `batches` cannot be iterated.
        NoSamples: while iterating: there is no batch, or no sample has a label.
        ValueError: likewise: one is not a pair of an input and a target whose tensors have one row
            per sample.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        wanted: int,
        device: torch.device,
        labelled: Callable[[Any, int], list[int] | None],
    ) -> None:
        try:
            self._batches = enumerate(batches)
        except TypeError as error:
            raise TypeError(
                f"batches: expected an iterable of (input, target), got {type(batches).__name__}"
            ) from error
        self.wanted = wanted
        self._remaining = wanted
        self._device = device
        self._labelled = labelled
        self._n_unlabelled = 0
        self._has_yielded = False
        self._put_back: Batch | None = None
        self._cut_off: Batch | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    @property
    def patience(self) -> int:
        """After how many samples none of which counts it may be an endless stream of them."""
        return max(self.wanted, _PATIENCE)

    def __next__(self) -> Batch:
        if self._put_back is not None:
            batch, self._put_back = self._put_back, None
            return batch
        while self._remaining:
            drawn, self._cut_off = self._cut_off, None
            if drawn is None:
                is_in_vain = not self._has_yielded and self._n_unlabelled >= self.patience
                index, item = (None, None) if is_in_vain else next(self._batches, (None, None))
                if index is None:
                    break
                drawn = self._labelled_part(index, item)
            if drawn is not None:
                if drawn.size > self._remaining:
                    self._cut_off = drawn.samples(self._remaining, drawn.size)
                    drawn = drawn.samples(0, self._remaining)
                self._remaining -= drawn.size
                self._has_yielded = True
                return drawn.on(self._device)
        if not self._has_yielded:
            if self._n_unlabelled:
                raise NoSamples(
                    f"target: none of {self._n_unlabelled} samples has a label: all that they hold "
                    "is the loss function's ignore_index"
                )
            raise NoSamples("batches: expected at least one batch of samples, got none")
        raise StopIteration

    def put_back(self, batch: Batch) -> None:
        """Let this batch, which was drawn last, come again."""
        self._put_back = batch

    def give_back(self, n: int) -> None:
        """Let so many samples be drawn besides, as some of those drawn count as none."""
        self._remaining += n

    def _labelled_part(self, index: int, item: Any) -> Batch | None:
        input, target = _pair(item, index)
        size = _size(input, target, index)
        labelled = self._labelled(target, size)
        batch = Batch(index, input, target, size)
        if labelled is not None:
            self._n_unlabelled += size - len(labelled)
            if not labelled:
                return None
            batch = batch.keep(labelled)
        return batch


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
    if size > 1 and not sizes["target"] and _length(target) == size:
        # the loss of one sample would be given all of them, and might spread its output over them
        raise ValueError(
            f"target: expected tensors with a row for each sample in batch {index}, got "
            f"{type(target).__name__} of {size}"
        )
    for place, found in sizes.items():
        for other in found:
            if other != size:
                raise ValueError(
                    f"{place}: expected {size} rows in batch {index}, one for each sample of the "
                    f"input, got {'a scalar' if other is None else other}"
                )
    return size


def _length(value: Any) -> int | None:
    """Of a list or an array of numpy; a tuple may be anything."""
    is_one = hasattr(value, "__len__") and not isinstance(value, (str, tuple, Mapping))
    return len(value) if is_one else None


def _moved(tree: Any, device: torch.device) -> Any:
    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        moved = value.detach().to(device)
        return moved.clone() if moved.is_inference() else moved  # or no backward could keep it

    return pytree.tree_map(move, tree)
