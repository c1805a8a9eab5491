"""`SparseDeltaLinear`: a Linear of which a few weights, and perhaps biases, are trained."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.launching import goes_as_on_card, is_transformed
from .autograd.autocast import is_cast
from .autograd.sparse_gradient import DeltaPattern
from .autograd.sparse_linear import SparseLinear
from .autograd.tuned_linear import TunedLinear
from .deltas.computed import computed
from .deltas.position_index import CheckedIndex
from .sparse_layer import SparseDeltaLayer, is_trained_whole
from .tuned_class import share_contents


class LinearWithDeltas(SparseDeltaLayer, nn.Linear):
    """What every tuned Linear has in common."""

    _plain_class = nn.Linear

    def _index_changed(self) -> None:
        index = self.sparse_deltas()["weight"].index if "weight" in self._spt_states else None
        pattern = None
        if index is not None:
            pattern = DeltaPattern.of(index, self.out_features, self.in_features)
        self.__dict__["_spt_pattern"] = pattern

    def _transformed_base(self, x: Tensor) -> Tensor:
        """The output with the deltas, as transforms of `torch.func` follow it."""
        return F.linear(x, computed(self, "weight"), computed(self, "bias"))

    def _traced_base(self, x: Tensor) -> Tensor:
        """The output with the deltas in code for a compiler, which need not keep a cast weight."""
        weight, bias = self._traced_weight(), self.bias
        if not torch.is_grad_enabled():
            return F.linear(x, weight, bias)
        deltas = self.trained_tensors()
        y: Tensor = TunedLinear.apply(x, weight, bias, *deltas, None, None, None)
        return y


class SparseDeltaLinear(LinearWithDeltas):
    """A frozen Linear plus a sparse delta; the forward is that of the plain layer.

    It is an `nn.Linear`, and of a subclass of that if `linear` is; attributes, submodules and hooks
    are those of `linear`. Where that has a `delta`, `index` or `original` of its own, the delta is
    called `weight_delta`.

    `weight` holds base + delta at all times, so that the forward neither copies nor adds anything;
    the backward makes the gradient of the delta alone, and of the input keeps as little as it can.

    A delta learns from calls of the layer alone: code that reads `weight` gets its values, and the
    gradient of that use is lost. `measure_sensitivity` sees such code, and `apply` then puts
    `attach_parameter` in the place of this layer, with which every use counts. Likewise, an input
    that has been changed through its `.data` since a GELU or LayerNorm made it gives the gradient
    of what it was: change it under `torch.no_grad()`.

    A delta that is changed by hand is in `weight` by the next forward, unless that is compiled, or
    `delta.data` was written into, which leaves no trace and is found by the first forward after
    `train()` or `eval()` has switched: `layer.sparse_deltas()["weight"].write()` writes at once.

    Attributes:
        weight: frozen, `[out, in]`, holds base + delta.
        bias: frozen, `[out]`, likewise; or None.
        delta: Parameter `[nnz]`, fp32, whatever the dtype of the weight.
        index: int32 `[nnz]`, flat positions in `weight`; in the state dict, but no buffer.
        original: `[nnz]`, likewise, base values at `index`.
        bias_delta: Parameter `[bias nnz]`, with `bias_index` and `bias_original`, when asked for.

    Args:
        linear: the layer to tune. Its parameters are shared and frozen.
        index: int32 or int64 `[nnz]`, sorted flat positions in `linear.weight`; may be empty.
        bias_index: the same for `linear.bias`; None leaves all of it frozen.

    Raises:
        TypeError: `linear` is no Linear, or an index is no int32 or int64 tensor.
        ValueError: positions unsorted, repeated, out of range, on another device; no bias.
    """

    _name_prefix = "SparseDelta"

    def __init__(
        self,
        linear: nn.Linear,
        index: Tensor | CheckedIndex,
        bias_index: Tensor | CheckedIndex | None = None,
    ) -> None:
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        share_contents(self, linear)
        self._hold(index, bias_index)

    def forward(self, input: Tensor) -> Tensor:
        """`F.linear(input, weight, bias)`."""
        if is_transformed():
            return self._transformed_base(input)
        if torch.compiler.is_compiling():
            return linear_in_general(self, input, self.weight, self.bias)
        self.write_stale_deltas()
        own: Any = self.__dict__  # a third of the frames, which are what a fast card waits for
        parameters, pattern = own["_parameters"], own.get("_spt_pattern")
        weight, bias = parameters.get("weight"), parameters.get("bias", self)
        delta = parameters.get(self._main_delta)
        if (
            pattern is not None
            and delta is not None
            and delta.requires_grad
            and weight is not None
            and not weight.requires_grad
            and (bias is None or (bias is not self and not bias.requires_grad))
            and "bias_delta" not in parameters
            and torch.is_grad_enabled()
        ):
            return SparseLinear.apply(input, weight, bias, delta, pattern)
        return linear_in_general(self, input, *self._own_parameters())


def linear_in_general(layer: LinearWithDeltas, input: Tensor, weight: Any, bias: Any) -> Tensor:
    """What a layer with deltas gives, whichever are there and whatever else of it is trained."""
    # what was made trainable after it was tuned
    is_whole = is_trained_whole(weight, bias)
    if not (torch.is_grad_enabled() and (is_whole or layer.has_gradients())):
        return frozen_linear(input, weight, bias)
    deltas = layer.trained_tensors()
    y: Tensor = TunedLinear.apply(input, weight, bias, *deltas, None, None, None)
    return y


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` where neither weight nor bias is trained, and its backward reads no cast weight.

    Autocast remembers casts of parameters that require a gradient alone: of a frozen one autograd
    would keep that of each call. On a card the gradient of an input that is cast comes out of the
    product in the input's dtype, whoever has cast the weight.
    """
    is_trained = is_trained_whole(weight, bias)
    has_backward = torch.is_grad_enabled() and x.requires_grad and not is_trained
    if not (has_backward and (is_cast(x, weight) or (is_cast(x, x) and goes_as_on_card(x)))):
        return F.linear(x, weight, bias)
    y: Tensor = TunedLinear.apply(x, weight, bias, *(None,) * 7)
    return y
