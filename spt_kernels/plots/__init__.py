"""The paper's pictures and ablations, from saved files: numbers as dataclasses, drawn apart."""

from __future__ import annotations

from .accuracy import AccuracyTable, accuracy_by_budget, samples_ablation, structure_ablation
from .allocated import Allocation, allocation
from .figures import (
    allocation_figure,
    budget_figure,
    overlap_figure,
    pretraining_figure,
    samples_figure,
    shares_figure,
    structure_figure,
)
from .overlap import SelectionOverlap, selection_overlap
from .runs import read_runs
from .shares import TaskShares, share_by_block, share_by_operation, task_shares
from .sources import load_selection, task_files
from .variance import TaskVariance, variance_over_tasks

__all__ = [
    "AccuracyTable",
    "Allocation",
    "SelectionOverlap",
    "TaskShares",
    "TaskVariance",
    "accuracy_by_budget",
    "allocation",
    "allocation_figure",
    "budget_figure",
    "load_selection",
    "overlap_figure",
    "pretraining_figure",
    "read_runs",
    "samples_ablation",
    "samples_figure",
    "selection_overlap",
    "share_by_block",
    "share_by_operation",
    "shares_figure",
    "structure_ablation",
    "structure_figure",
    "task_files",
    "task_shares",
    "variance_over_tasks",
]
