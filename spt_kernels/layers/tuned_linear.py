"""The autograd function of every tuned linear layer: sparse delta and LoRA in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.dropout import dropout, dropout_
from .autocast import cast, is_cast, wide_dtype, without_autocast
from .plain_backward import plain_backward
from .row_ranges import RangeGroup
from .saved_input import SavedInput, Tensors
from .sparse_delta import check_trained_whole
from .sparse_gradient import DeltaPattern, sparse_gradient
from .traced import made_again

# The input with elements dropped is made in pieces of this size: at the moment when a forward needs
# most, a whole copy of it would be the largest tensor about
_DROPPED_ELEMENTS = 2**23


class LoraCall(NamedTuple):
    """One forward of a LoRA: what it is, and which elements of its input are dropped.

    Attributes:
        groups: of `groups_of`.
        scale: factor of the update.
        dropout: probability of dropping an element; 0 outside training.
        seed: which elements, or the key of it in memory; forward and backward both make the mask
            from it.
    """

    groups: tuple[RangeGroup, ...]
    scale: float
    dropout: float = 0.0
    seed: int | Tensor = 0

    def dropped(self, x: Tensor, first: int = 0) -> Tensor:
        """`x` with zeros for the elements that this call drops, of which the first is `first`."""
        return x if self.dropout == 0.0 else dropout(x, self.dropout, self.seed, first)

    def drop_(self, x: Tensor) -> Tensor:
        """`dropped`, in place where that can be."""
        if self.dropout == 0.0 or not x.is_contiguous():
            return self.dropped(x)
        return dropout_(x, self.dropout, self.seed)

    @property
    def only_range(self) -> RangeGroup | None:
        """The one range that it is on: plain matrix products serve it, for fewer views."""
        group = self.groups[0]
        return group if len(self.groups) == 1 and group.n_ranges == 1 else None

    @property
    def kept_scale(self) -> float:
        """What makes up for the dropped elements."""
        return 0.0 if self.dropout >= 1.0 else 1.0 / (1.0 - self.dropout)


class TunedLinear(torch.autograd.Function):
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
    if recipe is not None:
        x = recipe.rebuild(kept)
    if needs_weight:
        grad_weight = gy.t() @ x.reshape(-1, in_features)
    if needs_bias:
        grad_bias = gy.sum(0, dtype=wide_dtype(gy))
    if needs_delta:
        some = recipe.kind == "columns"
        grad_delta = sparse_gradient(gy, x, pattern.compacted if some else pattern.whole)
    if needs_bias_delta:
        grad_bias_delta = _grad_of_bias(gy, bias_index)
    if lora is not None:
        if needs_b:
            grad_b = _grad_of_b(gy, inner, lora)
        if needs_x or needs_a:
            grad_inner = _grad_of_inner(gy, lora_b, lora)  # [tokens, ranges · rank]
        if needs_a:
            # into what was rebuilt, but not into another's tensor
            x = lora.dropped(x) if recipe.kind == "tensor" else lora.drop_(x)
            grad_a = grad_inner.t() @ x.reshape(-1, in_features)
    del x  # before the gradient of the same size is made
    if needs_x:
        weight = weight if made is None else made(weight)
        flat = grad_of_x(gy, weight, grad_inner, lora_a, lora)
        grad_x = cast(flat.view(*grad_output.shape[:-1], in_features), x_dtype)
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
    y = F.linear(x, weight, bias).contiguous()
    return y, add_lora(y, x, lora_a, lora_b, lora)


def add_lora(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, lora: LoraCall) -> Tensor:
    """Add `scale · B A dropout(x)` into `y`; returns the bottleneck `[tokens, ranges · rank]`."""
    dtype = y.dtype
    flat, low = y.view(-1, y.shape[-1]), cast(lora_b, dtype)  # [tokens, out]
    with without_autocast(y.device):
        inner = _bottleneck(cast(x, dtype), cast(lora_a, dtype), lora)
        only = lora.only_range
        if only is not None:
            only.of_outputs_alone(flat).addmm_(inner, low.t(), alpha=lora.scale)
            return inner
        for group in lora.groups:
            outputs, part = group.of_outputs(flat), group.of_bottleneck(inner)
            up = group.of_rows(low).transpose(1, 2)
            if _is_onednns(flat):
                outputs.add_(_bmm(part, up), alpha=lora.scale)
            else:
                outputs.baddbmm_(part, up, alpha=lora.scale)
    return inner


def _bottleneck(x: Tensor, lora_a: Tensor, lora: LoraCall) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])  # [tokens, in]
    if lora.dropout == 0.0:
        return flat @ lora_a.t()
    step = max(1, _DROPPED_ELEMENTS // flat.shape[1])
    if len(flat) <= step:
        return (lora.dropped(flat) @ lora_a.t()).mul_(lora.kept_scale)
    inner = flat.new_empty(flat.shape[0], lora_a.shape[0])
    for start in range(0, flat.shape[0], step):
        some = lora.dropped(flat[start : start + step], start * flat.shape[1])
        torch.mm(some, lora_a.t(), out=inner[start : start + step])
    return inner.mul_(lora.kept_scale)


def _grad_of_bias(gy: Tensor, index: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # a sum can be fused with what chooses its columns
        return gy.index_select(1, index).sum(0, dtype=wide_dtype(gy))
    return gy.sum(0, dtype=wide_dtype(gy)).index_select(0, index)


def _grad_of_b(gy: Tensor, inner: Tensor, lora: LoraCall) -> Tensor:
    # the thin factor on the left: the transpose of this takes a CPU several times as long
    only = lora.only_range
    if only is not None:
        grad = (inner.t() @ only.of_outputs_alone(gy)).t().contiguous()
        return _scaled(grad, lora.scale)
    parts = []
    for group in lora.groups:
        low = group.of_bottleneck(inner).transpose(1, 2)
        parts.append(_bmm(low, group.of_outputs(gy)).transpose(1, 2).flatten(0, 1))
    grad = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)
    return _scaled(grad, lora.scale)  # [rows of all ranges, rank]


def _grad_of_inner(gy: Tensor, lora_b: Tensor, lora: LoraCall) -> Tensor:
    low = cast(lora_b, gy.dtype)
    factor = lora.scale * (lora.kept_scale if lora.dropout else 1.0)
    only = lora.only_range
    if only is not None:
        return _scaled(only.of_outputs_alone(gy) @ low, factor)
    rank, n_ranges = low.shape[1], sum(group.n_ranges for group in lora.groups)
    grad = gy.new_empty(gy.shape[0], n_ranges * rank)
    for group in lora.groups:
        _bmm(group.of_outputs(gy), group.of_rows(low), out=group.of_bottleneck(grad))
    return _scaled(grad, factor)


def _is_onednns(tensor: Tensor) -> bool:
    """Whether oneDNN multiplies it: of batches one within another torch turns it off for good."""
    return tensor.is_cpu and tensor.element_size() == 2


def _bmm(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    if not _is_onednns(left):
        return torch.bmm(left, right, out=out)
    product = torch.bmm(left.contiguous(), right.contiguous())
    return product if out is None else out.copy_(product)


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    """A product of ours times `factor`, in place."""
    return tensor if factor == 1.0 else tensor.mul_(factor)


def grad_of_x(
    gy: Tensor,
    weight: Tensor,
    grad_inner: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora: LoraCall | None = None,
) -> Tensor:
    """`[tokens, in]`, in one buffer: the LoRA's part with its dropout first, then the base's."""
    weight = weight if weight.dtype is gy.dtype else made_again(weight.to(gy.dtype))
    if grad_inner is None or lora_a is None or lora is None:
        return gy @ weight
    grad = lora.drop_(grad_inner @ cast(lora_a, gy.dtype))
    return grad.addmm_(gy, weight)
