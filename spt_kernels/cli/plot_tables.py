"""The numbers of a picture as a table on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .terminal import count, percent, table

if TYPE_CHECKING:
    from ..plots import (
        AccuracyTable,
        Allocation,
        SelectionOverlap,
        TaskShares,
        TaskVariance,
    )

_MOST = 3  # places that are named, from the largest


def table_of(made: Any) -> Any:
    """What a person sees of the numbers; `--csv` has all of them."""
    if isinstance(made, Mapping):
        return _of_shares(made)
    return _TABLES[type(made).__name__](made)


def _of_shares(groups: Mapping[str, TaskShares]) -> Any:
    rows = [
        (
            f"{name}: {task}" if name else task,
            count(own.selected[task]),
            _largest(_short(own.places) if own.axis == "block" else own.places, shares, _whole),
        )
        for name, own in groups.items()
        for task, shares in own.shares.items()
    ]
    axis = next(iter(groups.values())).axis
    return table(("task", "selected", f"{axis}s with most"), rows, has_prose=True)


def _of_allocation(made: Allocation) -> Any:
    rows = []
    for operation in made.operations:
        cells = [cell for (_, own), cell in made.cells.items() if own == operation]
        rows.append(
            (
                operation,
                count(sum(cell.selected for cell in cells)),
                count(sum(cell.unstructured for cell in cells)),
                count(sum(cell.structured > 0 for cell in cells)),
                count(sum(cell.trainable for cell in cells)),
            )
        )
    module = f"blocks with {made.module or 'modules'}"
    return table(("operation", "selected", "single entries", module, "trained"), rows)


def _of_variance(made: TaskVariance) -> Any:
    rows = [
        (
            name,
            f"{sum(own) / len(own):.2f}",
            _largest(_short(made.blocks), own, "{:.1f}".format),
            f"{sum(made.by_operation[name]) / len(made.operations):.2f}",
        )
        for name, own in made.by_block.items()
    ]
    columns = ("pre-training", "mean over blocks", "blocks with most", "mean over operations")
    return table(columns, rows, f"variance over {len(made.tasks)} tasks, (% points)²")


def _of_overlap(made: SelectionOverlap) -> Any:
    pairs = sorted(made.pairs, key=lambda pair: -pair.jaccard)
    rows = [
        (
            f"{pair.first}, {pair.second}",
            count(pair.shared),
            percent(pair.jaccard),
            percent(pair.chance),
            "–" if pair.over_chance is None else f"× {pair.over_chance:.1f}",
        )
        for pair in pairs
    ]
    return table(("tasks", "shared", "of either's", "by chance", "over chance"), rows)


def _of_accuracy(made: AccuracyTable) -> Any:
    from ..plots.accuracy import labels

    over = f", mean over {len(made.tasks)} tasks" if len(made.tasks) > 1 else ""
    rows = [
        (
            label,
            count(round(row.trained)),
            percent(row.trained / made.backbone, 2),
            _with_error(row.mean, row.standard_error),
            str(len(row.seeds)),
        )
        for label, row in zip(labels(made.each), made.each, strict=True)
    ]
    columns = ("method", "trained", "share", f"{made.images} accuracy, %", "seeds")
    return table(columns, rows, f"± standard error over seeds{over}")


def _with_error(mean: float, error: float | None) -> str:
    return f"{100 * mean:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _whole(share: float) -> str:
    return percent(share, 0)


def _short(blocks: Sequence[str]) -> list[str]:
    from ..plan.figure import short_block

    return list(map(short_block, blocks))


def _largest(places: Sequence[str], values: Sequence[float], told: Any) -> str:
    ranked = sorted(zip(places, values, strict=True), key=lambda item: -item[1])[:_MOST]
    return ", ".join(f"{place}: {told(value)}" for place, value in ranked if value)


_TABLES: dict[str, Any] = {
    "Allocation": _of_allocation,
    "TaskVariance": _of_variance,
    "SelectionOverlap": _of_overlap,
    "AccuracyTable": _of_accuracy,
}
