"""The autograd function of every tuned linear layer: sparse delta and LoRA in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.dtypes import FLOATS
from ...ops.launching import goes_as_on_card, is_transformed
from ...ops.sparse_norm_grad import launch_sparse_norm_grad
from ..deltas.sparse_delta import check_trained_whole
from .autocast import is_cast, wide_dtype
from .gradient_of_delta import gradient_of_delta
from .lora_call import LoraCall
from .own_memory import own_memory
from .plain_backward import plain_backward
from .saved_input import RebuildingFunction, SavedInput, Tensors
from .sparse_gradient import DeltaPattern, sparse_gradient
from .traced import made_again
from .wide_product import product_in


class TunedLinear(RebuildingFunction):
    """`F.linear` on a weight that holds base + delta, plus a LoRA; gradients of what is trained.

    That is the deltas and the LoRA, and what was made trainable after the layer was tuned: all of a
    weight or bias that has no delta.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        delta: Tensor | None,
        pattern: DeltaPattern | None,
        bias_delta: Tensor | None,
        bias_index: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        lora: LoraCall | None,
    ) -> Tensor:
        """`[..., out]`; the dtype is that which autocast, if it is on, gives to `F.linear`."""
        inner: Tensor | None = None
        needs = ctx.needs_input_grad
        if needs[1] or needs[2]:
            check_trained_whole((needs[1], delta), (needs[2], bias_delta))
        if lora is None:
            y = F.linear(x, weight, bias)
        else:
            y, inner = linear_with_lora(x, weight, bias, lora_a, lora_b, lora)
        if not torch.compiler.is_compiling() and y._is_view():
            y = y.data  # no view any more, so that what follows may work on it in place
        keep_for_gradients(
            *(ctx, x, y.dtype, weight, weight.shape[1], pattern, bias_index),
            *(lora_a, lora_b, inner, lora),
        )
        return y

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all that is trained; one of the whole weight only where it is asked for."""
        return tuned_gradients(ctx, grad_output)


def keep_for_gradients(
    ctx: Any,
    x: Tensor,
    dtype: torch.dtype,
    weight: Tensor | None,
    in_features: int,
    pattern: DeltaPattern | None,
    bias_index: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    inner: Tensor | None,
    lora: LoraCall | None,
) -> None:
    """Keep for `tuned_gradients` what they need of a forward.

    Args:
        ctx: of an autograd function with the arguments of `TunedLinear`.
        x: its input.
        dtype: in which it has computed.
        weight: what the gradient of the input is made with.
        in_features: of the layer.
        pattern: of the delta of the weight.
        bias_index: of that of the bias.
        lora_a: of the LoRA.
        lora_b: of the LoRA.
        inner: its bottleneck.
        lora: what it is.
    """
    needs_x, needs_weight, _, needs_delta, _, needs_bias_delta, _, needs_a, needs_b, _ = (
        ctx.needs_input_grad
    )
    recipe: SavedInput | None = None
    to_save: Tensors = (weight if needs_x else None,)  # each, and each None, costs the host
    if needs_delta or needs_a or needs_weight:
        columns = None if pattern is None or needs_a or needs_weight else pattern.columns
        recipe, kept = SavedInput.of(x, dtype, columns)
        to_save += kept
    if lora is not None:
        a_is_read = needs_x or needs_a
        of_lora = (lora_a if a_is_read else None, lora_b if a_is_read else None)
        to_save = (*of_lora, inner if needs_b else None, *to_save)
    if needs_bias_delta:
        to_save = (bias_index, *to_save)
    ctx.save_for_backward(*to_save)
    ctx.saved_input = recipe
    ctx.how = pattern, lora, in_features, x.dtype


def tuned_gradients(
    ctx: Any, grad_output: Tensor, made: Callable[[Tensor | None], Tensor] | None = None
) -> tuple[Tensor | None, ...]:
    """Gradients for each argument of `TunedLinear`, from what was kept for them.

    Args:
        ctx: of the function.
        grad_output: `[..., out]`.
        made: makes the weight of what was kept in its place, once the rest is done.
    """
    needs_x, needs_weight, needs_bias, needs_delta, _, needs_bias_delta, _, needs_a, needs_b, _ = (
        ctx.needs_input_grad
    )
    lora: LoraCall | None
    pattern, lora, in_features, x_dtype = ctx.how
    recipe: Any = ctx.saved_input
    saved = ctx.saved_tensors
    bias_index: Any = None
    lora_a: Any = None
    lora_b: Any = None
    inner: Any = None
    if needs_bias_delta:
        bias_index, *saved = saved
    if lora is not None:
        lora_a, lora_b, inner, *saved = saved
    weight, *kept = saved
    x: Any = None
    grad_inner: Any = None
    grad_x = grad_weight = grad_bias = grad_delta = grad_bias_delta = grad_a = grad_b = None
    gy = grad_output.reshape(-1, grad_output.shape[-1])  # [tokens, out]
    if needs_delta:
        entries = pattern.compacted if recipe.kind == "columns" else pattern.whole
        if not (needs_weight or needs_a or torch.compiler.is_compiling()):
            grad_delta, recipe = gradient_of_delta(gy, recipe, kept, entries), None
    if recipe is not None:
        x = recipe.rebuild(kept)
    if needs_weight:
        grad_weight = gy.t() @ x.reshape(-1, in_features)
    if needs_bias:
        grad_bias = gy.sum(0, dtype=wide_dtype(gy))
    if needs_delta and grad_delta is None:
        grad_delta = sparse_gradient(gy, x, entries)
    if needs_bias_delta:
        grad_bias_delta = _grad_of_bias(gy, bias_index)
    if lora is not None:
        if needs_b:
            grad_b = lora.grad_of_b(gy, inner)
        if needs_x or needs_a:
            grad_inner = lora.grad_of_inner(gy, lora_b)  # [tokens, ranges · rank]
        if needs_a:
            # into what was rebuilt, but not into another's tensor
            grad_a = lora.grad_of_a(grad_inner, x, may_write=recipe.kind != "tensor")
    del x  # before the gradient of the same size is made
    if needs_x:
        weight = weight if made is None else made(weight)
        weight = weight if weight.dtype is gy.dtype else made_again(weight.to(gy.dtype))
        if lora is not None:
            flat = lora.grad_of_x(gy, weight, grad_inner, lora_a, x_dtype)
        else:
            flat = product_in(x_dtype, gy, weight)
        grad_x = flat.view(*grad_output.shape[:-1], in_features)
    return (
        *(grad_x, grad_weight, grad_bias, grad_delta, None),
        *(grad_bias_delta, None, grad_a, grad_b, None),
    )


def linear_with_lora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora: LoraCall | None,
) -> tuple[Tensor, Tensor | None]:
    """The forward alone, without autograd: output, and the bottleneck if there is a LoRA."""
    if lora is None or lora_a is None or lora_b is None:
        return F.linear(x, weight, bias), None
    if is_cast(x, x):  # once for both products
        x = x.to(torch.get_autocast_dtype(x.device.type))
    # one that autocast would cast is added as it is
    late = bias if lora.takes_bias(x, lora_a, bias) else None
    y = own_memory(F.linear(x, weight, bias if late is None else None).contiguous())
    return y, lora.add_to(y, x, lora_a, lora_b, late)


def _grad_of_bias(gy: Tensor, index: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # a sum can be fused with what chooses its columns
        return gy.index_select(1, index).sum(0, dtype=wide_dtype(gy))
    if goes_as_on_card(gy) and gy.dtype in FLOATS and not is_transformed():
        return launch_sparse_norm_grad(gy, None, None, None, None, index)
    return gy.sum(0, dtype=wide_dtype(gy)).index_select(0, index)
