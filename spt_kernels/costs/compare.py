"""Compares two results files and tells what became worse beyond the noise.

Times are compared as ratios of ours to a rival of the same run, which two days, or two machines,
leave comparable; bytes, operators and kernels as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .results import TABLES
from .row import CostRow, Spread
from .sensitivity_speed import EXACT
from .table7 import Table7

SMALLEST_NOISE = 0.05  # of a ratio of medians, even where the runs at hand agree better
COUNTED_NOISE = 0.01  # of bytes, operators and kernels, which may differ between versions of torch
COUNTED = ("tuning_peak_bytes", "inference_peak_bytes", "file_bytes", "operators", "kernels")
BASELINES = ("full", "lora-16")


@dataclass(frozen=True)
class Change:
    """One figure of both files, the less the better, and how far it may move by chance."""

    name: str
    before: float
    after: float
    noise: float

    @property
    def is_regression(self) -> bool:
        """Whether it grew by more than noise explains."""
        return self.after > self.before * (1 + self.noise)


@dataclass(frozen=True)
class _Figure:
    """A value and half its range over it."""

    value: float
    noise: float


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Every figure of ours that both files hold, what grew most first.

    Raises:
        ValueError: a file that another version wrote, or none of ours.
    """
    before, after = _known("old", old), _known("new", new)
    changes = [
        Change(name, before[name].value, figure.value, max(before[name].noise, figure.noise))
        for name, figure in after.items()
        if name in before
    ]
    return sorted(changes, key=lambda change: change.before / change.after)


def _known(which: str, results: Mapping[str, Any]) -> dict[str, _Figure]:
    try:
        return dict(_figures(results))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{which}: expected results as this version writes them, got others ({reason})"
        ) from error


def _figures(results: Mapping[str, Any]) -> Iterator[tuple[str, _Figure]]:
    for name, contest in results.get("contests", {}).items():
        ours, *rivals = contest["rows"] or [None]
        for rival in rivals:
            both = _spread(ours), _spread(rival)
            yield f"{name} / {rival['name']}", _Figure(rival["ours_over_this"], _noise(*both))
    for title, value in results.get(TABLES, {}).items():
        for name, figure in _of_table(Table7.from_json(value)):
            yield f"{title}: {name}", figure


def _of_table(table: Table7) -> Iterator[tuple[str, _Figure]]:
    rivals = {row.method: row for row in table.rows if row.method in BASELINES}
    for row in table.rows:
        if not row.is_ours:
            continue  # a rival that became slower is no regression of ours
        for column in COUNTED:
            if getattr(row, column):
                yield f"{row.method}, {column}", _Figure(getattr(row, column), COUNTED_NOISE)
        for name, rival in rivals.items():
            yield from _step_over(table, row, rival, f"{row.method}, step / {name}")
        if row.inference is not None and row.inference_over_plain is not None:
            noise = _noise(row.inference)
            yield f"{row.method}, inference / plain", _Figure(row.inference_over_plain, noise)
    speed = table.sensitivity
    if speed is not None:
        ours = speed.per_sample[EXACT]
        for way, theirs in speed.per_sample.items():
            if way != EXACT:
                noise = _noise(ours, theirs)
                yield f"sensitivity / {way}", _Figure(speed.ours_over(way), noise)


def _step_over(
    table: Table7, row: CostRow, rival: CostRow, name: str
) -> Iterator[tuple[str, _Figure]]:
    kernels = table.over(row, rival.method, "kernel_ms")
    if kernels is not None:
        yield name.replace("step", "kernels"), _Figure(kernels, SMALLEST_NOISE)
    ratio = table.step_over(row, rival.method)
    if ratio is not None and row.step is not None and rival.step is not None:
        yield name, _Figure(ratio, _noise(row.step, rival.step))


def _spread(row: Mapping[str, Any]) -> Spread:
    return Spread(row["median_ms"], row["min_ms"], row["max_ms"])


def _noise(*spreads: Spread) -> float:
    return max(SMALLEST_NOISE, sum(spread.noise for spread in spreads))
