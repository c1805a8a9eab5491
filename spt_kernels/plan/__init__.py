"""What to train within a budget: a `Sensitivity` becomes a `Plan`."""

from .allocation import allocate, allocate_each
from .cell import Cell
from .plan import Plan
from .specs import AdapterSpec, LoraSpec, module_cost, module_spec

__all__ = [
    "AdapterSpec",
    "Cell",
    "LoraSpec",
    "Plan",
    "allocate",
    "allocate_each",
    "module_cost",
    "module_spec",
]
