"""`spt-kernels compare`: several runs as one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import described
from .terminal import Terminal, percent, size, table
from .written import check_picture

if TYPE_CHECKING:
    from ..finetuning.results.comparison import ComparedWay, Comparison

HELP = """Put finished runs side by side: accuracy, what is trained, what it costs.

A folder stands for all runs in it, and in the folders in it:

  spt-kernels compare runs/lora runs/spt-lora-0 runs/spt-lora-1
  spt-kernels compare demo-output -o comparison.png

Runs that differ in their seed alone are one row, with their mean and its
standard error.
"""


def run(
    terminal: Terminal,
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of runs, or folders with such.", metavar="RUN")
    ],
    output: Annotated[
        Path | None, described("Output", "--output -o FILE", "Draw it, as a.png.")
    ] = None,
    force: Annotated[bool, described("Output", "--force", "Overwrite that picture.")] = False,
) -> None:
    """Read the runs, show them, draw them."""
    check_picture("--output", output, force=force)
    from ..finetuning.results.comparison import compare_runs

    made = compare_runs(runs)
    parts = _parts(made)
    if output is not None:
        from ..files.picture import save_picture
        from ..finetuning.results.comparison_chart import comparison_figure

        save_picture(comparison_figure(made), output)
        parts.append(f"written to {output}")
    terminal.show(made.to_json(), *parts)


def _parts(made: Comparison) -> list[Any]:
    rows = [
        (
            way.name,
            percent(way.trained_share, 2),
            size(way.file_bytes),
            _accuracy(way),
            str(len(way.runs)),
            f"{way.seconds:,.0f}",
            size(way.peak_bytes),
        )
        for way in made.ways
    ]
    columns = ("method", "trained", "file", f"{made.images}, %", "runs", "s", "peak")
    notes = [f"Peak memory is of a training step, {made.peak}; seconds (s) are of a run."]
    if any(way.standard_error is not None for way in made.ways):
        notes.insert(0, "Accuracies are means ± their standard error over the runs.")
    notes += [
        f"{way.name}: {len(way.accuracies)} of its {len(way.runs)} runs have {made.images} images"
        for way in made.ways
        if way.accuracies and len(way.accuracies) < len(way.runs)
    ]
    notes += [
        f"Not the same in all runs: {name}: {'; '.join(values)}"
        for name, values in made.unlike.items()
    ]
    notes += [f"{folder}: left out, {reason}" for folder, reason in made.missing.items()]
    return [table(columns, rows), "", *notes]


def _accuracy(way: ComparedWay) -> str:
    if way.mean is None:
        return "–"
    error = f" ± {100 * way.standard_error:.1f}" if way.standard_error is not None else ""
    return f"{100 * way.mean:.1f}{error}"
