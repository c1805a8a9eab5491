"""The ranges of output features that a LoRA or an Adapter is on, as views of what it works with."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

from torch import Tensor

# Per range: output features, rows of its own, part of the bottleneck
Ranges = tuple[tuple[slice, slice, slice], ...]


def ranges_of(rank: int, rows: tuple[tuple[int, int], ...]) -> Ranges:
    """Where half-open ranges of output features lie in what is stacked for all of them."""
    found, first = [], 0
    for n, (start, stop) in enumerate(rows):
        last = first + stop - start
        found.append((slice(start, stop), slice(first, last), slice(n * rank, (n + 1) * rank)))
        first = last
    return tuple(found)


class RangeGroup(NamedTuple):
    """Ranges of one width, evenly apart, as those of q, k, v: one batched product does for all.

    Attributes:
        n_ranges: how many.
        width: output features of each.
        step: features from the start of one to that of the next.
        first: where the first starts.
        own: their rows in what is stacked.
        part: theirs of the bottleneck.
    """

    n_ranges: int
    width: int
    step: int
    first: int
    own: slice
    part: slice

    @property
    def span(self) -> tuple[int, int, int, int]:
        """As the ops of a low-rank update take it."""
        return self.n_ranges, self.width, self.step, self.first

    def of_outputs(self, matrix: Tensor) -> Tensor:
        """`[tokens, out]` as `[ranges, tokens, width]`, a view."""
        row, column = matrix.stride()
        shape = (self.n_ranges, matrix.shape[0], self.width)
        offset = matrix.storage_offset() + self.first * column
        return matrix.as_strided(shape, (self.step * column, row, column), offset)

    def of_bottleneck(self, inner: Tensor) -> Tensor:
        """`[tokens, ranges · rank]` as `[ranges, tokens, rank]`, a view."""
        row, column = inner.stride()
        rank = (self.part.stop - self.part.start) // self.n_ranges
        shape = (self.n_ranges, inner.shape[0], rank)
        offset = inner.storage_offset() + self.part.start * column
        return inner.as_strided(shape, (rank * column, row, column), offset)

    def of_outputs_alone(self, matrix: Tensor) -> Tensor:
        """`[tokens, out]` as `[tokens, width]`, a view, of a group of one range."""
        if self.width == matrix.shape[1]:
            return matrix
        return matrix[:, self.first : self.first + self.width]

    def of_rows(self, stacked: Tensor) -> Tensor:
        """`[rows of all ranges, rank]` as `[ranges, width, rank]`, a view."""
        row, column = stacked.stride()
        shape = (self.n_ranges, self.width, stacked.shape[1])
        offset = stacked.storage_offset() + self.own.start * row
        return stacked.as_strided(shape, (self.width * row, row, column), offset)


def groups_of(ranges: Ranges) -> tuple[RangeGroup, ...]:
    """The ranges as one group where they are one, else each for itself."""
    starts = [features.start for features, _, _ in ranges]
    widths = {own.stop - own.start for _, own, _ in ranges}
    steps = {later - earlier for earlier, later in itertools.pairwise(starts)}
    if len(widths) == 1 and len(steps) <= 1:
        return (_grouped(ranges, *steps),)
    return tuple(_grouped((one,)) for one in ranges)


@functools.lru_cache
def groups_on(rank: int, rows: tuple[tuple[int, int], ...]) -> tuple[RangeGroup, ...]:
    """`groups_of` what `ranges_of` gives, which is the same in every step."""
    return groups_of(ranges_of(rank, rows))


def _grouped(ranges: Ranges, step: int = 0) -> RangeGroup:
    (features, own, part), (_, last_own, last_part) = ranges[0], ranges[-1]
    all_own, all_parts = slice(own.start, last_own.stop), slice(part.start, last_part.stop)
    width = own.stop - own.start
    return RangeGroup(len(ranges), width, step, features.start, all_own, all_parts)
