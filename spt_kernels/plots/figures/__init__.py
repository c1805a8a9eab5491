"""One picture per file, each drawn from the numbers of the folder above."""

from __future__ import annotations

from .allocation import allocation_figure
from .budget import budget_figure
from .overlap import overlap_figure
from .pretraining import pretraining_figure
from .samples import samples_figure
from .shares import shares_figure
from .structure import structure_figure

__all__ = [
    "allocation_figure",
    "budget_figure",
    "overlap_figure",
    "pretraining_figure",
    "samples_figure",
    "shares_figure",
    "structure_figure",
]
