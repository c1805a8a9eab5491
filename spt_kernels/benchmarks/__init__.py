"""Benchmarks of many tasks: where their images are, and a run for each method, task and seed."""

from __future__ import annotations

from .fgvc import fgvc_tasks
from .folders import folder_tasks
from .task import BenchmarkTask
from .vtab import vtab_tasks

__all__ = ["BenchmarkTask", "fgvc_tasks", "folder_tasks", "vtab_tasks"]
