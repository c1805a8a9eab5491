"""`SparseDeltaConv2d`: a Conv2d of which a few weights, and perhaps biases, are trained."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .delta_holder import DeltaHolder
from .plain_module import keep_plain, plain_of
from .position_index import CheckedIndex, checked_index
from .sparse_gradient import DeltaPattern
from .tuned_conv import ConvGeometry, TouchedGroups, TunedConv2d


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
        pattern: DeltaPattern | TouchedGroups | None
        if how.is_patchwise:
            pattern = DeltaPattern.of(self.index, out_features, math.prod(patch))
        else:
            pattern = TouchedGroups.of(self.index, self.weight, how.groups)
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
