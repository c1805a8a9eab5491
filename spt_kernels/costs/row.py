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
        accounted_peak_bytes: of a training step at the setting's batch size, by `estimate_memory`.
        inference: of one image, merged where that can be.
        inference_over_plain: against the untouched model, in turn with it.
        inference_peak_bytes: at the setting's batch size.
        tuning_peak_bytes: of a training step, likewise; without a card what is accounted for it.
        step: a training step with its optimizer, None where it was not timed.
        step_over_full: against full fine-tuning, in turn with it on a CPU.
        file_bytes: what is handed over; 0 where nothing is defined.
        note: why something is missing.
        operators: that a step dispatches; 0 where it was not run.
        kernels: that a step launches, copies and fills included; 0 without a card.
        kernel_ms: what these take together; 0 likewise.
    """

    method: str
    trained: int
    trained_share: float
    accounted_peak_bytes: int
    inference: Spread | None = None
    inference_over_plain: float | None = None
    inference_peak_bytes: int = 0
    tuning_peak_bytes: int = 0
    step: Spread | None = None
    step_over_full: float | None = None
    file_bytes: int = 0
    note: str = ""
    operators: int = 0
    kernels: int = 0
    kernel_ms: float = 0.0

    @property
    def is_ours(self) -> bool:
        """Whether this package tunes it, from scores that are measured before."""
        return self.method.startswith(("spt-", "sensitive-"))

    @staticmethod
    def from_json(value: dict[str, Any]) -> CostRow:
        """The inverse of `asdict`."""
        spreads = {key: value[key] and Spread(**value[key]) for key in ("inference", "step")}
        return CostRow(**{**value, **spreads})
