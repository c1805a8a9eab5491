"""The single door to the C++: dtype, layout and lifetime of tensors are settled here.

Every function runs with the GIL released on `torch.get_num_threads()` threads and gives the same
bits for any number of them.
"""

from .add_sparse_rows import add_sparse_rows
from .dropout import dropout
from .fingerprint import fingerprint
from .layout import DTYPE_NUMBERS
from .low_rank import Shape as LoraShape
from .low_rank import add_lora, lora_gradients
from .module import (
    INSTRUCTION_SETS,
    available,
    instruction_set,
    limit_instruction_set,
    why_unavailable,
)
from .rebuild_input import launch as launch_rebuild_layer_norm
from .rebuild_input import rebuild_layer_norm
from .sparse_adamw import AdamWPlan, sparse_adamw
from .sparse_weight_grad import (
    GELU,
    ITSELF,
    LAYER_NORM,
    TANH_GELU,
    Activation,
    WeightGradPlan,
    sample_block,
    sparse_weight_grad,
)
from .squared_grad import accumulate_squared_grad
from .top_tau import top_tau, top_tau_bytes_read
from .write_delta import write_delta

__all__ = [
    "DTYPE_NUMBERS",
    "GELU",
    "INSTRUCTION_SETS",
    "ITSELF",
    "LAYER_NORM",
    "TANH_GELU",
    "Activation",
    "AdamWPlan",
    "LoraShape",
    "WeightGradPlan",
    "accumulate_squared_grad",
    "add_lora",
    "add_sparse_rows",
    "available",
    "dropout",
    "fingerprint",
    "instruction_set",
    "launch_rebuild_layer_norm",
    "limit_instruction_set",
    "lora_gradients",
    "rebuild_layer_norm",
    "sample_block",
    "sparse_adamw",
    "sparse_weight_grad",
    "top_tau",
    "top_tau_bytes_read",
    "why_unavailable",
    "write_delta",
]
