"""A Linear with a quantized weight that is tuned: whatever is trained is beside the weight.

Nothing can be written into quantized values: what a step adds is far below one of their steps. The
product with the weight is the quantizer's own, and that with the delta is added to it, as sparse
rows; so is a LoRA. The backward makes floats of the weight for one product and drops them: a float
copy of each matrix, which autograd would keep of some quantized layers, is never in memory at once.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed.sharded import is_sharded
from ..model.quantized import QuantizedMatrix, is_quantized, matrix_in
from ..ops.add_sparse_rows import launch_sparse_rows
from ..ops.launching import is_transformed
from ..ops.torch_internals import without_transforms
from .adapter import AdapterLinear
from .autograd.autocast import is_cast
from .autograd.lora_call import LoraCall
from .autograd.own_memory import own_memory
from .autograd.plain_backward import plain_backward
from .autograd.saved_input import RebuildingFunction
from .autograd.sparse_gradient import DeltaPattern
from .autograd.tuned_linear import keep_for_gradients, tuned_gradients
from .deltas.computed import computed
from .deltas.name_in_model import told_as
from .deltas.position_index import CheckedIndex
from .deltas.sparse_delta import check_trained_whole, tag
from .linear import LinearWithDeltas
from .lora import LoraLinear
from .tuned_class import share_contents


class QuantizedLinear(RebuildingFunction):
    """`TunedLinear` over a quantized matrix: a sparse delta and a LoRA beside it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        matrix: QuantizedMatrix,
        bias: Tensor | None,
        delta: Tensor | None,
        pattern: DeltaPattern | None,
        bias_delta: Tensor | None,
        bias_index: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        lora: LoraCall | None,
    ) -> Tensor:
        """`[..., out]`, in the dtype of the quantizer's own product."""
        if ctx.needs_input_grad[2]:
            check_trained_whole((True, bias_delta))
        y, inner = _output(x, matrix, bias, delta, pattern, lora_a, lora_b, lora)
        # the gradient of the input needs base + delta: the base it finds in the layer
        keep_for_gradients(
            *(ctx, x, y.dtype, delta, matrix.shape[1], pattern, bias_index),
            *(lora_a, lora_b, inner, lora),
        )
        ctx.matrix = matrix
        return y

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input, the deltas and the LoRA."""
        index = None if ctx.how[0] is None else ctx.how[0].whole.index
        return tuned_gradients(
            ctx, grad_output, lambda delta: dense(ctx.matrix, grad_output.dtype, delta, index)
        )


def dense(
    matrix: QuantizedMatrix, dtype: torch.dtype, delta: Tensor | None, index: Tensor | None
) -> Tensor:
    """Base + delta as floats, `[out, in]`, for one product."""
    values = matrix.dense(dtype)
    if delta is not None and index is not None:
        values.view(-1).index_add_(0, index, delta.detach().to(dtype))
    return values


def _output(
    x: Tensor,
    matrix: QuantizedMatrix,
    bias: Tensor | None,
    delta: Tensor | None,
    pattern: DeltaPattern | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora: LoraCall | None,
) -> tuple[Tensor, Tensor | None]:
    """What the layer gives, in memory of its own, and the bottleneck of its LoRA."""
    # Autocast does so for a float layer. A quantizer gives the dtype that it is given, and all that
    # follows would be computed and kept in twice the bytes.
    x, bias = _under_autocast(x, x), None if bias is None else _under_autocast(x, bias)
    y = own_memory(matrix.product(x, bias).contiguous())
    if y._is_view():
        y = y.data  # no view any more, so that what follows may work on it in place
    if delta is not None and pattern is not None:
        _add_delta(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]).to(y.dtype), delta, pattern)
    if lora is None or lora_a is None or lora_b is None:
        return y, None
    return y, lora.add_to(y, x, lora_a, lora_b)


def _under_autocast(x: Tensor, factor: Tensor) -> Tensor:
    """A factor of a product with `x`, in the dtype that autocast takes it in."""
    return factor.to(torch.get_autocast_dtype(x.device.type)) if is_cast(x, factor) else factor


def _add_delta(y: Tensor, x: Tensor, delta: Tensor, pattern: DeltaPattern) -> None:
    index, values = pattern.whole.index, delta.detach()
    if y.dtype == torch.float64:
        # The op serves the dtypes that are trained in; float64 models exist to check gradients with
        rows, columns = index // x.shape[1], index % x.shape[1]
        y.index_add_(1, rows, x[:, columns] * values)
        return
    launch_sparse_rows(y, x.contiguous(), index, values)


class QuantizedLayer(LinearWithDeltas):
    """What every tuned Linear with a quantized weight has in common.

    Its bias, which is none of the quantized, holds base + delta as anywhere else.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse shards, and follow a delta that becomes another tensor."""
        if isinstance(value, nn.Parameter) and is_sharded(value):
            raise ValueError(
                f"{told_as(self)} has a quantized weight and cannot be sharded: train it under "
                "DistributedDataParallel"
            )
        super().__setattr__(name, value)
        if isinstance(value, nn.Parameter) and name == self._main_delta:
            tag(value, self)

    def _index_changed(self) -> None:
        pattern = None
        if "weight" in self._spt_beside_names and "weight" not in self._spt_empty_names:
            index = self.sparse_deltas()["weight"].index
            pattern = DeltaPattern.of(index, self.out_features, self.in_features)
        self.__dict__["_spt_pattern"] = pattern

    def _transformed_base(self, x: Tensor) -> Tensor:
        """The output with the deltas by a product of floats, as transforms follow it."""
        matrix, delta = matrix_in(self), self._parameters.get(self._main_delta)
        with contextlib.nullcontext() if torch.compiler.is_compiling() else without_transforms():
            weight = matrix.dense(x.dtype)
        if delta is not None:
            index = self.sparse_deltas()["weight"].index.long()
            values = delta.to(weight.dtype)
            weight = weight.flatten().index_add(0, index, values).view(weight.shape)
        return F.linear(x, weight, computed(self, "bias"))

    def _forward(self, x: Tensor, *of_lora: Any) -> Tensor:
        """The output with the deltas, and with a LoRA where one is given."""
        self.write_stale_deltas()
        matrix, bias = matrix_in(self), self._parameters.get("bias")
        delta, pattern, bias_delta, bias_index = self.trained_tensors()
        lora_a, lora_b, lora = of_lora or (None, None, None)
        if not torch.is_grad_enabled():
            return _output(x, matrix, bias, delta, pattern, lora_a, lora_b, lora)[0]
        self._check_not_trained(matrix)
        y: Tensor = QuantizedLinear.apply(
            *(x, matrix, bias, delta, pattern, bias_delta, bias_index, lora_a, lora_b, lora)
        )
        return y

    def _with_deltas(self, x: Tensor) -> Tensor:
        return self._transformed_base(x) if is_transformed() else self._forward(x)

    def _check_not_trained(self, matrix: QuantizedMatrix) -> None:
        """Refuse to train quantized values: no step of an optimizer could be written into them."""
        if matrix.weight.requires_grad:
            raise RuntimeError(
                f"{told_as(self)}.weight is quantized and requires a gradient, which nothing makes "
                "for it: requires_grad_(False) on it, or spt.dequantize(model) to train its floats"
            )

    def _traced_weight(self) -> Tensor:
        """Base + delta in code for a compiler, which decides itself what is made again."""
        delta, pattern, _, _ = self.trained_tensors()
        matrix, index = matrix_in(self), None if pattern is None else pattern.whole.index
        if torch.is_grad_enabled():
            self._check_not_trained(matrix)
        return dense(matrix, matrix.dtype, delta, index)


class QuantizedDeltaLinear(QuantizedLayer):
    """A Linear with a quantized weight plus a sparse delta, which may be empty.

    Attributes:
        weight: frozen, as the quantizer left it; holds the base alone.
        delta: Parameter `[nnz]`, fp32; an ordinary one, which any optimizer trains.
        index: int32 `[nnz]`, flat positions in the `[out, in]` that `weight` stands for.
        bias: frozen, holds base + delta; or None.
        bias_delta: Parameter `[bias nnz]`, with `bias_index` and `bias_original`, when asked for.

    Args:
        linear: with a weight of torchao or bitsandbytes; its parameters are shared and frozen.
        index: int32 or int64 `[nnz]`, sorted; may be empty.
        bias_index: the same for `linear.bias`; None leaves all of it frozen.

    Raises:
        TypeError: `linear` has no quantized weight, or an index is no int32 or int64 tensor.
        ValueError: positions unsorted, repeated, out of range, on another device; no bias.
    """

    _name_prefix = "QuantizedDelta"

    def __init__(
        self,
        linear: nn.Linear,
        index: Tensor | CheckedIndex,
        bias_index: Tensor | CheckedIndex | None = None,
    ) -> None:
        _check_quantized("linear", linear)
        share_contents(self, linear)
        self._hold(index, bias_index)

    def forward(self, input: Tensor) -> Tensor:
        """The plain layer's output with the product of the delta."""
        if torch.compiler.is_compiling() and not is_transformed():
            return self._traced_base(input)
        return self._with_deltas(input)


class QuantizedLoraLinear(QuantizedLayer, LoraLinear):
    """`LoraLinear` over a quantized weight; attributes and arguments are those of that."""

    _name_prefix = "QuantizedLora"

    def forward(self, input: Tensor) -> Tensor:
        """The base layer's output with the updates added."""
        if is_transformed() or torch.compiler.is_compiling():
            return LoraLinear.forward(self, input)
        return self._forward(input, *self._new_parameters(), self._this_call(input))

    @classmethod
    def _check_base(cls, base: Any, spec: Any) -> None:
        _check_quantized("base", base)
        super()._check_base(base, spec)


class QuantizedAdapterLinear(QuantizedLayer, AdapterLinear):
    """`AdapterLinear` over a quantized weight; attributes and arguments are those of that."""

    _name_prefix = "QuantizedAdapter"

    @classmethod
    def _check_base(cls, base: Any, spec: Any) -> None:
        _check_quantized("base", base)
        super()._check_base(base, spec)


def _check_quantized(name: str, module: Any) -> None:
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or weight is None or not is_quantized(weight):
        raise TypeError(
            f"{name} must be an nn.Linear with a quantized weight, got {type(module).__name__}"
        )
