"""`SparseDeltaConv2d`: a Conv2d of which a few weights, and perhaps biases, are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .delta_holder import DeltaHolder
from .first_order import first_derivative_only
from .plain_module import keep_plain, plain_of
from .position_index import CheckedIndex, checked_index
from .saved_input import SavedInput, Tensors
from .sparse_gradient import DeltaPattern, sparse_gradient
from .tuned_linear import wide_dtype, without_autocast


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


class TunedConv2d(torch.autograd.Function):
    """`F.conv2d` on a weight that holds base + delta; gradients only of what is trained.

    Patchwise convolutions (1×1, patch embeddings) sample the gradient of the delta as a Linear
    does. For depthwise and other ones the convolution's own weight gradient is made, sampled and
    dropped: of depthwise it is tiny, of a full 3×3 the size of the weight, one layer at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        delta: Tensor | None,
        index: Tensor | None,
        pattern: DeltaPattern | None,
        bias_delta: Tensor | None,
        bias_index: Tensor | None,
        geometry: tuple[Any, ...],
    ) -> Tensor:
        """`[batch, out, height, width]`, in the dtype that autocast gives to `F.conv2d`."""
        how = ConvGeometry(*geometry)
        y = F.conv2d(x, weight, bias, how.stride, how.padding, how.dilation, how.groups)
        needs_x, needs_delta, needs_bias_delta = (ctx.needs_input_grad[i] for i in (0, 3, 6))
        saved = SavedInput("nothing", y.dtype)
        kept: Tensors = ()
        if needs_delta:
            saved, kept = SavedInput.of(x, y.dtype)
        ctx.save_for_backward(
            weight if needs_x or (needs_delta and not how.is_patchwise) else None,
            index if needs_delta and pattern is None else None,
            bias_index if needs_bias_delta else None,
            *kept,
        )
        ctx.saved_input, ctx.pattern, ctx.geometry = saved, pattern, how
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input and of the deltas."""
        weight, index, bias_index, *kept = ctx.saved_tensors
        needs_x, needs_delta, needs_bias_delta = (ctx.needs_input_grad[i] for i in (0, 3, 6))
        how: ConvGeometry = ctx.geometry
        x: Any = None
        grad_x = grad_delta = grad_bias_delta = None
        with without_autocast(gy.device):
            if needs_delta:
                x = ctx.saved_input.rebuild(tuple(kept))
            if needs_bias_delta:
                total = gy.sum((0, 2, 3), dtype=wide_dtype(gy))
                grad_bias_delta = total.index_select(0, bias_index)
            if needs_delta and how.is_patchwise:
                patches = how.patches(x)
                flat = gy.permute(0, 2, 3, 1).reshape(-1, gy.shape[1])
                grad_delta = sparse_gradient(flat, patches, ctx.pattern.whole)
                x = None
            dense = needs_delta and not how.is_patchwise
            if needs_x or dense:
                like = x if x is not None else gy.new_empty(1).expand(ctx.x_shape)
                grad_x, grad_weight = _convolution_backward(
                    gy, like, weight.to(gy.dtype), how, (needs_x, dense)
                )
                grad_x = grad_x.to(ctx.x_dtype) if needs_x else None
                if dense:
                    grad_delta = grad_weight.reshape(-1).index_select(0, index).float()
        return grad_x, None, None, grad_delta, None, None, grad_bias_delta, None, None


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


class SparseDeltaConv2d(DeltaHolder):
    """A frozen Conv2d plus a sparse delta; the forward is that of the plain layer.

    Attributes:
        weight: frozen, `[out, in / groups, height, width]`, holds base + delta.
        bias: frozen, `[out]`, likewise; or None.
        delta: Parameter `[nnz]`, fp32, with constants `index` (int32) and `original`.
        bias_delta: the same for the bias, with `bias_index` and `bias_original`, when asked for.

    Args:
        conv: the layer to tune. Its parameters are shared and frozen.
        index: int32 or int64 `[nnz]`, sorted flat positions in `conv.weight`; may be empty.
        bias_index: the same for `conv.bias`; None leaves all of it frozen.

    Raises:
        TypeError: `conv` is no Conv2d, or an index is no int32 or int64 tensor.
        ValueError: positions unsorted, repeated, out of range, on another device; no bias; a weight
            in channels-last layout.
    """

    weight: Tensor
    bias: Tensor | None
    delta: nn.Parameter
    index: Tensor
    original: Tensor

    _main_parameter = "weight"

    def __init__(
        self,
        conv: nn.Conv2d,
        index: Tensor | CheckedIndex,
        bias_index: Tensor | CheckedIndex | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv must be an nn.Conv2d, got {type(conv).__name__}")
        index = checked_index("index", index, "weight", conv.weight)
        if bias_index is not None and conv.bias is not None:
            bias_index = checked_index("bias_index", bias_index, "bias", conv.bias)
        keep_plain(self, conv)
        for name in conv.__constants__:
            setattr(self, name, getattr(conv, name))
        self.hold_delta("weight", index)
        if bias_index is not None:
            self.hold_delta("bias", bias_index, "bias_index")
        elif conv.bias is not None:
            conv.bias.requires_grad_(False)
        self._index_changed()

    @property
    def plain(self) -> nn.Module:
        """The module this one stands for, with the parameters as they are now."""
        return plain_of(self)

    def forward(self, x: Tensor) -> Tensor:
        """What the plain convolution returns."""
        if not torch.compiler.is_compiling():
            self.write_stale_deltas()
        plain = self.__dict__["_spt_plain"]
        if plain.padding_mode != "zeros" or plain.padding == "same":
            mode = "constant" if plain.padding_mode == "zeros" else plain.padding_mode
            x = F.pad(x, plain._reversed_padding_repeated_twice, mode=mode)
        return self._convolve(x, self._geometry())

    def _geometry(self) -> tuple[Any, ...]:
        """Fields of `ConvGeometry`, with the padding that `forward` leaves to the convolution."""
        plain = self.__dict__["_spt_plain"]
        padded_before = plain.padding_mode != "zeros" or isinstance(plain.padding, str)
        padding = (0, 0) if padded_before else plain.padding
        return plain.kernel_size, plain.stride, padding, plain.dilation, plain.groups

    def _index_changed(self) -> None:
        how = ConvGeometry(*self._geometry())
        out_features, *patch = tuple(self.weight.shape)
        pattern = None
        if how.is_patchwise:
            pattern = DeltaPattern.of(self.index, out_features, math.prod(patch))
        self.__dict__["_spt_pattern"] = pattern

    def _convolve(self, x: Tensor, geometry: tuple[Any, ...]) -> Tensor:
        delta, bias_delta = self._parameters["delta"], self._parameters.get("bias_delta")
        trained = [d for d in (delta, bias_delta) if d is not None and d.requires_grad]
        if not torch.is_grad_enabled() or not any(d.numel() for d in trained):
            return F.conv2d(x, self.weight, self.bias, *geometry[1:])
        unbatched = x.dim() == 3
        y = TunedConv2d.apply(
            x.unsqueeze(0) if unbatched else x,
            self.weight,
            self.bias,
            delta if delta is not None and delta.numel() else None,
            self.index,
            self.__dict__["_spt_pattern"],
            bias_delta,
            getattr(self, "bias_index", None),
            geometry,
        )
        return y.squeeze(0) if unbatched else y

    def extra_repr(self) -> str:
        """The plain layer's sizes and the numbers of trained entries."""
        bias_delta = self._parameters.get("bias_delta")
        trained = "" if bias_delta is None else f", bias_nnz={bias_delta.numel()}"
        return f"{self.plain.extra_repr()}, nnz={self.delta.numel()}{trained}"
