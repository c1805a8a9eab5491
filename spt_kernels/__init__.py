"""The public verbs and nouns of `spt_kernels`, each loaded on first use: importing is free.

Neither a GPU, nor Triton, nor the compiled module is needed to import; `backends()` says which
of them are present.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> folder or file that has it, in the order in which data flows
_HOME = {
    "Sensitivity": "sensitivity",
    "measure_sensitivity": "sensitivity",
    "AdapterSpec": "plan",
    "LoraSpec": "plan",
    "Plan": "plan",
    "allocate": "plan",
    "allocate_each": "plan",
    "AdapterLinear": "layers",
    "LoraLinear": "layers",
    "SparseDeltaConv2d": "layers",
    "SparseDeltaLinear": "layers",
    "SparseDeltaNorm": "layers",
    "apply": "tuning",
    "SparseAdamW": "optim",
    "param_groups": "optim",
    "load_delta": "task",
    "merge": "task",
    "save_delta": "task",
    "unload": "task",
    "LargestBatch": "memory",
    "MemoryEstimate": "memory",
    "estimate_memory": "memory",
    "largest_batch": "memory",
    "BaseModelMismatch": "errors",
    "DeltaFormatError": "errors",
    "backends": "environment",
}
_FOLDERS = ("methods", "ops")  # public as they are

__all__ = [
    "AdapterLinear",
    "AdapterSpec",
    "BaseModelMismatch",
    "DeltaFormatError",
    "LargestBatch",
    "LoraLinear",
    "LoraSpec",
    "MemoryEstimate",
    "Plan",
    "Sensitivity",
    "SparseAdamW",
    "SparseDeltaConv2d",
    "SparseDeltaLinear",
    "SparseDeltaNorm",
    "__version__",
    "allocate",
    "allocate_each",
    "apply",
    "backends",
    "estimate_memory",
    "largest_batch",
    "load_delta",
    "measure_sensitivity",
    "merge",
    "methods",
    "ops",
    "param_groups",
    "save_delta",
    "unload",
]

if TYPE_CHECKING:
    from . import methods as methods
    from . import ops as ops
    from .environment import backends
    from .errors import BaseModelMismatch, DeltaFormatError
    from .layers import (
        AdapterLinear,
        LoraLinear,
        SparseDeltaConv2d,
        SparseDeltaLinear,
        SparseDeltaNorm,
    )
    from .memory import LargestBatch, MemoryEstimate, estimate_memory, largest_batch
    from .optim import SparseAdamW, param_groups
    from .plan import AdapterSpec, LoraSpec, Plan, allocate, allocate_each
    from .sensitivity import Sensitivity, measure_sensitivity
    from .task import load_delta, merge, save_delta, unload
    from .tuning import apply


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value  # the next access is an ordinary one
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
