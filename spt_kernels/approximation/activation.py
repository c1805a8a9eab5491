"""Activations that keep a few bits of their derivative instead of their input."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.autograd.plain_backward import plain_backward
from ..layers.sparse_layer import SparseDeltaLayer
from ..ops.dtypes import FLOATS
from ..ops.encode_derivative import (
    FUNCTIONS,
    decode_derivative,
    encode_derivative,
    launch_decode,
    launch_encode,
)
from ..ops.launching import is_transformed, may_launch
from .stand_in import StandIn

_NAME = re.compile("gelu|silu|swish", re.IGNORECASE)
_KNOWN = ("torch", "timm", "transformers")  # whose activations take one tensor


class EncodedActivation(torch.autograd.Function):
    """An activation, exact, whose backward multiplies by a derivative of 2 or 8 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: str, bits: int, in_place: bool) -> Tensor:
        """`function(x)`, in `x` if in place; codes of its derivative are all that is kept."""
        encode = launch_encode if may_launch(x) else encode_derivative
        y, codes = encode(x, function, bits)
        ctx.save_for_backward(codes)
        ctx.how, ctx.strides = (function, bits), y.stride()
        if not in_place:
            return y
        ctx.mark_dirty(x)
        return x.copy_(y)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient that came in, times the levels of the codes."""
        (codes,) = ctx.saved_tensors
        if grad_output.stride() != ctx.strides:  # codes lie as the output does
            ordered = grad_output.new_empty_strided(grad_output.shape, ctx.strides)
            grad_output = ordered.copy_(grad_output)
        decode = launch_decode if may_launch(grad_output) else decode_derivative
        return decode(grad_output, codes, *ctx.how), None, None, None


class ApproximateActivation(StandIn):
    """Stands in for the forward of a GELU, a SiLU or a QuickGELU.

    Attributes:
        function: of `FUNCTIONS`.
        bits: 2 or 8.
        follower: the layer that takes the output. Where it is tuned by us, it would rebuild its
            input from what an exact activation keeps; now it has to keep what it needs of it.
    """

    def __init__(
        self, module: nn.Module, function: str, bits: int, follower: nn.Module | None
    ) -> None:
        super().__init__(module)
        self.function, self.bits, self.follower = function, bits, follower

    def __call__(self, input: Tensor) -> Tensor:
        """What the module gives, whatever is kept for the backward."""
        is_kept = torch.is_grad_enabled() and input.requires_grad and self.saves(input)
        if not is_kept or is_transformed():  # transforms are of the exact one
            return self.plain(input)  # type: ignore[no-any-return]
        # somebody may look at what was there, or not at what is returned
        in_place = bool(getattr(self.module, "inplace", False))
        if in_place and torch.compiler.is_compiling():  # compilers know no function in place
            return input.copy_(EncodedActivation.apply(input, self.function, self.bits, False))
        y: Tensor = EncodedActivation.apply(input, self.function, self.bits, in_place)
        return y

    def saves(self, input: Tensor) -> bool:
        """Whether less is kept for such an input than by the exact activation."""
        if input.dtype not in FLOATS:
            return False
        follower = self.follower
        share = follower.needed_share() if isinstance(follower, SparseDeltaLayer) else 0.0
        return share + self.bits / (8 * input.element_size()) < 1


def function_of(module: nn.Module) -> str | None:
    """Which of `FUNCTIONS` a module computes, to the bit; None for anything else."""
    kind = type(module)
    of_library = kind.__module__.partition(".")[0] in _KNOWN
    if not (of_library and _NAME.search(kind.__name__)) or next(module.children(), None):
        return None
    if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
        return None
    probe = torch.linspace(-6, 6, 193, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        found = kind.forward(module, probe.clone())  # some work in place
        return next((n for n, f in FUNCTIONS.items() if torch.equal(f(probe), found)), None)
