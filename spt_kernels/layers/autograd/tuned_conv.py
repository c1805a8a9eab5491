"""The autograd function of every tuned convolution: sparse delta and LoRA in one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..deltas.sparse_delta import check_trained_whole
from .autocast import wide_dtype
from .own_memory import own_memory
from .plain_backward import plain_backward
from .pointwise_lora import PointwiseLora
from .saved_input import RebuildingFunction, SavedInput, Tensors
from .sparse_gradient import DeltaPattern, sparse_gradient
from .traced import made_again


@dataclass(frozen=True)
class ConvGeometry:
    """How a convolution moves over its input."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def is_patchwise(self) -> bool:
        """Whether patches do not overlap: then it is a linear layer on patches."""
        return (
            self.stride == self.kernel
            and self.padding == (0, 0)
            and self.groups == 1
            and (self.dilation == (1, 1) or self.kernel == (1, 1))
        )

    def patches(self, x: Tensor) -> Tensor:
        """Input of the linear layer `[batch · height · width, in_channels · kernel]`."""
        (high, wide), (batch, channels) = self.kernel, x.shape[:2]
        rows, columns = x.shape[2] // high, x.shape[3] // wide
        x = x[:, :, : rows * high, : columns * wide]
        x = x.reshape(batch, channels, rows, high, columns, wide).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(batch * rows * columns, channels * high * wide)


