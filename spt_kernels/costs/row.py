"""What is known of one method's cost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Milliseconds over several rounds."""

    median_ms: float
    min_ms: float
    max_ms: float

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> Spread:
        """Of runs of the same thing."""
        return cls(statistics.median(times_ms), min(times_ms), max(times_ms))

    def each(self, count: int) -> Spread:
        """Of one of the `count` things that a run did."""
        return Spread(self.median_ms / count, self.min_ms / count, self.max_ms / count)

    @property
    def noise(self) -> float:
        """Half the range over the median."""
        return (self.max_ms - self.min_ms) / (2 * self.median_ms)


@dataclass(frozen=True)
class CostRow:
    """What one method costs.

    Attributes:
        method: its name.
        trained: parameters besides the head.
        trained_share: of the backbone.
        inference: of one image, merged where that can be.
        inference_over_plain: against the untouched model, in turn with it.
        inference_peak_bytes: at the setting's batch size.
        tuning_peak_bytes: of a training step, likewise.
        accounted_peak_bytes: what `estimate_memory` says of that step; the same without a card.
        step: a training step with its optimizer, None where it was not timed.
        step_over_full: against full fine-tuning, in turn with it on a CPU.
        file_bytes: what is handed over; 0 where nothing is defined.
        note: why something is missing.
    """

    method: str
    trained: int
    trained_share: float
    inference: Spread | None
    inference_over_plain: float | None
    inference_peak_bytes: int
    tuning_peak_bytes: int
    accounted_peak_bytes: int
    step: Spread | None
    step_over_full: float | None
    file_bytes: int
    note: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether this package tunes it, from scores that are measured before."""
        return self.method.startswith("spt-")

    @staticmethod
    def from_json(value: dict[str, Any]) -> CostRow:
        """The inverse of `asdict`."""
        spreads = {key: value[key] and Spread(**value[key]) for key in ("inference", "step")}
        return CostRow(**{**value, **spreads})
