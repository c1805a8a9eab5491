"""What a layer becomes while a model is tuned."""

from .adapter import AdapterConv2d, AdapterLayer, AdapterLinear
from .all_or_nothing import all_or_nothing
from .autograd.attach import AttachDelta
from .conv import SparseDeltaConv2d
from .deltas.sparse_delta import SparseDelta, delta_of, restore_deltas, write_deltas
from .earlier_names import know_earlier_names
from .frozen_layers import FrozenConv2d, FrozenLinear, freeze_layer
from .in_place import SetAside, put_back, set_aside, tune_in_place, untune
from .linear import SparseDeltaLinear
from .lookup import sparse_deltas, tuned_modules
from .lora import LoraConv2d, LoraLayer, LoraLinear
from .norm import SparseDeltaNorm, tune_norm
from .parameter import attach_parameter, attach_whole
from .quantized import QuantizedAdapterLinear, QuantizedDeltaLinear, QuantizedLoraLinear
from .tuned_class import is_tuned, plain_class

__all__ = [
    "AdapterConv2d",
    "AdapterLayer",
    "AdapterLinear",
    "AttachDelta",
    "FrozenConv2d",
    "FrozenLinear",
    "LoraConv2d",
    "LoraLayer",
    "LoraLinear",
    "QuantizedAdapterLinear",
    "QuantizedDeltaLinear",
    "QuantizedLoraLinear",
    "SetAside",
    "SparseDelta",
    "SparseDeltaConv2d",
    "SparseDeltaLinear",
    "SparseDeltaNorm",
    "all_or_nothing",
    "attach_parameter",
    "attach_whole",
    "delta_of",
    "freeze_layer",
    "is_tuned",
    "plain_class",
    "put_back",
    "restore_deltas",
    "set_aside",
    "sparse_deltas",
    "tune_in_place",
    "tune_norm",
    "tuned_modules",
    "untune",
    "write_deltas",
]

know_earlier_names()
