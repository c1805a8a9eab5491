"""The products of a LoRA too small for a library's calls, in C++: one call in each direction.

No registered op comes here: a layer's autograd function calls them in place of several ops. They
are small, so that one thread does all, the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .module import available, module

# tokens, features of input and output, rank, ranges; first feature, width and step of the ranges
Shape = tuple[int, int, int, int, int, int, int, int]

_CPP: Any = module() if available() else None

# The C++ functions themselves, as a frame around one would take as long as what it does. Of all
# tensors they take the addresses, fp32 and contiguous on a CPU; whoever calls holds the tensors.

# (shape, scale, lora_a, lora_b, input, output) -> None: adds `scale · input aᵀ bᵀ` to ranges of
# the features of `output`, `[tokens, out]`; `lora_a` is `[ranges · rank, in]`, `lora_b`
# `[ranges · width, rank]` and `input` `[tokens, in]`.
launch_lora: Callable[..., None] = getattr(_CPP, "add_lora", None)  # type: ignore[assignment]

# (shape, scale, lora_a, lora_b, grad_output, input, *activation, grad_a, grad_b, grad_input) ->
# None: writes the gradients of both factors, and adds that of the input to `grad_input` unless its
# address is 0. The LoRA was given `activation`, an `Activation`, of `input`.
launch_lora_gradients: Callable[..., None] = getattr(  # type: ignore[assignment]
    _CPP, "lora_gradients", None
)
