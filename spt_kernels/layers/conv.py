"""`SparseDeltaConv2d`: a Conv2d of which a few weights, and perhaps biases, are trained."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .position_index import CheckedIndex
from .sparse_gradient import DeltaPattern
from .sparse_layer import SparseDeltaLayer
from .tuned_conv import ConvGeometry, TouchedGroups, TunedConv2d


class SparseDeltaConv2d(SparseDeltaLayer):
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

    def __init__(
        self,
        conv: nn.Conv2d,
        index: Tensor | CheckedIndex,
        bias_index: Tensor | CheckedIndex | None = None,
    ) -> None:
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv must be an nn.Conv2d, got {type(conv).__name__}")
        super().__init__(conv, index, bias_index)
        for name in conv.__constants__:
            setattr(self, name, getattr(conv, name))
        self._index_changed()

    def forward(self, x: Tensor) -> Tensor:
        """What the plain convolution returns."""
        if not torch.compiler.is_compiling():
            self.write_stale_deltas()
        plain = self.__dict__["_spt_plain"]
        if plain.padding_mode != "zeros" or plain.padding == "same":
            mode = "constant" if plain.padding_mode == "zeros" else plain.padding_mode
            x = F.pad(x, plain._reversed_padding_repeated_twice, mode=mode)
        geometry = self._geometry()
        if not (torch.is_grad_enabled() and self.has_gradients()):
            return F.conv2d(x, self.weight, self.bias, *geometry[1:])
        unbatched = x.dim() == 3
        batch = x.unsqueeze(0) if unbatched else x
        y = TunedConv2d.apply(batch, self.weight, self.bias, *self.trained_tensors(), geometry)
        return y.squeeze(0) if unbatched else y

    def _geometry(self) -> tuple[Any, ...]:
        """Fields of `ConvGeometry`, with the padding that `forward` leaves to the convolution."""
        plain = self.__dict__["_spt_plain"]
        padded_before = plain.padding_mode != "zeros" or isinstance(plain.padding, str)
        padding = (0, 0) if padded_before else plain.padding
        return plain.kernel_size, plain.stride, padding, plain.dilation, plain.groups

    def _index_changed(self) -> None:
        how = ConvGeometry(*self._geometry())
        out_features, *patch = tuple(self.weight.shape)
        pattern: DeltaPattern | TouchedGroups | None
        if how.is_patchwise:
            pattern = DeltaPattern.of(self.index, out_features, math.prod(patch))
        else:
            pattern = TouchedGroups.of(self.index, self.weight, how.groups)
        self.__dict__["_spt_pattern"] = pattern
