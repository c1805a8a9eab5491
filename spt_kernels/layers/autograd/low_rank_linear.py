"""The autograd functions of a linear layer that trains a LoRA, no more."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.native_calls import (
    ITSELF,
    LoraShape,
    available,
    launch_lora,
    launch_lora_gradients,
)
from ...ops.torch_internals import count_dispatch_modes, is_any_autocast_enabled
from .lora_call import LoraCall
from .lora_launches import grad_of_a_of_source
from .plain_backward import plain_backward, quick_backward
from .saved_input import RebuildingFunction, SavedInput, Tensors
from .tuned_linear import linear_with_lora

# multiplications of an input with a factor, above which those of a library are the faster ones
_SMALL = 2**16
_FP32 = torch.float32
_HAS_CPP = available()
_KEPT = SavedInput("tensor", _FP32)


class LowRankLinear(RebuildingFunction):
    """`TunedLinear` of a LoRA alone, whose two factors are both trained: see `SparseLinear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        lora: LoraCall,
    ) -> Tensor:
        """`[..., out]`, in the dtype that autocast, if it is on, gives to `F.linear`."""
        y, inner = linear_with_lora(x, weight, bias, lora_a, lora_b, lora)
        y = y.data  # no view, so that what follows may work on it in place
        recipe, kept = SavedInput.eager(x, y.dtype)
        ctx.save_for_backward(
            lora_a, lora_b, weight if ctx.needs_input_grad[0] else None, inner, *kept
        )
        ctx.saved_input, ctx.how = recipe, (lora, x.dtype)
        return y

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input and of both factors."""
        lora_a, lora_b, weight, inner, *kept = ctx.saved_tensors
        lora, x_dtype = ctx.how
        tensors = grad_output, weight, lora_a, lora_b
        return gradients_of(*tensors, lora, inner, ctx.saved_input, kept, x_dtype)


class SmallLowRankLinear(RebuildingFunction):
    """`LowRankLinear` of calls that are small: the C++ does their products in one go.

    The bottleneck is made again by the backward, sooner than it would be kept. Not so the input,
    which is kept whatever made it: to find out what could be made again takes longer than all that
    the C++ does. With a factor of eight columns that is 32 KB at most.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        lora: LoraCall,
        shape: LoraShape,
    ) -> Tensor:
        """`[..., out]`, fp32, of the `shape` that `small_shape` gave."""
        y = F.linear(x, weight, bias)
        launch_lora(
            *(shape, lora.scale, lora_a.data_ptr(), lora_b.data_ptr(), x.data_ptr(), y.data_ptr())
        )
        y = y.data
        ctx.save_for_backward(lora_a, lora_b, weight if ctx.needs_input_grad[0] else None, x)
        ctx.saved_input, ctx.how = _KEPT, (lora, shape)
        return y

    @staticmethod
    @quick_backward
    def backward(ctx: Any, grad_output: Tensor, is_plain: bool) -> tuple[Tensor | None, ...]:
        """Gradients of the input and of both factors."""
        lora_a, lora_b, weight, x = ctx.saved_tensors
        lora, shape = ctx.how
        if not (
            is_plain
            and grad_output.is_contiguous()
            # hooks may have put others in the places of those that the forward has looked at
            and x.dtype is _FP32
            and x.is_contiguous()
            and x.numel() == shape[0] * shape[1]
            and type(x) is Tensor
            and not x.is_neg()
            and (type(lora_a) is type(lora_b) is torch.nn.Parameter or _are_taken(lora_a, lora_b))
        ):
            tensors = grad_output, weight, lora_a, lora_b
            return *gradients_of(*tensors, lora, None, _KEPT, (x,), _FP32), None
        grad_x, address_of_grad_x = None, 0
        if weight is not None:
            grad_x = torch.matmul(grad_output, weight)
            address_of_grad_x = grad_x.data_ptr()
        grad_a, grad_b = torch.empty_like(lora_a), torch.empty_like(lora_b)
        launch_lora_gradients(
            *(shape, lora.scale, lora_a.data_ptr(), lora_b.data_ptr()),
            *(grad_output.data_ptr(), x.data_ptr(), *ITSELF),
            *(grad_a.data_ptr(), grad_b.data_ptr(), address_of_grad_x),
        )
        return grad_x, None, None, grad_a, grad_b, None, None


def _are_taken(*factors: Tensor) -> bool:
    """Whether factors, of which hooks have given at least one, are what the C++ takes."""
    return all(factor.dtype is _FP32 and factor.is_contiguous() for factor in factors)


class SmallSizes(NamedTuple):
    """What never changes of a layer's calls that the C++ does as a whole.

    Attributes:
        most: elements of an input with which they are small enough; -1 where none is.
        of_layer: features of input and output, rank, ranges; first, width and step of the ranges.
    """

    most: int
    of_layer: tuple[int, int, int, int, int, int, int]

    @classmethod
    def of(cls, weight: Tensor, lora_a: Tensor, lora: LoraCall) -> SmallSizes:
        """Of a layer with such tensors."""
        n_ranges, width, step, first, *_ = lora.groups[0]
        (out_features, in_features), n_factors = weight.shape, lora_a.shape[0]
        rank = n_factors // n_ranges
        of_layer = in_features, out_features, rank, n_ranges, first, width, step
        return cls(_SMALL // n_factors if len(lora.groups) == 1 else -1, of_layer)


def small_shape(
    sizes: SmallSizes, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor
) -> LoraShape | None:
    """What the C++ is told of a call on these; None where it is not for `SmallLowRankLinear`.

    Whoever asks knows that no transform is at work, and nothing compiled.
    """
    numel = x.numel()
    if (
        numel <= sizes.most
        and _HAS_CPP
        and x.is_cpu
        and x.dtype is lora_a.dtype is lora_b.dtype is _FP32  # a weight that is not is refused
        and x.is_contiguous()
        and lora_a.is_contiguous()
        and lora_b.is_contiguous()
        and not is_any_autocast_enabled()
        and type(x) is Tensor
        and not x.is_neg()
        and count_dispatch_modes() == 0
    ):
        of_layer = sizes.of_layer
        return numel // of_layer[0], *of_layer
    return None


def gradients_of(
    grad_output: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    lora: LoraCall,
    inner: Tensor | None,
    saved: SavedInput,
    kept: Tensors,
    x_dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """Those of `LowRankLinear`, for each of its arguments, whoever has made its forward.

    Args:
        grad_output: `[..., out]`.
        weight: None where the input needs no gradient.
        lora_a: of the LoRA.
        lora_b: of the LoRA.
        lora: its call.
        inner: its bottleneck; None where that was not kept, and is made again.
        saved: the input.
        kept: what was saved of it.
        x_dtype: its dtype.
    """
    *shape, out_features = grad_output.shape
    gy = grad_output.reshape(-1, out_features)  # [tokens, out]
    grad_inner = lora.grad_of_inner(gy, lora_b)
    grad_a = None if inner is None else grad_of_a_of_source(lora, grad_inner, saved)
    if grad_a is None:
        x = saved.rebuild(kept)
        if inner is None:
            inner = lora.bottleneck(x, lora_a)
        grad_a = lora.grad_of_a(grad_inner, x, may_write=saved.kind != "tensor")
        del x  # before the gradient of the same size is made
    assert inner is not None
    grad_b = lora.grad_of_b(gy, inner)
    if weight is None:
        return None, None, None, grad_a, grad_b, None
    if weight.dtype is not gy.dtype:
        weight = weight.to(gy.dtype)
    grad_x = lora.grad_of_x(gy, weight, grad_inner, lora_a, x_dtype)
    return grad_x.view(*shape, lora_a.shape[1]), None, None, grad_a, grad_b, None
