"""The C++ that layers and the optimizer call past the ops: the very functions of `native`.

They are what one layer, or all entries of a step, need in one call, where ops would be several.
Whoever calls them has asked whether there is C++ here, and knows that tensors are on a CPU and what
their layouts are: `native` says which of these look.
"""

from __future__ import annotations

from ..native import DTYPE_NUMBERS as DTYPE_NUMBERS
from ..native import GELU as GELU
from ..native import ITSELF as ITSELF
from ..native import LAYER_NORM as LAYER_NORM
from ..native import TANH_GELU as TANH_GELU
from ..native import Activation as Activation
from ..native import AdamWPlan as AdamWPlan
from ..native import LoraShape as LoraShape
from ..native import available as available
from ..native import launch_lora as launch_lora
from ..native import launch_lora_gradients as launch_lora_gradients
