"""What a CPU's kernels allocate within themselves: convolutions, codes, products of 4 bits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..ops.encode_derivative import scratch_bytes as scratch_of_codes
from ..ops.torch_internals import ConvBackend, select_conv_backend
from .ledger import Ledger
from .quantized import scratch_of_4_bits

_FORWARD = torch.ops.aten.convolution.default
_BACKWARD = torch.ops.aten.convolution_backward.default
_ENCODE = torch.ops.spt.encode_derivative.default
_DECODE = torch.ops.spt.decode_derivative.default


class CpuLedger(Ledger):
    """A ledger of tensors on a CPU, with what some kernels hold while they run."""

    def scratch_bytes(self, func: Any, args: tuple[Any, ...]) -> int:
        """Unfolded inputs, the gradient of an input in another layout, a weight as floats."""
        if func in (_ENCODE, _DECODE):
            return scratch_of_codes(args[0], args[-1], decodes=func is _DECODE)
        if func is _FORWARD:
            input, weight, bias, stride, padding, dilation, transposed, more, groups = args
            bias_sizes, wants_input = None, False
            grad_positions = 0
        elif func is _BACKWARD:
            grad, input, weight, bias_sizes = args[:4]
            stride, padding, dilation, transposed, more, groups, wanted = args[4:11]
            bias, wants_input = None, wanted[0]
            grad_positions = math.prod(grad.shape[2:])
        else:
            return scratch_of_4_bits(func, args)
        if input.dim() != 4 or weight.dim() != 4 or transposed:
            return 0
        backend = select_conv_backend(
            input, weight, bias, stride, padding, dilation, transposed, more, groups, bias_sizes
        )
        if backend == ConvBackend.Slow2d:
            sizes = zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
            positions = grad_positions or math.prod(_n_positions(*each) for each in sizes)
            return _unfolded_bytes(input, weight, stride, padding, positions)
        if not wants_input or backend != ConvBackend.Mkldnn:
            return 0
        channels_last = input.is_contiguous(memory_format=torch.channels_last)
        # oneDNN wants its input dense, though only the shape counts for this gradient, and computes
        # that for a strided convolution in a layout of its own
        is_copied = not (channels_last or input.is_contiguous())
        is_rearranged = groups == 1 and max(stride) > 1 and not channels_last
        return input.nbytes * (is_copied + is_rearranged)


def _n_positions(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _unfolded_bytes(
    input: Tensor, weight: Tensor, stride: Any, padding: Any, positions: int
) -> int:
    kernel, channels = math.prod(weight.shape[2:]), weight.shape[1]  # one group after the other
    if kernel == 1 and max(stride) == 1 and max(padding) == 0:
        return 0  # the input is as good as unfolded
    return int(input.shape[0] * channels * kernel * positions * input.element_size())
