"""`spt-kernels plot`: the paper's pictures and ablations, from saved files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..methods.method import check_one_of
from .options import described
from .plot_tables import table_of
from .terminal import Terminal
from .training_options import parse_budget
from .written import check_apart, check_file, check_picture

if TYPE_CHECKING:
    from ..plots.runs import FoundRuns
    from ..plots.sources import TaskFiles

HELP = """Draw a picture for a paper, from saved files, and tell its numbers.

Of plans and sensitivities: `allocation` (what one plan does with each operation
of each block), `blocks` and `operations` (where tasks have their most sensitive
parameters), `pretraining` (how much that varies over tasks), `overlap` (how
alike tasks select). Of finished runs: `budget` (accuracy against trained
parameters), `structure` (with and without modules and single entries),
`samples` (accuracy against the samples that were measured).

  spt-kernels plot allocation runs/photos -o allocation.pdf
  spt-kernels plot blocks *.sensitivity --budget 0.4M -o blocks.pdf
  spt-kernels plot overlap vtab/*/spt-lora/seed0 -o overlap.png
  spt-kernels plot pretraining vtab-supervised vtab-mae -o figure9.pdf
  spt-kernels plot budget vtab --csv figure3a.csv -o figure3a.pdf

A file is a plan, a sensitivity or a run's folder. A folder of tasks, as
`benchmark` leaves it, stands for all of them; several such are shown apart.
"""


@dataclass(frozen=True)
class _Asked:
    """What a command line asks for."""

    files: list[Path]
    budget: int | float | None
    labels: list[str]
    methods: list[str]
    columns: int | None
    title: str | None

    @property
    def look(self) -> dict[str, Any]:
        return {"columns": self.columns, "title": self.title}

    def tasks(self, kind: str | None = None) -> TaskFiles:
        from ..plots import task_files

        kind = kind or ("plan" if self.budget is None else "sensitivity")
        return task_files(self.files, kind, labels=self.labels, methods=self.methods)

    def load(self, tasks: Mapping[str, Path]) -> dict[str, Any]:
        from ..plots import load_selection

        return {task: load_selection(path, self.budget) for task, path in tasks.items()}

    def runs(self) -> FoundRuns:
        from ..plots import read_runs

        for name, value in (("budget", self.budget), ("label", self.labels or None)):
            if value is not None:
                raise ValueError(f"{name}: a picture of runs has none; leave it out")
        return read_runs(self.files, self.methods)


# The numbers of a picture (or several by name), how to draw them, and what to say besides
_Made = tuple[Any, Callable[[], Any], list[str]]


def _allocation(asked: _Asked) -> _Made:
    from ..plots import allocation, allocation_figure

    tasks = [path for own in asked.tasks("plan").groups.values() for path in own.values()]
    if len(tasks) > 1:
        raise ValueError(f"files: an allocation is of one plan, got {len(tasks)}")
    [plan] = asked.load({"": tasks[0]}).values()
    made = allocation(plan)
    return made, lambda: allocation_figure(made, **asked.look), []


def _shares(axis: Any) -> Callable[[_Asked], _Made]:
    def make(asked: _Asked) -> _Made:
        from ..plots import shares_figure, task_shares

        found = asked.tasks()
        made = {name: task_shares(asked.load(tasks), axis) for name, tasks in found.groups.items()}
        return made, lambda: shares_figure(made, **asked.look), list(found.notes)

    return make


def _pretraining(asked: _Asked) -> _Made:
    from ..plots import pretraining_figure, variance_over_tasks

    found = asked.tasks()
    made = variance_over_tasks({n: asked.load(tasks) for n, tasks in found.groups.items()})
    left = [f"left out, as not all have it: {task}" for task in made.left_out]
    return made, lambda: pretraining_figure(made, **asked.look), [*found.notes, *left]


def _overlap(asked: _Asked) -> _Made:
    from ..plots import overlap_figure, selection_overlap

    found = asked.tasks("sensitivity")
    if len(found.groups) > 1:
        raise ValueError(f"files: an overlap is of one folder of tasks, got {len(found.groups)}")
    [tasks] = found.groups.values()
    made = selection_overlap(asked.load(tasks))
    return made, lambda: overlap_figure(made, **asked.look), list(found.notes)


def _of_runs(ablation: str, figure: str) -> Callable[[_Asked], _Made]:
    def make(asked: _Asked) -> _Made:
        from .. import plots

        found = asked.runs()
        made = getattr(plots, ablation)(found.runs)
        notes = [f"{folder}: left out, it is not finished" for folder in found.unfinished]
        return made, lambda: getattr(plots, figure)(made, **asked.look), [*notes, *made.missing]

    return make


KINDS: Mapping[str, Callable[[_Asked], _Made]] = {
    "allocation": _allocation,
    "blocks": _shares("block"),
    "operations": _shares("operation"),
    "pretraining": _pretraining,
    "overlap": _overlap,
    "budget": _of_runs("accuracy_by_budget", "budget_figure"),
    "structure": _of_runs("structure_ablation", "structure_figure"),
    "samples": _of_runs("samples_ablation", "samples_figure"),
}


def run(
    terminal: Terminal,
    kind: Annotated[str, typer.Argument(help="What to draw, one of those above.", metavar="KIND")],
    files: Annotated[
        list[Path],
        typer.Argument(help="Plans, sensitivities, or folders of runs.", metavar="FILES"),
    ],
    budget: Annotated[
        str | None,
        described(
            "Input",
            "--budget -b N",
            "Of sensitivities, how many are selected: 400000, 0.4M or 0.5% [0.5%]. Of a run's "
            "folder its sensitivity is then read, not its plan.",
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        described("Input", "--label NAME", "Of each file or folder of tasks, in their order."),
    ] = None,
    method: Annotated[
        list[str] | None,
        described("Input", "--method NAME", "In folders, only runs of it; repeat for more."),
    ] = None,
    output: Annotated[
        Path | None, described("Output", "--output -o FILE", "Draw it: a.pdf, a.png or a.svg.")
    ] = None,
    csv: Annotated[
        Path | None, described("Output", "--csv FILE", "Write the numbers to a.csv.")
    ] = None,
    columns: Annotated[
        int | None,
        described(
            "Output", "--columns N", "As wide as 1 (3.3 in) or 2 (6.9 in) of a paper's columns."
        ),
    ] = None,
    title: Annotated[
        str | None, described("Output", "--title TEXT", "Above the picture; a paper has captions.")
    ] = None,
    force: Annotated[bool, described("Output", "--force", "Overwrite such files.")] = False,
) -> None:
    """Read the files, show the numbers, draw them."""
    check_one_of("kind", kind, KINDS)
    if columns not in (None, 1, 2):
        raise ValueError(f"columns: expected 1 or 2, got {columns}")
    check_apart(output=output, csv=csv)
    check_picture("--output", output, force=force)
    check_file("--csv", csv, force=force)
    asked = _Asked(files, parse_budget(budget), label or [], method or [], columns, title)
    made, draw, notes = KINDS[kind](asked)
    written = _write(made, draw, output, csv)
    value = {
        **({"groups": {n: own.to_json() for n, own in made.items()}} if isinstance(made, dict)
           else made.to_json()),
        "notes": notes,
        "written": written,
    }  # fmt: skip
    terminal.show(value, table_of(made), *notes, *(f"written to {path}" for path in written))


def _write(made: Any, draw: Callable[[], Any], output: Path | None, csv: Path | None) -> list[str]:
    from ..files.atomic import write_atomically
    from ..files.picture import save_picture
    from ..plots.numbers import csv_of

    if output is not None:
        save_picture(draw(), output)
    if csv is not None:
        write_atomically(csv, csv_of(made).encode(errors="surrogateescape"))
    return [str(path) for path in (output, csv) if path is not None]
