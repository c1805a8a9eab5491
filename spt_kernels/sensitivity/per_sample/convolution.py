"""How each sample's gradient of a convolution follows from its output gradient and input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .uses import Factors, Role, Use, on_axis, tokens_of

_CHANNELS = -3
# On a CPU the gradients of one sample after the other take as long as unfolding the input where
# that makes about so many numbers for each of the weight's, and a quarter of it where it makes 16
_UNFOLDED_PER_WEIGHT = 2


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Use | None:
    """`F.conv2d`: a Linear on unfolded patches; in groups, or where these take longer, itself."""
    if input.ndim != 4:
        return None
    geometry = _Geometry(weight, _pair(stride), padding, _pair(dilation), groups)
    biases = Role(bias, "vector", on_axis(_CHANNELS), needs_input=False)
    if groups > 1:
        weights = Role(weight, "whole", geometry.gradients, samples_numel=4 * input[0].numel())
    elif geometry.is_pointwise:
        weights = Role(weight, "matrix", geometry.columns)
    else:
        height, width = geometry.output_size(input)
        unfolded = height * width * weight[0].numel()
        is_small = unfolded <= _UNFOLDED_PER_WEIGHT * weight.numel() or geometry.is_patches
        rule = geometry.columns if is_small or not input.is_cpu else geometry.gradients
        weights = Role(weight, "matrix", rule, samples_numel=unfolded)
    return Use(input, (weights, biases), saves_as_computed=True)


class _Geometry:
    """Where a convolution's kernel goes."""

    def __init__(
        self,
        weight: Tensor,
        stride: tuple[int, int],
        padding: Any,
        dilation: tuple[int, int],
        groups: int,
    ) -> None:
        self.kernel = (weight.shape[2], weight.shape[3])
        self.stride, self.dilation, self.groups = stride, dilation, groups
        self.pad_before, self.pad_after = self._padding(padding)
        self.is_padded = any(self.pad_before + self.pad_after)
        self.is_pointwise = self.kernel == (1, 1) and not self.is_padded
        self.is_patches = self.kernel == stride and dilation == (1, 1) and not self.is_padded

    def _padding(self, padding: Any) -> tuple[tuple[int, int], tuple[int, int]]:
        if padding == "same":
            rows, columns = (d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))
            before = rows // 2, columns // 2
            return before, (rows - before[0], columns - before[1])
        pads = (0, 0) if padding == "valid" else _pair(padding)
        return pads, pads

    def output_size(self, input: Tensor) -> tuple[int, int]:
        sizes = [
            (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
            for size, before, after, dilation, kernel, stride in zip(
                input.shape[-2:],
                self.pad_before,
                self.pad_after,
                self.dilation,
                self.kernel,
                self.stride,
                strict=True,
            )
        ]
        return sizes[0], sizes[1]

    def columns(self, samples: int, grad_output: Tensor, input: Tensor) -> Factors:
        """Output gradients by position, and the patch of the input that each position saw."""
        columns = tokens_of(samples, self._unfold(input))  # [samples, positions, in · kernel]
        return on_axis(_CHANNELS)(samples, grad_output)._replace(input=columns)

    def _unfold(self, x: Tensor) -> Tensor:
        if self.is_pointwise:
            return x[..., :: self.stride[0], :: self.stride[1]].flatten(2).transpose(1, 2)
        if self.is_patches:
            (kh, kw), (height, width) = self.kernel, self.output_size(x)
            x = x[..., : height * kh, : width * kw]
            x = x.unflatten(-1, (width, kw)).unflatten(-3, (height, kh))
            return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x = self._pad(x)
        return F.unfold(x, self.kernel, self.dilation, 0, self.stride).transpose(1, 2)

    def gradients(self, samples: int, grad_output: Tensor, input: Tensor) -> Factors:
        """Weight gradients by sample, `[samples, *weight.shape]`."""
        is_depthwise = input.shape[1] == self.groups
        if input.is_cpu and not is_depthwise:
            return self._one_by_one(samples, grad_output.float(), input.float())
        return self._at_once(samples, grad_output, input)

    def _one_by_one(self, samples: int, grad_output: Tensor, input: Tensor) -> Factors:
        """The backward of the convolution, for one sample after the other."""
        x, pads = input, self.pad_before
        if self.pad_before != self.pad_after:
            x, pads = self._pad(input), (0, 0)
        like = x.new_empty(grad_output.shape[1], x.shape[1] // self.groups, *self.kernel)
        where = [*self.stride], [*pads], [*self.dilation], False, [0, 0], self.groups
        backward, wanted = torch.ops.aten.convolution_backward, [False, True, False]
        own = zip(grad_output.chunk(samples), x.chunk(samples), strict=True)
        gradients = [backward(gy, rows, like, None, *where, wanted)[1] for gy, rows in own]
        return Factors(torch.stack(gradients))

    def _at_once(self, samples: int, grad_output: Tensor, input: Tensor) -> Factors:
        """One convolution for all samples.

        A kernel's gradient is the padded input convolved with the output gradient, where stride and
        dilation change places. Every channel of every sample is a group of its own, and the input
        channels of a group take the place of the batch.
        """
        rows = input.shape[0]
        x = self._pad(input.float()).unflatten(1, (self.groups, -1)).movedim(2, 0).flatten(1, 2)
        kernel = grad_output.flatten(0, 1)[:, None].float()  # [rows · out, 1, height, width]
        gradients = F.conv2d(
            x, kernel, stride=self.dilation, dilation=self.stride, groups=rows * self.groups
        )
        # the input may go on beyond the last position of the kernel
        gradients = gradients[..., : self.kernel[0], : self.kernel[1]].movedim(0, 1)
        return Factors(gradients.unflatten(0, (samples, rows // samples, -1)).sum(1))

    def _pad(self, x: Tensor) -> Tensor:
        if not self.is_padded:
            return x
        (top, left), (bottom, right) = self.pad_before, self.pad_after
        return F.pad(x, (left, right, top, bottom))


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return value[0], value[-1]
