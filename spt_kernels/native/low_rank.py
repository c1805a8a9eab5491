"""The products of a LoRA too small for a library's calls, in C++: one call in each direction.

No registered op comes here: a layer's autograd function calls them in place of several ops. They
are small, so that one thread does all, the caller's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .activation import Activation
from .module import available, module

# tokens, features of input and output, rank, ranges; first feature, width and step of the ranges
Shape = tuple[int, int, int, int, int, int, int, int]

# asked for once: each frame is felt in a step of so small a model
_CPP: Any = module() if available() else None


def launch_lora(
    shape: Shape, scale: float, lora_a: Tensor, lora_b: Tensor, input: Tensor, output: Tensor
) -> None:
    """Add `scale · input aᵀ bᵀ` to ranges of the features of `output`; nothing is checked.

    Args:
        shape: of the call.
        scale: of the LoRA.
        lora_a: `[ranges · rank, in]`, fp32 and contiguous on a CPU, as all of them.
        lora_b: `[ranges · width, rank]`.
        input: `[tokens, in]`.
        output: `[tokens, out]`, is written.
    """
    _CPP.add_lora(
        shape,
        scale,
        lora_a.data_ptr(),
        lora_b.data_ptr(),
        input.data_ptr(),
        output.data_ptr(),
    )


def launch_lora_gradients(
    shape: Shape,
    scale: float,
    lora_a: Tensor,
    lora_b: Tensor,
    grad_output: Tensor,
    input: Tensor,
    activation: Activation,
    grad_input: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of both factors; that of the input, if it is given, is added to `grad_input`.

    Nothing is checked, as in `launch_lora`.

    Args:
        shape: as that of `launch_lora`.
        scale: likewise.
        lora_a: likewise.
        lora_b: likewise.
        grad_output: `[tokens, out]`.
        input: `[tokens, in]`.
        activation: what the LoRA was given, if that is not `input` itself; its tensors are held by
            whoever calls.
        grad_input: `[tokens, in]`, is written; or None.
    """
    grad_a, grad_b = torch.empty_like(lora_a), torch.empty_like(lora_b)
    _CPP.lora_gradients(
        shape,
        scale,
        lora_a.data_ptr(),
        lora_b.data_ptr(),
        grad_output.data_ptr(),
        input.data_ptr(),
        *activation,
        grad_a.data_ptr(),
        grad_b.data_ptr(),
        0 if grad_input is None else grad_input.data_ptr(),
    )
    return grad_a, grad_b
