"""`spt-kernels benchmark`: every method on every task with every seed, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .benchmark_options import GridOptions, MethodsOptions, SeedsOptions, TaskOptions
from .command import named_of
from .options import FormOptions, ModelOptions, described
from .terminal import Terminal, table
from .written import check_picture

if TYPE_CHECKING:
    from ..benchmarks import BenchmarkSetting, BenchmarkTable, BenchmarkTask
    from ..benchmarks.table_text import Grid

HELP = """Run methods on all tasks of a benchmark, and make its table.

Tables 1, 9 and 10 of the paper, from folders of images that are there
already (docs/BENCHMARK.md says how they must look):

  spt-kernels benchmark vtab --root vtab-1k -m vit_base_patch16_224 \\
      -w ViT-B_16.npz --methods full,lora-8,spt-lora --seeds 0,1,2 \\
      --budget 0.4M --devices all -o runs/vtab

  spt-kernels benchmark fgvc --root fgvc -m vit_base_patch16_224 \\
      -w ViT-B_16.npz -o runs/fgvc

A suite of your own, own/<group>/<task>/train/<class>/ and so on:

  spt-kernels benchmark folders --root own -m vit_base_patch16_224 \\
      --pretrained -o runs/own

The same command goes on after a kill. With more tasks, methods or seeds it
adds to the folder; finished runs are never run again. A run that fails
stops no other; the exit code is 1 then, if it is one that was asked for.

Each test set is looked at once per run, after its last epoch. What --choose
chooses, it chooses on validation images, before.

The table again, of folders that are finished or not:

  spt-kernels benchmark table runs/vtab --picture vtab.png
  spt-kernels benchmark table runs/fgvc runs/vtab --markdown > table.md
"""

TABLE = "table"
SUITES = ("vtab", "fgvc", "folders")
SOME_FAILED = 1  # exit code
_OF_TABLE = {"what", "folders", "markdown", "picture", "force", "as_json", "quiet", "debug"}
_OUTPUT = "Output"


def run(
    context: typer.Context,
    terminal: Terminal,
    what: Annotated[str, typer.Argument(help=f"{', '.join(SUITES)} or {TABLE}.", metavar="WHAT")],
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help=f"Of {TABLE}: folders of benchmarks.", metavar="FOLDER"),
    ] = None,
    *,
    which: TaskOptions,
    model: ModelOptions,
    methods: MethodsOptions,
    recipe: SeedsOptions,
    form: FormOptions,
    grid: GridOptions,
    output: Annotated[
        Path | None,
        described(_OUTPUT, "--output -o FOLDER", "Where all runs go, and from where they go on."),
    ] = None,
    markdown: Annotated[
        bool, described(_OUTPUT, "--markdown", "The tables in Markdown, as wide as they are.")
    ] = False,
    picture: Annotated[
        Path | None, described(_OUTPUT, "--picture FILE", "Draw the groups' means, as a.png.")
    ] = None,
    force: Annotated[bool, described(_OUTPUT, "--force", "Overwrite that picture.")] = False,
) -> int:
    """Run what is missing, or only read, and show the table."""
    if what not in (*SUITES, TABLE):
        raise ValueError(f"WHAT: expected {', '.join(SUITES)} or {TABLE}, got {what!r}")
    check_picture("--picture", picture, force=force)
    failed: dict[str, str] = {}  # of what is asked for here; the folder may be of more
    if what == TABLE:
        for name in named_of(context, context.params.keys() - _OF_TABLE):
            raise ValueError(f"--{name.replace('_', '-')}: goes with a run, not with {TABLE}")
        if not folders:
            raise ValueError(f"FOLDER: {TABLE} needs the folder of a benchmark")
        from ..benchmarks import benchmark_table

        tables = [benchmark_table(folder) for folder in folders]
        if picture is not None and len(tables) > 1:
            raise ValueError("--picture: is of one benchmark; name one folder")
    else:
        if folders:
            raise ValueError(f"FOLDER: goes with {TABLE}; the images of {what} are in --root")
        if which.root is None:
            raise ValueError("--root: name the folder of the images")
        if output is None:
            raise ValueError("--output: name a folder for the runs")
        if grid.ray is not None:
            for name in named_of(context, ("devices", "jobs")):
                raise ValueError(f"--{name}: the cluster decides; leave it out with --ray")
        setting = _setting(what, which, model, methods, recipe, form)
        from ..benchmarks import run_benchmark

        with terminal.progress() as progress:
            tables = [run_benchmark(setting, output, **grid.how(), progress=progress)]
        failed = tables[0].failed_of(setting)
    written = _drawn(tables[0], picture)
    value = tables[0].to_json() if len(tables) == 1 else {"tables": [t.to_json() for t in tables]}
    terminal.show(value, *_parts(tables, markdown), *written)
    return SOME_FAILED if failed else 0


def _setting(
    what: str,
    which: TaskOptions,
    model: ModelOptions,
    methods: MethodsOptions,
    recipe: SeedsOptions,
    form: FormOptions,
) -> BenchmarkSetting:
    # first what is checked without a look at any file
    preset = recipe.preset_for(what)
    every, how = methods.every(preset), recipe.chosen(preset.recipe)
    seeds, choices = recipe.seeds(), which.values()
    source = model.source()
    if source is None:
        raise ValueError("--model: name a timm architecture")
    assert which.root is not None
    suite, tasks = _tasks(what, which.root, which.names())
    from ..benchmarks import BenchmarkSetting
    from ..finetuning.images.splits import may_have_validation

    is_chosen = bool(choices) or any(method.is_searched for method in every)
    shown = [task.choose if is_chosen else task.final for task in tasks]
    if recipe.val_every is not None and not any(map(may_have_validation, shown)):
        raise ValueError(
            "--val-every: these runs have no validation images to look at, as nothing is chosen "
            "(--choose); leave it out"
        )
    shape = {**preset.form, **form.overrides(), **recipe.overrides()}
    return BenchmarkSetting(suite, source, tasks, every, seeds, how, shape, choices)


def _tasks(what: str, root: Path, names: tuple[str, ...]) -> tuple[str, tuple[BenchmarkTask, ...]]:
    """The title of a suite, and its tasks."""
    if what == "vtab":
        from ..benchmarks.vtab import vtab_tasks

        return "VTAB-1k", vtab_tasks(root, names)
    if what == "fgvc":
        from ..benchmarks.fgvc import fgvc_tasks

        return "FGVC", fgvc_tasks(root, names)
    from ..benchmarks.folders import folder_tasks

    return root.resolve().name, folder_tasks(root, names)


def _drawn(made: BenchmarkTable, picture: Path | None) -> list[str]:
    if picture is None:
        return []
    from ..benchmarks import benchmark_figure
    from ..files.picture import save_picture

    save_picture(benchmark_figure(made), picture)
    return [f"written to {picture}"]


def _parts(tables: Sequence[BenchmarkTable], markdown: bool) -> list[Any]:
    from ..benchmarks.table_text import group_grid, notes, task_grid
    from ..benchmarks.table_text import markdown as in_markdown

    if markdown:
        return [in_markdown(tables)]
    parts: list[Any] = [_shown(group_grid(*tables)), ""]
    for made in tables:
        parts += [_shown(task_grid(made).turned()), "", *notes(made), ""]
    return parts[:-1]


def _shown(grid: Grid) -> Any:
    return table(grid.columns, grid.rows, grid.title)
