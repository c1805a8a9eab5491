"""`SparseDeltaConv2d`: a Conv2d of which a few weights, and perhaps biases, are trained."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.launching import is_transformed
from .autograd.sparse_gradient import DeltaPattern
from .autograd.tuned_conv import ConvGeometry, TouchedGroups, TunedConv2d
from .deltas.computed import computed
from .deltas.position_index import CheckedIndex
from .sparse_layer import SparseDeltaLayer, is_trained_whole
from .tuned_class import share_contents


class ConvWithDeltas(SparseDeltaLayer, nn.Conv2d):
    """What every tuned Conv2d has in common."""

    _plain_class = nn.Conv2d

    def _index_changed(self) -> None:
        how = ConvGeometry(*geometry_of(self))
        pattern: DeltaPattern | TouchedGroups | None = None
        if "weight" in self._spt_states:
            index = self.sparse_deltas()["weight"].index
            out_features, *patch = tuple(self.weight.shape)
            if how.is_patchwise:
                pattern = DeltaPattern.of(index, out_features, math.prod(patch))
            else:
                pattern = TouchedGroups.of(index, self.weight, how.groups)
        self.__dict__["_spt_pattern"] = pattern

    def _transformed_base(self, x: Tensor) -> Tensor:
        """The output with the deltas, as transforms of `torch.func` follow it."""
        weight, bias = computed(self, "weight"), computed(self, "bias")
        return F.conv2d(_padded(self, x), weight, bias, *geometry_of(self)[1:])

    def needed_share(self) -> float:
        """All of the input's channels, unless whole groups of them are not touched."""
        share = super().needed_share()
        return 1.0 if share and isinstance(self.__dict__["_spt_pattern"], DeltaPattern) else share


class SparseDeltaConv2d(ConvWithDeltas):
    """A frozen Conv2d plus a sparse delta; the forward is that of the plain layer.

    It is an `nn.Conv2d`, and of a subclass of that if `conv` is, with all that `conv` has.
    Positions are those of a row-major weight: one in channels-last format is row-major while it is
    tuned.

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
        ValueError: positions unsorted, repeated, out of range, on another device; no bias.
    """

    _name_prefix = "SparseDelta"

    def __init__(
        self,
        conv: nn.Conv2d,
        index: Tensor | CheckedIndex,
        bias_index: Tensor | CheckedIndex | None = None,
    ) -> None:
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv must be an nn.Conv2d, got {type(conv).__name__}")
        share_contents(self, conv)
        self._hold(index, bias_index)

    def forward(self, input: Tensor) -> Tensor:
        """What the plain convolution returns."""
        weight: Any
        if is_transformed():
            return self._transformed_base(input)
        if torch.compiler.is_compiling():
            weight, bias = self.weight, self.bias
        else:
            self.write_stale_deltas()
            weight, bias = self._own_parameters()
        is_whole = is_trained_whole(weight, bias)
        if not (torch.is_grad_enabled() and (is_whole or self.has_gradients())):
            return frozen_conv2d(self, input)
        input, geometry = _padded(self, input), geometry_of(self)
        unbatched = input.dim() == 3
        batch = input.unsqueeze(0) if unbatched else input
        deltas = self.trained_tensors()
        y = TunedConv2d.apply(batch, weight, bias, *deltas, geometry, None, None, None)
        return y.squeeze(0) if unbatched else y


def frozen_conv2d(conv: nn.Conv2d, input: Tensor) -> Tensor:
    """What a convolution returns of which nothing is trained, and its backward reads no input."""
    x, geometry = _padded(conv, input), geometry_of(conv)
    weight, bias = conv.weight, conv.bias
    is_trained = is_trained_whole(weight, bias)
    has_backward = torch.is_grad_enabled() and x.requires_grad and not is_trained
    if torch.compiler.is_compiling() or not has_backward or x.dim() != 4:
        return F.conv2d(x, weight, bias, *geometry[1:])
    y: Tensor = TunedConv2d.apply(x, weight, bias, *(None,) * 4, geometry, *(None,) * 3)
    return y


def _padded(conv: nn.Conv2d, input: Tensor) -> Tensor:
    """The input with the padding that `geometry_of` leaves out."""
    if conv.padding_mode == "zeros" and conv.padding != "same":
        return input
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(input, conv._reversed_padding_repeated_twice, mode=mode)


def geometry_of(conv: nn.Conv2d) -> tuple[Any, ...]:
    """Fields of `ConvGeometry`, with the padding that `forward` leaves to the convolution."""
    padded_before = conv.padding_mode != "zeros" or isinstance(conv.padding, str)
    padding = (0, 0) if padded_before else conv.padding
    return conv.kernel_size, conv.stride, padding, conv.dilation, conv.groups
