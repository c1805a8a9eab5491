"""Accounted memory as tables and stacked bars in a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from .terminal import count, percent, table

if TYPE_CHECKING:
    from ..memory import LargestBatch, MemoryEstimate
    from ..memory.rows import Answer

GIB = 1 << 30
MIB = 1 << 20

# category -> sign and colour: they differ in both, for terminals without colour
_LOOKS = {
    "weights": ("█", "#0072B2"),
    "optimizer": ("▓", "#E69F00"),
    "gradients": ("▒", "#009E73"),
    "activations": ("░", "#56B4E9"),
    "temporary": ("·", "#9a9a9a"),
}
_SHORT = ("weights", "optim.", "grad.", "activ.", "temp.")
_WIDEST = 100  # columns; a longer bar tells no more


def method_table(estimates: Mapping[str, MemoryEstimate]) -> Any:
    """One row per method, MiB by category."""
    digits = 1 if max(e.peak_bytes for e in estimates.values()) < 100_000 * MIB else 0

    def mebibytes(number: int) -> str:
        return f"{number / MIB:,.{digits}f}"

    rows = [
        (
            name,
            count(estimate.num_trainable),
            *(mebibytes(estimate.by_category[category]) for category in _LOOKS),
            mebibytes(estimate.peak_bytes),
        )
        for name, estimate in estimates.items()
    ]
    return table(("MiB", "trained", *_SHORT, "peak"), rows, is_wide=True)


def category_table(estimate: MemoryEstimate) -> Any:
    """One row per category, with its share of the peak."""
    parts = [*estimate.by_category.items(), ("peak", estimate.peak_bytes)]
    rows = [
        (name, f"{number / MIB:,.1f}", percent(number / estimate.peak_bytes))
        for name, number in parts
    ]
    return table(("", "MiB", "share"), rows)


def bars(estimates: Mapping[str, MemoryEstimate], columns: int) -> Text:
    """A stacked bar per method, as long as its peak, over a legend."""
    largest = max(e.peak_bytes for e in estimates.values())
    unit, name = (GIB, "GiB") if largest >= GIB else (MIB, "MiB")
    ends = {key: f" {e.peak_bytes / unit:,.2f} {name}" for key, e in estimates.items()}
    margin = max(len(key) for key in estimates) + 1
    room = min(columns, _WIDEST) - margin - max(len(end) for end in ends.values())
    drawn = Text()
    for key, estimate in estimates.items():
        drawn.append(f"{key:<{margin}}")
        parts = list(estimate.by_category.values())
        for (sign, colour), cells in zip(
            _LOOKS.values(), cells_of(parts, max(room, 1) / largest), strict=True
        ):
            drawn.append(sign * cells, style=colour)
        drawn.append(f"{ends[key]}\n")
    legend = sum(len(category) + 4 for category in _LOOKS) - 2
    drawn.append(" " * min(margin, max(0, columns - legend)))
    for category, (sign, colour) in _LOOKS.items():
        drawn.append(sign, style=colour)
        drawn.append(f" {category}  ")
    drawn.rstrip()
    return drawn


def cells_of(parts: Sequence[int], cells_per_byte: float) -> list[int]:
    """Whole cells for the parts of a bar: each ends where the rounded sum so far does."""
    ends = [0]
    total = 0
    for part in parts:
        total += part
        ends.append(round(total * cells_per_byte))
    return [after - before for before, after in itertools.pairwise(ends)]


def fit_table(found: Mapping[str, Mapping[float, LargestBatch]]) -> Any:
    """One row per method, a column per limit in GiB: the largest batch and its peak."""
    limits = next(iter(found.values()))
    rows = [(name, *map(_fit, by_limit.values())) for name, by_limit in found.items()]
    return table(("", *(f"in {gib:g} GiB" for gib in limits)), rows)


def otherwise_table(answers: Mapping[str, Answer]) -> Any:
    """What the smallest step needs where none fits, as it was asked for and otherwise."""
    rows = []
    for name, answer in answers.items():
        assert answer.smallest is not None
        needed = (answer.smallest, *answer.otherwise.values())
        rows.append((name, *(_gib(estimate) for estimate in needed)))
    ways = next(iter(answers.values())).otherwise
    return table(("", "as asked", *ways), rows)


def _fit(found: LargestBatch) -> str:
    batch = f"{found.batch:,}" if found else "none"
    return f"{batch} ({_gib(found.estimate)})"


def _gib(estimate: MemoryEstimate) -> str:
    return f"{estimate.peak_bytes / GIB:.2f}"
