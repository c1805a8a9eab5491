"""The largest batch whose training step fits in a given memory, found by few estimates."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..plan import Plan
from .batch import BatchesOf
from .estimate import MemoryEstimate
from .rehearsal import Rehearsal

_FIRST_GUESS = 32
_GROWTH = 16  # no guess is more than so many times the largest batch seen: lines may bend


@dataclass(frozen=True)
class LargestBatch:
    """How many images a step may have.

    Attributes:
        batch: images; 0 where not even one fits.
        limit_bytes: what the accounted peak had to fit in, a reserve taken off.
        estimate: of a step of `batch` images, or where none fits, of the smallest step there is.
        beyond: of a step of one image more, which does not fit.
    """

    batch: int
    limit_bytes: int
    estimate: MemoryEstimate
    beyond: MemoryEstimate

    def __bool__(self) -> bool:
        return self.batch > 0


def largest_batch(
    model: nn.Module,
    image_shape: Sequence[int] | Mapping[str, Tensor],
    limit_bytes: int | float,
    plan: Plan | None = None,
    *,
    reserve_bytes: int | float = 0,
    **how: Any,
) -> LargestBatch:
    """Find the largest batch whose accounted peak is at most `limit_bytes - reserve_bytes`.

    `result.batch` fits and one image more does not; both were accounted for, not extrapolated.
    Where the peak is not monotone in the batch, a batch larger still may fit again.

    A card holds more than what is accounted: the CUDA context (0.3 to 0.6 GiB), what the allocator
    rounds up and cannot fit, and what kernels allocate within themselves. Keep a reserve for these,
    of 1 GiB if in doubt.

    Args:
        model: plain or tuned already; not changed.
        image_shape: shape of one input, `(3, height, width)`; or a batch as `model(**batch)` takes
            it, of however many samples, whose tensors tell what one more sample adds.
        limit_bytes: the card's memory; 24 GiB are `24 * 2**30`.
        plan: as for `estimate_memory`.
        reserve_bytes: of `limit_bytes`, what is kept free.
        how: all other arguments of `estimate_memory`, by name.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a limit below 1 byte, or what `estimate_memory` refuses.
    """
    for name, value in (("limit_bytes", limit_bytes), ("reserve_bytes", reserve_bytes)):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number of bytes, got {value!r}")
    if not reserve_bytes >= 0:
        raise ValueError(f"reserve_bytes must be at least 0, got {reserve_bytes}")
    if not 1 <= limit_bytes - reserve_bytes < float("inf"):
        raise ValueError(
            "limit_bytes must leave at least 1 byte beside reserve_bytes, "
            f"got {limit_bytes} and {reserve_bytes}"
        )
    return PeakByBatch(model, image_shape, plan, **how).largest(int(limit_bytes - reserve_bytes))


class PeakByBatch:
    """The estimates of one model and method by batch, each made once, when it is asked for.

    The arguments are those of `estimate_memory`, with the shape of one image for that of a batch,
    or a mapping of however many samples.
    """

    def __init__(
        self,
        model: nn.Module,
        image_shape: Sequence[int] | Mapping[str, Tensor],
        plan: Plan | None = None,
        **how: Any,
    ) -> None:
        self._batches = BatchesOf(image_shape, how.get("loss_fn"))
        self._rehearsal = Rehearsal(model, plan, image_shape=self._batches.input, **how)
        self._known: dict[int, MemoryEstimate] = {}

    def at(self, batch: int) -> MemoryEstimate:
        """The estimate for `batch` images."""
        batch = operator.index(batch)
        if batch not in self._known:
            self._known[batch] = self._rehearsal.at(self._batches.of(batch))
        return self._known[batch]

    def largest(self, limit_bytes: int) -> LargestBatch:
        """The largest batch whose peak is at most `limit_bytes`, and the proof that it is."""

        def peak_of(batch: int) -> int:
            return self.at(batch).peak_bytes

        seen = {batch: estimate.peak_bytes for batch, estimate in self._known.items()}
        low, high = last_within(peak_of, limit_bytes, seen)
        return LargestBatch(low, limit_bytes, self.at(low or high), self.at(high))


def last_within(
    peak_of: Callable[[int], int], limit: int, seen: Mapping[int, int]
) -> tuple[int, int]:
    """`last_below` for a model, by whose `smallest_batch` it ends."""
    return last_below(peak_of, limit, seen, lambda: smallest_batch(peak_of))


def smallest_batch(peak_of: Callable[[int], int]) -> int:
    """1, or 2 for a model that refuses one image alone, as a norm over the batch does.

    Raises:
        ValueError: it cannot take two either.
    """
    with contextlib.suppress(ValueError):
        peak_of(1)
        return 1
    peak_of(2)
    return 2


def last_below(
    peak_of: Callable[[int], int],
    limit: int,
    seen: Mapping[int, int],
    smallest: Callable[[], int] = lambda: 1,
) -> tuple[int, int]:
    """Find where a function that is nearly a bent line passes `limit`, by few evaluations.

    Args:
        peak_of: grows, by and large, with the batch.
        limit: what it may be at most.
        seen: values that are known already.
        smallest: the first batch that there is, asked for when none is known to fit.

    Returns:
        A batch that fits, or 0, and the next one, or the smallest one, which does not.
    """
    seen = dict(seen)
    low = max((batch for batch, peak in seen.items() if peak <= limit), default=0)
    high = min((batch for batch in seen if batch > low), default=None)
    widths: list[int] = []
    while high is None or high - low > 1:
        if high is None:
            guess = _outwards(seen, low, limit)
        elif low == 0:
            guess = smallest()
            if guess >= high:
                break
        else:
            widths.append(high - low)
            is_stuck = len(widths) > 2 and 2 * widths[-1] > widths[-3]
            guess = (low + high) // 2 if is_stuck else _between(seen, low, high, limit)
        seen[guess] = peak_of(guess)
        if seen[guess] <= limit:
            low = guess
        else:
            high = guess
    return low, high


def _outwards(seen: Mapping[int, int], low: int, limit: int) -> int:
    """Past `low`, the largest that is known, on a line with the one before it or with nothing."""
    if not low:
        return _FIRST_GUESS
    before = max((batch for batch in seen if batch < low), default=0)
    rise = seen[low] - seen.get(before, 0)
    steps = (limit - seen[low]) * (low - before) // rise if rise > 0 else low
    return low + min(max(1, steps), (_GROWTH - 1) * low)


def _between(seen: Mapping[int, int], low: int, high: int, limit: int) -> int:
    """Strictly between two that are known, on the line through them."""
    guess = low + (limit - seen[low]) * (high - low) // (seen[high] - seen[low])
    return min(max(low + 1, guess), high - 1)
