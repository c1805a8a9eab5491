"""The single door to the C++, which gets addresses of tensors and believes what it is told of them.

Whatever is named after an op checks the device, dtype, layout and length of each tensor, and raises
`ValueError` before anything is written: `accumulate_squared_grad`, `add_sparse_rows`, `dropout`,
`fingerprint`, `rebuild_layer_norm`, `sample_block`, `sparse_adamw`, `sparse_weight_grad`,
`top_tau`, `write_delta`. So does making a plan, an `AdamWPlan` or a `WeightGradPlan`.

Nothing is checked by whatever is named `launch_…` (`launch_lora`, `launch_lora_gradients`,
`launch_rebuild_layer_norm`), nor by `AdamWPlan.step` and `WeightGradPlan.run`. A layer or optimizer
calls these, in each step, with tensors that it has looked at itself, and a wrong one is memory read
or written that is another's.

Tensors live as long as a call because its arguments hold them; an `Activation`, an `AdamWPlan` and
the gradients of its step are addresses, and whoever makes these holds the tensors.

All of it runs with the GIL released and gives the same bits for any number of threads, which are
`torch.get_num_threads()`; in `launch_lora` and `launch_lora_gradients` it is the caller's alone.
"""

from .activation import GELU, ITSELF, LAYER_NORM, TANH_GELU, Activation
from .add_sparse_rows import add_sparse_rows
from .dropout import dropout
from .fingerprint import fingerprint
from .layout import DTYPE_NUMBERS
from .low_rank import Shape as LoraShape
from .low_rank import launch_lora, launch_lora_gradients
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
from .sparse_weight_grad import WeightGradPlan, sample_block, sparse_weight_grad
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
    "add_sparse_rows",
    "available",
    "dropout",
    "fingerprint",
    "instruction_set",
    "launch_lora",
    "launch_lora_gradients",
    "launch_rebuild_layer_norm",
    "limit_instruction_set",
    "rebuild_layer_norm",
    "sample_block",
    "sparse_adamw",
    "sparse_weight_grad",
    "top_tau",
    "top_tau_bytes_read",
    "why_unavailable",
    "write_delta",
]
