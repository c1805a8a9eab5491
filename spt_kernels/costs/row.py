"""What is known of one way's cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Milliseconds over several rounds."""

    median_ms: float
    min_ms: float
    max_ms: float

    @property
    def noise(self) -> float:
        """Half the range over the median."""
        return (self.max_ms - self.min_ms) / (2 * self.median_ms)


@dataclass(frozen=True)
class CostRow:
    """One way of fine-tuning.

    Attributes:
        way: its name in `WAYS`.
        trained: parameters besides the head.
        trained_share: of the backbone.
        inference: of one image, merged where that can be.
        inference_over_plain: against the untouched model, in turn with it.
        inference_peak_bytes: at the setting's batch size.
        tuning_peak_bytes: of a training step, likewise.
        step: a training step with its optimizer, None where it was not run.
        step_over_full: against full fine-tuning, in turn with it on a CPU.
        file_bytes: what is handed over; 0 where nothing is defined.
        note: why something is missing.
    """

    way: str
    trained: int
    trained_share: float
    inference: Spread | None
    inference_over_plain: float | None
    inference_peak_bytes: int
    tuning_peak_bytes: int
    step: Spread | None
    step_over_full: float | None
    file_bytes: int
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> CostRow:
        """The inverse of `to_json`."""
        spreads = {key: value[key] and Spread(**value[key]) for key in ("inference", "step")}
        return CostRow(**{**value, **spreads})


@dataclass(frozen=True)
class SensitivitySpeed:
    """Samples per second of three ways to score every candidate parameter.

    Attributes:
        exact: `measure_sensitivity`, once it runs: the probe of two samples before it is apart.
        loop: a batch of one at a time, which gives the same numbers.
        batch_squared: the square of a batch's mean gradient, which is another quantity.
        batch_size: of the first and the last.
    """

    exact: float
    loop: float
    batch_squared: float
    batch_size: int
