"""What a use of a parameter brings in the backward pass, and the observer that takes it there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .uses import Factors, Role
from .watched import Piece


class Arrival(NamedTuple):
    """What one use brings in the backward pass, still to be multiplied out.

    Attributes:
        parts: the parameters in the use, each with its role.
        samples: of the batch; `rows` are so many, or a multiple of it.
        grad_output: `[rows, ...]`.
        saved: what the rules of roles take besides, `[rows, ...]` each; the input comes first.
    """

    parts: list[tuple[Piece, Role]]
    samples: int
    grad_output: Tensor
    saved: tuple[Tensor, ...]

    def factors(self, piece: Piece, role: Role, first: int, stop: int) -> Factors:
        """What some of the samples bring for a parameter."""
        grad_output, saved = self.grad_output, self.saved if role.needs_input else ()
        if stop - first != self.samples:
            k = grad_output.shape[0] // self.samples
            rows = slice(first * k, stop * k)
            grad_output, saved = grad_output[rows], tuple(tensor[rows] for tensor in saved)
        factors = role.rule(stop - first, grad_output, *saved)
        return factors if piece.stop is None else factors.among(slice(piece.start, piece.stop))


class Observer(torch.autograd.Function):
    """Identity that hands the gradient passing through it, and what was saved, to `receive`."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, output: Tensor, receive: Callable[..., None], *saved: Tensor
    ) -> Tensor:
        """`output`, as a result of its own; `anchor` asks for the gradient."""
        ctx.set_materialize_grads(False)
        ctx.receive = receive
        ctx.save_for_backward(*saved)
        # An alias that autograd takes for a result of its own: returning `output` would make a view
        # that the model could not modify in place. Nobody else sees `output` itself.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient as it came, when `receive` has had it; None says that there is none."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the model differentiates a gradient (create_graph=True) that depends on measured "
                "parameters: leave them out with exclude"
            )
        saved = ctx.saved_tensors  # read once: a checkpoint unpacks them only once
        if grad_output is not None:
            ctx.receive(grad_output, *saved)
        return (None, grad_output, None) + (None,) * len(saved)
