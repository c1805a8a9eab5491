"""The table of a benchmark in letters, laid out as the paper's Tables 1, 9 and 10."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .table import BenchmarkRow, BenchmarkTable, Figure

NOTHING = "–"
PART = "†"


@dataclass(frozen=True)
class Grid:
    """Cells of text under titles.

    Attributes:
        title: of the whole.
        columns: their titles; the first column names rows.
        rows: as many cells as columns.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def turned(self) -> Grid:
        """Rows as columns."""
        across = list(zip(self.columns, *self.rows, strict=True))
        return Grid(self.title, across[0], tuple(across[1:]))

    def markdown(self) -> str:
        """As a table of Markdown."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def group_grid(*tables: BenchmarkTable) -> Grid:
    """What is trained, the mean of each group, and the mean of these: as the paper's Table 1.

    Args:
        tables: one, or several to stand side by side, as FGVC and VTAB-1k do in the paper.
    """
    methods = dict.fromkeys(row.method for table in tables for row in table.rows)
    columns: list[tuple[str, ...]] = [("method", *methods)]
    for table in tables:
        rows = {row.method: row for row in table.rows}
        own = _columns_of(table, [rows.get(method) for method in methods])
        before = f"{table.suite} " if len(tables) > 1 else ""
        has_own_name = {"trained", "%", "mean"} if before else set()
        columns += [
            (before + title if title in has_own_name else title, *cells) for title, *cells in own
        ]
    across = list(zip(*columns, strict=True))
    title = ", ".join(table.suite for table in tables)
    return Grid(f"{title}, groups", across[0], tuple(across[1:]))


def _columns_of(
    table: BenchmarkTable, rows: Sequence[BenchmarkRow | None]
) -> list[tuple[str, ...]]:
    """The columns of a suite, each with its title, for rows that may not be there."""

    def column(title: str, text: Callable[[BenchmarkRow], str]) -> tuple[str, ...]:
        return (title, *(NOTHING if row is None else text(row) for row in rows))

    def of_group(group: str) -> tuple[str, ...]:
        return column(group, lambda row: figure_text(row.groups[group]))

    made = [column("trained", _trained), column("%", _share), *map(of_group, table.groups)]
    if len(table.groups) > 1:
        made.append(column("mean", lambda row: figure_text(row.mean)))
    return made


def task_grid(table: BenchmarkTable) -> Grid:
    """Every task, its groups parted by their means: as the paper's Tables 9 and 10."""
    columns = ["method"]
    for group in table.groups:
        columns += [task.title for task in table.tasks_of(group)]
        columns.append(f"{group} mean")
    rows = (
        (row.method, *(figure_text(figure) for figure in _by_group(table, row)))
        for row in table.rows
    )
    return Grid(f"{table.suite}, tasks", tuple(columns), tuple(rows))


def notes(table: BenchmarkTable) -> list[str]:
    """What one must know to read the table."""
    lines = ["Test accuracy in %, top-1, after the last epoch."]
    n_seeds = len(table.seeds)
    if n_seeds > 1:
        lines[0] += f" Mean ± standard error over {n_seeds} seeds."
    if len(table.groups) > 1:
        lines.append("The mean is that of the groups' means.")
    shown = [figure for figure in table.figures if figure.mean is not None]
    if table.n_missing:
        lines.append(f"{table.n_missing} of {table.n_runs} runs are missing.")
    if any(not figure.is_complete for figure in shown):
        lines.append(f"{PART} Not of all seeds yet.")
    if len(shown) < len(table.figures):
        lines.append(f"{NOTHING} Not there; no mean is taken over the tasks left.")
    lines += _choices(table)
    if table.machines:
        lines.append(f"Computed with {'; '.join(table.machines)}.")
    lines += [f"failed: {name}: {reason}" for name, reason in table.failed.items()]
    return lines


def markdown(tables: Sequence[BenchmarkTable]) -> str:
    """All tables and their notes, in Markdown."""
    models = ", ".join(dict.fromkeys(table.model for table in tables))
    groups = group_grid(*tables)
    parts = [f"### {groups.title} ({models})\n\n{groups.markdown()}\n"]
    for table in tables:
        tasks = task_grid(table)
        parts.append(f"### {tasks.title} ({table.model})\n\n{tasks.markdown()}\n")
        parts.append("\n".join(f"- {line}" for line in notes(table)) + "\n")
    return "\n".join(parts)


def figure_text(figure: Figure) -> str:
    """As `87.3 ± 0.2`."""
    if figure.mean is None:
        return NOTHING
    error = figure.standard_error
    spread = "" if error is None else f" ± {100 * error:.1f}"
    return f"{100 * figure.mean:.1f}{spread}{'' if figure.is_complete else PART}"


def _by_group(table: BenchmarkTable, row: BenchmarkRow) -> list[Figure]:
    figures = []
    for group in table.groups:
        figures += [row.tasks[task.name] for task in table.tasks_of(group)]
        figures.append(row.groups[group])
    return figures


def _choices(table: BenchmarkTable) -> list[str]:
    lines = []
    for row in table.rows:
        tasks: dict[str, list[str]] = {}
        for task, options in row.chosen.items():
            told = ", ".join(f"{name} {value}" for name, value in options.items())
            tasks.setdefault(told, []).append(task)
        parts = [f"{told} on {', '.join(names)}" for told, names in tasks.items()]
        if parts:
            lines.append(f"{row.method}, chosen on validation images: {'; '.join(parts)}")
    return lines


def _trained(row: BenchmarkRow) -> str:
    number = row.trained_parameters
    if number is None:
        return NOTHING
    return f"{number / 1e6:.2f}M" if number >= 100_000 else f"{number:,}"


def _share(row: BenchmarkRow) -> str:
    return NOTHING if row.trained_share is None else f"{100 * row.trained_share:.2f}"
