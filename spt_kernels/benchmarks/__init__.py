"""Benchmarks of many tasks: where their images are, and a run for each method, task and seed.

Names load on first use, so that the command line need not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..files.first_use import names_on_first_use

_NAMES = {
    "cell": ("Cell", "CellResult", "Place", "run_cell"),
    "chart": ("benchmark_figure",),
    "fgvc": ("fgvc_tasks",),
    "folders": ("folder_tasks",),
    "run": ("run_benchmark",),
    "setting": ("BenchmarkSetting",),
    "table": ("BenchmarkTable", "benchmark_table"),
    "task": ("BenchmarkTask",),
    "vtab": ("vtab_tasks",),
}
_HOME = {name: home for home, names in _NAMES.items() for name in names}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from .cell import Cell as Cell
    from .cell import CellResult as CellResult
    from .cell import Place as Place
    from .cell import run_cell as run_cell
    from .chart import benchmark_figure as benchmark_figure
    from .fgvc import fgvc_tasks as fgvc_tasks
    from .folders import folder_tasks as folder_tasks
    from .run import run_benchmark as run_benchmark
    from .setting import BenchmarkSetting as BenchmarkSetting
    from .table import BenchmarkTable as BenchmarkTable
    from .table import benchmark_table as benchmark_table
    from .task import BenchmarkTask as BenchmarkTask
    from .vtab import vtab_tasks as vtab_tasks

__getattr__ = names_on_first_use(__name__, _HOME)
