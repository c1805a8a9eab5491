"""What the C++ makes a layer's input of by itself, so that the input is never in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.native_calls import DTYPE_NUMBERS, GELU, ITSELF, LAYER_NORM, TANH_GELU, Activation
from .graph_nodes import tensors_of_layer_norm
from .saved_input import SavedInput, Tensors

_FP32 = torch.float32


class PackedInput(NamedTuple):
    """The input of a layer, as the C++ takes it.

    Attributes:
        source: `[..., in]`, contiguous: what the activation is of.
        activation: what is done to it while it is read.
        held: the tensors whose addresses are in there; the C++ has returned before this goes.
    """

    source: Tensor
    activation: Activation
    held: tuple[Tensor | None, ...]


def packed_input(
    saved: SavedInput, kept: Tensors, tokens: int, in_features: int
) -> PackedInput | None:
    """The input that was saved, of a layer on a CPU; None where it has to be made first."""
    kind, dtype, node, steps = saved
    source: Tensor | None
    held: tuple[Tensor | None, ...] = ()
    activation = ITSELF
    if kind == "tensor" or kind == "columns":
        (source,) = kept
        if source is None or source.dtype is not dtype:
            return None
    elif steps:
        return None
    elif kind == "layer_norm":
        source, mean, rstd, weight, bias = tensors_of_layer_norm(node)
        if (
            source.dtype is not _FP32
            or mean.numel() != tokens  # of more dimensions than one
            or not (weight is None or weight.is_contiguous())
            or not (bias is None or bias.is_contiguous())
        ):
            return None
        held = mean, rstd, weight, bias
        fields = (
            LAYER_NORM,
            DTYPE_NUMBERS[dtype],
            mean.data_ptr(),
            rstd.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
        )
        activation = _new(Activation, fields)
    elif kind == "gelu":
        source = node._saved_self
        how = GELU if node._saved_approximate == "none" else TANH_GELU
        activation = _new(Activation, (how, DTYPE_NUMBERS[dtype], 0, 0, 0, 0))
    else:
        return None
    if (
        source.is_contiguous()
        and source.numel() == tokens * in_features > 0
        and type(source) is Tensor
        and not source.is_neg()
    ):
        return _new(PackedInput, (source, activation, held))
    return None


_new = tuple.__new__  # without the frame that a constructor in Python is
