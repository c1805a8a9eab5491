"""An activation's derivative in a few bits: the specification of its codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

_SATURATED = 20.0  # beyond it every derivative is 0 or 1 in fp32


def quick_gelu(x: Tensor) -> Tensor:
    """`x σ(1.702 x)`, as timm and transformers compute it."""
    return x * torch.sigmoid(1.702 * x)


# name -> the activation as its users call it
FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick-gelu": quick_gelu,
}


def derivative(x: Tensor, function: str) -> Tensor:
    """f'(x) in fp32, by torch's own backward."""
    x = x.float().nan_to_num(nan=-_SATURATED).clamp_(-_SATURATED, _SATURATED)
    ones, aten = torch.ones_like(x), torch.ops.aten
    if function in ("gelu", "gelu-tanh"):
        approximate = "tanh" if function == "gelu-tanh" else "none"
        return aten.gelu_backward(ones, x, approximate=approximate)  # type: ignore[no-any-return]
    # x σ(f x) is silu(f x) / f
    scaled = 1.702 * x if function == "quick-gelu" else x
    return aten.silu_backward(ones, scaled)  # type: ignore[no-any-return]


def encode(x: Tensor, function: str, bits: int, boundary: float, steps: int, zero: int) -> Tensor:
    """The codes of f' at the elements of `x`.

    Args:
        x: `[n]`.
        function: of `FUNCTIONS`.
        bits: 2 or 8.
        boundary: of 2 bits: codes 0 to 3 are for x up to -boundary, 0, boundary, and beyond.
        steps: of 8 bits: f' is rounded to multiples of 1 / steps.
        zero: of 8 bits: the code of 0.

    Returns:
        uint8 `[⌈n · bits / 8⌉]`; of 2 bits, four to a byte, the first in its lowest bits.
    """
    if bits == 8:
        return derivative(x, function).mul_(steps).add_(zero + 0.5).floor_().to(torch.uint8)
    x = x.float()
    codes = (x > -boundary).view(torch.uint8) + (x > 0).view(torch.uint8)
    codes += (x > boundary).view(torch.uint8)
    fours = F.pad(codes, (0, -len(codes) % 4)).view(-1, 4)
    return fours[:, 0] | fours[:, 1] << 2 | fours[:, 2] << 4 | fours[:, 3] << 6


def decode(grad_output: Tensor, codes: Tensor, levels: Tensor) -> Tensor:
    """`grad_output` times the derivatives that its codes stand for.

    Args:
        grad_output: `[n]`.
        codes: of `encode`.
        levels: fp32 `[256, codes in a byte]`: the derivatives that each byte stands for.

    Returns:
        `[n]`, in the dtype of `grad_output`, multiplied in fp32 if that is narrower.
    """
    derivatives = levels.index_select(0, codes.int()).view(-1)[: len(grad_output)]
    return (grad_output * derivatives).to(grad_output.dtype)
