"""The arithmetic of a LoRA on a 1×1 convolution, as convolutions: any memory format, any stride."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import cast, without_autocast
from .lora_call import LoraCall
from .own_memory import own_memory
from .row_ranges import Ranges

# What is as large as an input or an output is made some samples at a time
_ELEMENTS_AT_ONCE = 2**23


class PointwiseLora(NamedTuple):
    """One forward of a LoRA on the channels of each position.

    Attributes:
        ranges: of `ranges_of`, of output channels.
        call: scale and dropout; its elements are those of the whole input.
    """

    ranges: Ranges
    call: LoraCall

    def add_to(
        self, y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, stride: tuple[int, int]
    ) -> Tensor:
        """Add `scale · B A dropout(x)` into `y`; returns the bottleneck `[batch, rank, ...]`."""
        with without_autocast(y.device):
            down, up = _kernel(cast(lora_a, y.dtype)), _kernel(cast(lora_b, y.dtype))
            low = [
                F.conv2d(cast(self._dropped(x, some), y.dtype), down, stride=stride)
                for some in _parts(x)
            ]
            inner = low[0] if len(low) == 1 else torch.cat(low)
            if self.call.dropout:
                inner = own_memory(inner).mul_(self.call.kept_scale)
            for some in _parts(y):
                for channels, own, part in self.ranges:
                    update = F.conv2d(inner[some, part], up[own])
                    y[some, channels].add_(update, alpha=self.call.scale)
        return inner

    def grad_of_b(self, gy: Tensor, inner: Tensor) -> Tensor:
        """`[rows of all ranges, rank]`."""
        parts = []
        for channels, own, part in self.ranges:
            like = gy.new_empty(own.stop - own.start, part.stop - part.start, 1, 1)
            parts.append(_grad_of_kernel(gy[:, channels], inner[:, part], like, (1, 1)))
        return torch.cat(parts).mul_(self.call.scale)

    def grad_of_inner(self, gy: Tensor, lora_b: Tensor) -> Tensor:
        """`[batch, ranges · rank, ...]`, with all factors."""
        low = cast(lora_b, gy.dtype)
        parts = [
            F.conv2d(gy[:, channels], _kernel(low[own].t())) for channels, own, _ in self.ranges
        ]
        grad = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return grad.mul_(self.call.scale * self.call.kept_scale)

    def grad_of_a(self, grad_inner: Tensor, x: Tensor, stride: tuple[int, int]) -> Tensor:
        """`[ranges · rank, in]`."""
        like = x.new_empty(grad_inner.shape[1], x.shape[1], 1, 1)
        total: Tensor | None = None
        for some in _parts(x):
            grad = _grad_of_kernel(grad_inner[some], self._dropped(x, some), like, stride)
            total = grad if total is None else total.add_(grad)
        assert total is not None
        return total

    def add_grad_of_x(
        self, grad_x: Tensor, grad_inner: Tensor, lora_a: Tensor, stride: tuple[int, int]
    ) -> None:
        """Add the LoRA's part into the gradient of the input."""
        down = _kernel(cast(lora_a, grad_x.dtype))
        for some in _parts(grad_x):
            of_some = grad_x[some]
            grad = _backward(grad_inner[some], of_some, down, stride, (True, False))[0]
            of_some.add_(self.call.dropped(grad, some.start * _sample_numel(grad_x)))

    def _dropped(self, x: Tensor, some: slice) -> Tensor:
        return self.call.dropped(x[some], some.start * _sample_numel(x))


def _parts(x: Tensor) -> Iterator[slice]:
    """Samples of a batch, as many at a time as may be made something of; at least one part."""
    batch = x.shape[0]
    step = max(1, _ELEMENTS_AT_ONCE // max(1, _sample_numel(x)))
    return (slice(first, min(first + step, batch)) for first in range(0, max(batch, 1), step))


def _sample_numel(x: Tensor) -> int:
    return math.prod(x.shape[1:])


def _kernel(matrix: Tensor) -> Tensor:
    return matrix[:, :, None, None]


def _grad_of_kernel(gy: Tensor, x: Tensor, like: Tensor, stride: tuple[int, int]) -> Tensor:
    return _backward(gy, x, like, stride, (False, True))[1].flatten(1)


def _backward(
    gy: Tensor, x: Tensor, weight: Tensor, stride: tuple[int, int], wanted: tuple[bool, bool]
) -> Any:
    where = [*stride], [0, 0], [1, 1], False, [0, 0], 1
    return torch.ops.aten.convolution_backward(gy, x, weight, None, *where, [*wanted, False])
