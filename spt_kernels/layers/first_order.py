"""The refusal of second derivatives: an error where a wrong number would come out otherwise."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def first_derivative_only(backward: Backward) -> Backward:
    """Run a backward without recording it, and fail if its results are differentiated.

    Torch's `once_differentiable` says nothing when only the saved tensors, and not the gradient
    that came in, depend on what is differentiated: a gradient penalty would lose terms in silence.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():  # an ordinary backward records nothing
            return backward(ctx, *grad_outputs)
        with torch.no_grad():
            grads = backward(ctx, *grad_outputs)
        if torch.compiler.is_compiling():
            return grads
        present = [grad for grad in grads if grad is not None]
        if not present:
            return grads
        anchor = torch.empty(0, device=present[0].device, requires_grad=True)
        guarded = iter(_FirstDerivative.apply(anchor, *present))
        return tuple(None if grad is None else next(guarded) for grad in grads)

    return wrapper


class _FirstDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise RuntimeError(
            "a layer tuned or approximated by spt_kernels has first derivatives only: its backward "
            "cannot be differentiated again (create_graph=True, gradient penalties): use the plain "
            "layer"
        )
