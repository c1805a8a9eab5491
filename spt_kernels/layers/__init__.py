"""The layers that stand in for plain ones while a model is tuned."""

from .adapter import AdapterLinear
from .conv import SparseDeltaConv2d
from .linear import SparseDeltaLinear
from .lookup import sparse_deltas, tuned_modules
from .lora import LoraLinear
from .norm import SparseDeltaNorm
from .parameter import AttachDelta, attach_parameter, detach_parameters, is_attached
from .sparse_delta import SparseDelta, delta_of, restore_deltas, write_deltas

__all__ = [
    "AdapterLinear",
    "AttachDelta",
    "LoraLinear",
    "SparseDelta",
    "SparseDeltaConv2d",
    "SparseDeltaLinear",
    "SparseDeltaNorm",
    "attach_parameter",
    "delta_of",
    "detach_parameters",
    "is_attached",
    "restore_deltas",
    "sparse_deltas",
    "tuned_modules",
    "write_deltas",
]
