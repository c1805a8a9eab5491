"""The autograd functions through which the gradient of a parameter finds what is trained of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class AttachDelta(torch.autograd.Function):
    """A parameter as it is, through which the gradient finds its sparse delta.

    The parameter holds base + delta already, so that the forward gives a view of it and computes
    nothing. The gradient of the whole parameter exists for a moment in the backward: meant for
    parameters that are small, or whose gradient is dense anyway.
    """

    @staticmethod
    def forward(ctx: Any, target: Tensor, delta: Tensor, index: Tensor) -> Tensor:
        """A view of `target`; to a compiler, which takes none from a function, a copy."""
        ctx.save_for_backward(index)
        ctx.delta_dtype = delta.dtype
        return target.clone() if torch.compiler.is_compiling() else target.view_as(target)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient at the index, which may be differentiated further."""
        (index,) = ctx.saved_tensors
        return None, grad.reshape(-1).index_select(0, index).to(ctx.delta_dtype), None


class AttachWhole(torch.autograd.Function):
    """A parameter of 16 bits as it is, through which the gradient finds its values in fp32."""

    @staticmethod
    def forward(ctx: Any, target: Tensor, values: Tensor) -> Tensor:
        """As `AttachDelta`."""
        return target.clone() if torch.compiler.is_compiling() else target.view_as(target)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient in fp32, which may be differentiated further."""
        return None, grad.float().contiguous()