@dataclass(frozen=True, eq=False)
class TouchedGroups:
    """The groups of a convolution that a delta lies in, apart from which its gradient needs none.

    Of a depthwise convolution they are the channels with trained entries.

    Attributes:
        count: how many.
        input_share: what share of all groups, and so of the channels of the input.
        inputs: int32, their channels of the input.
        outputs: int32, their channels of the output.
        index: `[nnz]`, flat positions in the weight of those groups alone.
    """

    count: int
    input_share: float
    inputs: Tensor
    outputs: Tensor
    index: Tensor

    @classmethod
    def of(cls, index: Tensor, weight: Tensor, groups: int) -> TouchedGroups:
        """Find the groups of flat positions in `weight`; all of them for an index on `meta`."""
        size = weight.numel() // groups
        if index.device.type == "meta":
            touched, compacted = torch.arange(groups, device="meta"), index
        else:
            touched, place = torch.unique(index // size, return_inverse=True)
            compacted = place * size + index % size
        outputs, inputs = weight.shape[0] // groups, weight.shape[1]
        share = len(touched) / groups
        return cls(
            len(touched), share, _members(touched, inputs), _members(touched, outputs), compacted
        )


def _members(groups: Tensor, size: int) -> Tensor:
    within = torch.arange(size, device=groups.device)
    return (groups[:, None] * size + within).flatten().int()


class TunedConv2d(RebuildingFunction):
    """`F.conv2d` on a weight that holds base + delta, plus a LoRA; gradients of what is trained.

    What that may be is as in `TunedLinear`.

    Patchwise convolutions (1×1, patch embeddings) sample the gradient of the delta as a Linear
    does. Of depthwise and other grouped ones, the weight gradient of the groups with trained
    entries is made, sampled and dropped, and only their channels of the input are kept; of a full
    3×3, the size of the weight, one layer at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        delta: Tensor | None,
        pattern: DeltaPattern | TouchedGroups | None,
        bias_delta: Tensor | None,
        bias_index: Tensor | None,
        geometry: tuple[Any, ...],
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        lora: PointwiseLora | None,
    ) -> Tensor:
        """`[batch, out, height, width]`, in the dtype that autocast gives to `F.conv2d`."""
        how = ConvGeometry(*geometry)
        needs_x, needs_weight, needs_bias, needs_delta, needs_bias_delta, needs_a, needs_b = _needs(
            ctx
        )
        if needs_weight or needs_bias:
            check_trained_whole((needs_weight, delta), (needs_bias, bias_delta))
        y = F.conv2d(x, weight, bias, how.stride, how.padding, how.dilation, how.groups)
        inner: Tensor | None = None
        if lora is not None and lora_a is not None and lora_b is not None:
            y = own_memory(y)
            inner = lora.add_to(y, x, lora_a, lora_b, how.stride)
        saved: SavedInput | None = None
        kept: Tensors = ()
        if needs_delta or needs_a or needs_weight:
            is_some = isinstance(pattern, TouchedGroups) and not (needs_a or needs_weight)
            channels = pattern.inputs if is_some else None  # type: ignore[union-attr]
            saved, kept = SavedInput.of(x, y.dtype, channels, dim=1)
        reads_lora = lora is not None and (needs_x or needs_a)
        ctx.save_for_backward(
            weight if needs_x or needs_weight or (needs_delta and not how.is_patchwise) else None,
            bias_index if needs_bias_delta else None,
            lora_a if reads_lora else None,
            lora_b if reads_lora else None,
            inner if needs_b else None,
            *kept,
        )
        ctx.saved_input, ctx.pattern, ctx.geometry, ctx.lora = saved, pattern, how, lora
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        return y

    @staticmethod
    @plain_backward
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all that is trained."""
        weight, bias_index, lora_a, lora_b, inner, *kept = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_delta, needs_bias_delta, needs_a, needs_b = _needs(
            ctx
        )
        how: ConvGeometry = ctx.geometry
        lora: PointwiseLora | None = ctx.lora
        x: Any = None
        grad_inner: Any = None
        grad_x = grad_weight = grad_bias = grad_delta = grad_bias_delta = grad_a = grad_b = None
        if weight is not None and weight.dtype is not gy.dtype:
            weight = made_again(weight.to(gy.dtype))
        if needs_bias_delta:
            total = gy.sum((0, 2, 3), dtype=wide_dtype(gy))
            grad_bias_delta = total.index_select(0, bias_index)
        if ctx.saved_input is not None:
            x = ctx.saved_input.rebuild(tuple(kept))
        if needs_weight:
            grad_weight = _convolution_backward(gy, x, weight, how, (False, True))[1]
        if needs_bias:
            grad_bias = gy.sum((0, 2, 3), dtype=wide_dtype(gy))
        if needs_delta:
            if how.is_patchwise:
                flat = gy.permute(0, 2, 3, 1).reshape(-1, gy.shape[1])
                grad_delta = sparse_gradient(flat, how.patches(x), ctx.pattern.whole)
            else:
                grad_delta = _grad_of_groups(gy, x, weight, ctx.pattern, how)
        if lora is not None:
            if needs_b:
                grad_b = lora.grad_of_b(gy, inner)
            if needs_x or needs_a:
                grad_inner = lora.grad_of_inner(gy, lora_b)
            if needs_a:
                grad_a = lora.grad_of_a(grad_inner, x, how.stride)
        del x  # before the gradient of the same size is made
        if needs_x:
            like = gy.new_empty(1).expand(ctx.x_shape)
            grad_x = _convolution_backward(gy, like, weight, how, (True, False))[0]
            if lora is not None:
                lora.add_grad_of_x(grad_x, grad_inner, lora_a, how.stride)
            grad_x = grad_x.to(ctx.x_dtype)
        of_deltas = grad_delta, None, grad_bias_delta, None
        return grad_x, grad_weight, grad_bias, *of_deltas, None, grad_a, grad_b, None


def _needs(ctx: Any) -> tuple[bool, ...]:
    """Whether gradients of input, weight, bias, both deltas and both factors are wanted."""
    needs: tuple[bool, ...] = ctx.needs_input_grad
    return *needs[:4], needs[5], *needs[8:10]


def _grad_of_groups(
    gy: Tensor, x: Tensor, weight: Tensor, touched: TouchedGroups, how: ConvGeometry
) -> Tensor:
    """`[nnz]` fp32, from an input of all channels or of those of the touched groups alone."""
    if touched.count < how.groups:
        gy = gy.index_select(1, touched.outputs)
        if x.shape[1] > len(touched.inputs):
            x = x.index_select(1, touched.inputs)
        # of a weight only the shape counts here
        weight, how = weight[: gy.shape[1]], replace(how, groups=touched.count)
    grad_weight = _convolution_backward(gy, x, weight, how, (False, True))[1]
    return grad_weight.reshape(-1).index_select(0, touched.index).float()


def _convolution_backward(
    gy: Tensor, x: Tensor, weight: Tensor, how: ConvGeometry, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        gy,
        x,
        weight,
        None,
        how.stride,
        how.padding,
        how.dilation,
        False,
        (0, 0),
        how.groups,
        (*wanted, False),
    )
    return grad_x, grad_weight
