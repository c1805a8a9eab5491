"""`fit`: how to train on a batch in a given memory in the least time."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..memory.fit import last_within, smallest_batch
from ..plan import Plan
from ..recomputation import RecomputeWords
from ..recomputation.conditions import NotRecomputable
from .card import CARDS, Card
from .levels import levels_of
from .trials import Trial, Trials

# The model of time is not so exact that less would be a reason to compute more again
_CLEARLY = 0.99

# What pinned memory reaches about over PCIe 4.0 × 16; AdamW's state of a parameter in fp32
_BUS_BYTES_PER_S, _STATE_BYTES = 25e9, 8


@dataclass(frozen=True)
class Fitted:
    """A way to train on a batch.

    Attributes:
        batch: images of an update.
        trial: of one micro-batch.
        seconds: of a whole batch, by the card's figures: a model, not a measurement.
    """

    batch: int
    trial: Trial
    seconds: float

    @property
    def micro_batch(self) -> int:
        """Images at a time, whose gradients are summed."""
        return self.trial.images

    @property
    def recompute(self) -> str:
        """What the backward computes again, in `RecomputeWords`; empty for nothing."""
        return self.trial.recompute

    @property
    def peak_bytes(self) -> int:
        """Accounted."""
        return self.trial.estimate.peak_bytes

    @property
    def parts(self) -> int:
        """How many micro-batches a batch has."""
        return -(-self.batch // self.micro_batch)

    @property
    def options(self) -> tuple[str, ...]:
        """Of `spt-kernels finetune`, precision and batch aside."""
        options: list[str] = []
        if self.parts > 1:
            options += ["--micro-batch", str(self.micro_batch)]
        if self.recompute:
            options += ["--recompute", self.recompute]
        return tuple(options)


class Fitting:
    """Looks for ways to train a model by one method in one precision.

    Args:
        model: plain or tuned already; not changed.
        image_shape: of one input, `(3, height, width)`, or a mapping, as for `largest_batch`.
        batch: images of an update.
        card: whose figures tell how long a step takes.
        captured: whether a step of a whole batch is a CUDA graph.
        state_on_host: whether `optimizer` has its state there, which is fetched once a batch.
        plan: as for `estimate_memory`, and so is `how`.
    """

    def __init__(
        self,
        model: nn.Module,
        image_shape: Sequence[int] | Mapping[str, Tensor],
        batch: int = 64,
        *,
        card: Card = CARDS["RTX 3060"],
        captured: bool = False,
        state_on_host: bool = False,
        plan: Plan | None = None,
        **how: Any,
    ) -> None:
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch must be a whole number of at least 1, got {batch!r}")
        self._batch, self._card, self._captured = batch, card, captured
        self._state_on_host = state_on_host
        self._trials = Trials(model, image_shape, batch, plan, **how)
        self._levels: list[str] | None = None

    def fastest(
        self, limit_bytes: int, on_trial: Callable[[], object] = lambda: None
    ) -> Fitted | None:
        """The way that takes the least time with a peak of at most `limit_bytes`, or None.

        Of ways that take as long, the one that computes less again and has larger parts. A way is a
        number of equal parts of the batch, none smaller than the model takes, and one level of
        recomputation for all blocks or, where that is not needed for all, for the first blocks and
        a lower one for the rest.

        Args:
            limit_bytes: that the accounted peak may have.
            on_trial: called as the search goes on.
        """
        best: Fitted | None = None
        if self._trials.of(self._batch).estimate.peak_bytes <= limit_bytes:
            return self._way(self._batch, "")
        for level in self.levels():
            # at best the whole batch at a time
            if best is not None and self._way(self._batch, level).seconds > best.seconds:
                continue
            on_trial()
            images = self._in_parts(self._largest(level, limit_bytes))
            if images:
                best = _faster(best, self._way(images, level))
            if images == self._batch:
                break  # what computes more again need not be looked at
        if best is None:
            return None  # what lies between two levels takes at most two hundredths less than both
        for lower, higher in itertools.pairwise(self.levels()):
            for parts in range(1, 1 + best.parts):
                images = -(-self._batch // parts)
                if not self._are_parts(images):
                    continue
                guess_seconds = self._guessed_mixture(images, lower, higher, limit_bytes)
                if guess_seconds >= _CLEARLY * best.seconds:
                    continue
                on_trial()
                mixed = self._mixed(images, lower, higher, limit_bytes)
                if mixed is not None:
                    best = _faster(best, mixed)
        return best

    def least(self) -> Fitted:
        """The way with the lowest peak: as much computed again as can be, for the fewest images.

        Or for all of them, where gradients that stay from part to part are most of what there is.
        """
        sizes = self._fewest, self._batch
        ways = (self._way(*way) for way in itertools.product(sizes, self.levels()))
        return min(ways, key=lambda way: way.peak_bytes)

    def ways(self) -> Iterator[Fitted]:
        """Whole batches, quarters, sixteenths, … by every level: what a picture shows."""
        for level in self.levels():
            images = self._batch
            yield self._way(images, level)
            while images > self._fewest:
                images = max(self._in_parts(-(-images // 4)), self._fewest)
                yield self._way(images, level)

    def levels(self) -> list[str]:
        """The levels that this model can compute by, each of less memory than those before."""
        if self._levels is None:
            self._levels = list(self._useful_levels())
        return self._levels

    def _useful_levels(self) -> Iterator[str]:
        least = math.inf
        for level in levels_of(self._trials.parts):
            if level == "attention":
                continue  # each level is rehearsed, and `mlp` and `mlp,qkv` lie around this one
            try:
                peak = self._trials.of(self._probe, level).estimate.peak_bytes
            except NotRecomputable:
                continue  # an attention that is not the fused one, a buffer that is written
            if peak < least:
                least = peak
                yield level

    @functools.cached_property
    def _smallest(self) -> int:
        """The fewest images that the model takes."""
        return smallest_batch(lambda images: self._trials.of(images).estimate.peak_bytes)

    @functools.cached_property
    def _fewest(self) -> int:
        """The fewest images at a time that the batch can be had in."""
        return next(filter(self._are_parts, range(1, self._batch + 1)))

    @property
    def _probe(self) -> int:
        """Images at a time by which levels are compared."""
        return max(self._smallest, self._batch // 8)

    def _largest(self, level: str, limit_bytes: int) -> int:
        """The most images of the batch that fit at a time; 0 for none."""

        def peak_of(images: int) -> int:
            return self._trials.of(images, level).estimate.peak_bytes

        whole = {self._batch: peak_of(self._batch)}
        if whole[self._batch] <= limit_bytes:
            return self._batch
        found, _ = last_within(peak_of, limit_bytes, whole)
        return found

    def _lines_of(self, level: str) -> tuple[_Line, _Line]:
        """Peak in bytes and seconds of a step as lines through two that were rehearsed."""
        few, many = (self._trials.of(n, level) for n in (self._probe, self._batch))
        return (
            _Line.through(
                (few.images, few.estimate.peak_bytes), (many.images, many.estimate.peak_bytes)
            ),
            _Line.through(
                (few.images, self._seconds_of_part(few)),
                (many.images, self._seconds_of_part(many)),
            ),
        )

    def _guessed_mixture(self, images: int, lower: str, higher: str, limit_bytes: int) -> float:
        """Seconds of a batch where as much of `higher` is mixed in as it takes; infinite if all."""
        (peak, seconds), (less, longer) = self._lines_of(lower), self._lines_of(higher)
        saved = peak.at(images) - less.at(images)
        share = (peak.at(images) - limit_bytes) / saved if saved > 0 else math.inf
        if share > 1:
            return math.inf
        more = max(0.0, share) * (longer.at(images) - seconds.at(images))
        return self._parts(images) * (seconds.at(images) + more)

    def _mixed(self, images: int, lower: str, higher: str, limit_bytes: int) -> Fitted | None:
        """`higher` for as few of the first blocks as must be, `lower` for the rest."""
        names = list(self._trials.parts)
        words = [RecomputeWords.parse(line) if line else None for line in (lower, higher)]
        few, much = (
            dict.fromkeys(names, ()) if own is None else own.for_blocks(self._trials.parts)
            for own in words
        )

        def line_of(count: int) -> str:
            chosen = {n: (much if place < count else few)[n] for place, n in enumerate(names)}
            return str(RecomputeWords.of(chosen)) if any(chosen.values()) else ""

        fits, no = len(names), 0
        while fits - no > 1:
            middle = (fits + no) // 2
            trial = self._trials.of(images, line_of(middle))
            fits, no = (middle, no) if trial.estimate.peak_bytes <= limit_bytes else (fits, middle)
        way = self._way(images, line_of(fits) if fits < len(names) else higher)
        return way if way.peak_bytes <= limit_bytes else None

    def _way(self, images: int, recompute: str) -> Fitted:
        trial = self._trials.of(images, recompute)
        parts = self._parts(images)
        captured = self._captured and parts == 1
        seconds = parts * self._seconds_of_part(trial, captured)
        # the last part may be smaller; its share of the arithmetic is
        seconds *= self._batch / (parts * images) if not captured else 1.0
        return Fitted(self._batch, trial, seconds)

    def _seconds_of_part(self, trial: Trial, captured: bool = False) -> float:
        """Of its kernels, or of fetching weights from the host meanwhile, which may be longer.

        The state of an optimizer comes and goes once, however many parts a batch has.
        """
        estimate = trial.estimate
        state_bytes = _STATE_BYTES * estimate.num_trainable if self._state_on_host else 0
        fetched_bytes = max(0, estimate.fetched_bytes - state_bytes)
        computes = self._card.seconds_of(trial.work, captured=captured)
        return max(computes, fetched_bytes / _BUS_BYTES_PER_S)

    def _parts(self, images: int) -> int:
        return -(-self._batch // images)

    def _are_parts(self, images: int) -> bool:
        """Whether the model takes so many at a time, and what is left over for the last part."""
        return min(images, self._batch % images or images) >= self._smallest

    def _in_parts(self, images: int) -> int:
        """As many parts as at most so many images at a time make, but of one size; 0 for none."""
        while images:
            even = -(-self._batch // self._parts(images))
            if self._are_parts(even):
                return even
            images = even - 1
        return 0


@dataclass(frozen=True)
class _Line:
    """A straight line, by which a number of images is guessed before it is tried."""

    start: float
    rise: float

    @classmethod
    def through(cls, one: tuple[int, float], other: tuple[int, float]) -> _Line:
        (x, y), (x_far, y_far) = one, other
        rise = (y_far - y) / (x_far - x) if x_far != x else 0.0
        return cls(y - rise * x, rise)

    def at(self, x: float) -> float:
        return self.start + self.rise * x


def _faster(best: Fitted | None, way: Fitted) -> Fitted:
    return way if best is None or way.seconds < _CLEARLY * best.seconds else best
