"""The public verbs and nouns of `spt_kernels`, each loaded on first use: importing is free.

Neither a GPU, nor Triton, nor the compiled module is needed to import; `backends()` says which
of them are present.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .files.first_use import names_on_first_use

__version__ = "0.10.1"

# folder or file -> the public names that it has, in the order in which data flows
_NAMES = {
    "sensitivity": ("Sensitivity", "measure_sensitivity"),
    "plan": ("AdapterSpec", "LoraSpec", "Plan", "allocate", "allocate_each"),
    "layers": (
        *("AdapterConv2d", "AdapterLinear", "LoraConv2d", "LoraLinear"),
        *("SparseDeltaConv2d", "SparseDeltaLinear", "SparseDeltaNorm"),
    ),
    "recomputation": ("Recomputation",),
    "approximation": ("Approximation", "approximate"),
    "tuning": ("apply",),
    "optim": ("SparseAdamW", "param_groups"),
    "offloading": ("Offload", "OffloadedAdamW", "offload"),
    "step": ("capture_step",),
    "task": ("dequantize", "load_delta", "merge", "read_metadata", "save_delta", "unload"),
    "bank": ("TaskBank",),
    "memory": (
        *("LargestBatch", "MemoryEstimate", "estimate_memory", "largest_batch"),
        "tunable_parts",
    ),
    "fitting": ("PlanWithin", "RecomputePlan", "allocate_within", "recompute"),
    "errors": ("BaseModelMismatch", "DeltaFormatError", "OtherProcessFailed"),
    "environment": ("backends",),
}
_HOME = {name: home for home, names in _NAMES.items() for name in names}
_FOLDERS = ("methods", "ops")  # public as they are

__all__ = sorted([*_HOME, *_FOLDERS, "__version__"])

if TYPE_CHECKING:
    from . import ops as ops
    from .approximation import Approximation as Approximation
    from .approximation import approximate as approximate
    from .bank import TaskBank as TaskBank
    from .environment import backends as backends
    from .errors import BaseModelMismatch as BaseModelMismatch
    from .errors import DeltaFormatError as DeltaFormatError
    from .errors import OtherProcessFailed as OtherProcessFailed
    from .fitting import PlanWithin as PlanWithin
    from .fitting import RecomputePlan as RecomputePlan
    from .fitting import allocate_within as allocate_within
    from .fitting import recompute as recompute
    from .layers import AdapterConv2d as AdapterConv2d
    from .layers import AdapterLinear as AdapterLinear
    from .layers import LoraConv2d as LoraConv2d
    from .layers import LoraLinear as LoraLinear
    from .layers import SparseDeltaConv2d as SparseDeltaConv2d
    from .layers import SparseDeltaLinear as SparseDeltaLinear
    from .layers import SparseDeltaNorm as SparseDeltaNorm
    from .memory import LargestBatch as LargestBatch
    from .memory import MemoryEstimate as MemoryEstimate
    from .memory import estimate_memory as estimate_memory
    from .memory import largest_batch as largest_batch
    from .memory import tunable_parts as tunable_parts
    from .methods import _Methods
    from .offloading import Offload as Offload
    from .offloading import OffloadedAdamW as OffloadedAdamW
    from .offloading import offload as offload
    from .optim import SparseAdamW as SparseAdamW
    from .optim import param_groups as param_groups
    from .plan import AdapterSpec as AdapterSpec
    from .plan import LoraSpec as LoraSpec
    from .plan import Plan as Plan
    from .plan import allocate as allocate
    from .plan import allocate_each as allocate_each
    from .recomputation import Recomputation as Recomputation
    from .sensitivity import Sensitivity as Sensitivity
    from .sensitivity import measure_sensitivity as measure_sensitivity
    from .step import capture_step as capture_step
    from .task import dequantize as dequantize
    from .task import load_delta as load_delta
    from .task import merge as merge
    from .task import read_metadata as read_metadata
    from .task import save_delta as save_delta
    from .task import unload as unload
    from .tuning import apply as apply

    methods: _Methods


_on_first_use = names_on_first_use(__name__, _HOME)


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return importlib.import_module(f".{name}", __name__)
    return _on_first_use(name)


def __dir__() -> list[str]:
    return sorted(__all__)
