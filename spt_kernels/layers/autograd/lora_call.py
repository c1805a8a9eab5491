"""`LoraCall`: the products of one forward of a LoRA on a matrix, and of its backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.dropout import launch_dropout, launch_dropout_
from ...ops.low_rank_ways import covers_all
from . import lora_launches
from .autocast import cast, is_any_autocast_on, without_autocast
from .lora_terms import LoraTerms
from .own_memory import own_memory
from .row_ranges import Ranges, groups_of

# The input with elements dropped is made in pieces of this size: at the moment when a forward needs
# most, a whole copy of it would be the largest tensor about
_DROPPED_ELEMENTS = 2**23


class LoraCall(LoraTerms):
    """One forward of a LoRA: its products, and those of its backward.

    Factors are `lora_a`, `[ranges · rank, in]`, and `lora_b`, `[rows of all ranges, rank]`.
    """

    __slots__ = ()

    @classmethod
    def on(cls, ranges: Ranges, scale: float) -> LoraCall:
        """A call without dropout of the LoRA on these ranges."""
        groups = groups_of(ranges)
        only = groups[0] if len(groups) == 1 and groups[0].n_ranges == 1 else None
        return cls(groups, scale, only=only)

    def dropped(self, x: Tensor, first: int = 0) -> Tensor:
        """`x` with zeros for the elements that this call drops, of which the first is `first`."""
        return x if self.dropout == 0.0 else launch_dropout(x, self.dropout, self.seed, first)

    def drop_(self, x: Tensor) -> Tensor:
        """`dropped`, in place where that can be."""
        if self.dropout == 0.0 or not x.is_contiguous():
            return self.dropped(x)
        return launch_dropout_(x, self.dropout, self.seed)

    def takes_bias(self, x: Tensor, lora_a: Tensor, bias: Tensor | None) -> bool:
        """Whether `add_to` adds a bias in no more time, of a call with this input in its dtype."""
        return (
            bias is not None
            and bias.dtype is not x.dtype
            and lora_launches.are_for(x, lora_a.shape[0])
            and len(self.groups) == 1
            and covers_all(self.groups[0].span, bias.shape[0])
        )

    def add_to(
        self,
        y: Tensor,
        x: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Add `scale · B A dropout(x)` into `y`; returns the bottleneck.

        Args:
            y: `[..., out]`, contiguous, is written.
            x: `[..., in]`.
            lora_a: of the LoRA.
            lora_b: of the LoRA.
            bias: `[out]`, is added as well; only where `takes_bias` says so.

        Returns:
            `[tokens, ranges · rank]`, A dropout(x) in the dtype of `y`.
        """
        dtype = y.dtype
        if lora_launches.are_for(y, lora_a.shape[0]):
            flat_x = cast(x, dtype).reshape(-1, lora_a.shape[1])  # [tokens, in]
            inner = lora_launches.bottleneck(self, flat_x, lora_a)
            lora_launches.add_update(self, y.view(-1, y.shape[-1]), inner, lora_b, bias)
            return inner
        if lora_a.dtype is not dtype or lora_b.dtype is not dtype:
            lora_a, lora_b = lora_a.to(dtype), lora_b.to(dtype)
        if x.dtype is not dtype:
            x = x.to(dtype)
        if is_any_autocast_on():
            with without_autocast(y.device):
                return self._add_to(y, x, lora_a, lora_b)
        return self._add_to(y, x, lora_a, lora_b)

    def _add_to(self, y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        flat, inner = y.view(-1, y.shape[-1]), self.bottleneck(x, lora_a)  # [tokens, out]
        if self.only is not None:
            self.only.of_outputs_alone(flat).addmm_(inner, lora_b.t(), alpha=self.scale)
            return inner
        for group in self.groups:
            outputs, part = group.of_outputs(flat), group.of_bottleneck(inner)
            up = group.of_rows(lora_b).transpose(1, 2)
            if _is_onednns(flat):
                outputs.add_(_bmm(part, up), alpha=self.scale)
            else:
                outputs.baddbmm_(part, up, alpha=self.scale)
        return inner

    def bottleneck(self, x: Tensor, lora_a: Tensor) -> Tensor:
        """A dropout(x), `[tokens, ranges · rank]`, of one dtype."""
        flat = x.reshape(-1, lora_a.shape[1])  # [tokens, in]
        if self.dropout == 0.0:
            return torch.mm(flat, lora_a.t())
        step = max(1, _DROPPED_ELEMENTS // flat.shape[1])
        if len(flat) <= step:
            return own_memory(torch.mm(self.dropped(flat), lora_a.t())).mul_(self.kept_scale)
        inner = flat.new_empty(flat.shape[0], lora_a.shape[0])
        for start in range(0, flat.shape[0], step):
            some = self.dropped(flat[start : start + step], start * flat.shape[1])
            torch.mm(some, lora_a.t(), out=inner[start : start + step])
        return inner.mul_(self.kept_scale)

    # ---- the backward, of gy `[tokens, out]`

    def grad_of_b(self, gy: Tensor, inner: Tensor) -> Tensor:
        """`[rows of all ranges, rank]`, in the dtype of `gy` or fp32, from the bottleneck."""
        if lora_launches.are_for(gy, inner.shape[1]):
            return lora_launches.grad_of_b(self, gy, inner)
        # the thin factor on the left: the transpose of this takes a CPU several times as long
        if self.only is not None:
            grad = torch.mm(inner.t(), self.only.of_outputs_alone(gy)).t().contiguous()
            return grad if self.scale == 1.0 else grad.mul_(self.scale)
        parts = []
        for group in self.groups:
            low = group.of_bottleneck(inner).transpose(1, 2)
            parts.append(_bmm(low, group.of_outputs(gy)).transpose(1, 2).flatten(0, 1))
        grad = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)
        return grad if self.scale == 1.0 else grad.mul_(self.scale)

    def grad_of_inner(self, gy: Tensor, lora_b: Tensor) -> Tensor:
        """`[tokens, ranges · rank]`, with all factors."""
        if lora_launches.are_for(gy, lora_b.shape[1]):
            return lora_launches.grad_of_inner(self, gy, lora_b)
        low = cast(lora_b, gy.dtype)
        factor = self.scale * self.kept_scale
        if self.only is not None:
            grad = torch.mm(self.only.of_outputs_alone(gy), low)
            return grad if factor == 1.0 else grad.mul_(factor)
        rank, n_ranges = low.shape[1], sum(group.n_ranges for group in self.groups)
        grad = gy.new_empty(gy.shape[0], n_ranges * rank)
        for group in self.groups:
            _bmm(group.of_outputs(gy), group.of_rows(low), out=group.of_bottleneck(grad))
        return grad if factor == 1.0 else grad.mul_(factor)

    def grad_of_a(self, grad_inner: Tensor, x: Tensor, *, may_write: bool) -> Tensor:
        """`[ranges · rank, in]`, in the dtype of `grad_inner` or fp32.

        Args:
            grad_inner: of `grad_of_inner`.
            x: `[..., in]`, the input of the forward.
            may_write: whether elements may be dropped of `x` itself.
        """
        if lora_launches.are_for(x, grad_inner.shape[1]):
            return lora_launches.grad_of_a(self, grad_inner, x.reshape(-1, x.shape[-1]))
        if self.dropout:
            x = self.drop_(x) if may_write else self.dropped(x)
        return torch.mm(grad_inner.t(), x.reshape(-1, x.shape[-1]))

    def grad_of_x(
        self,
        gy: Tensor,
        weight: Tensor,
        grad_inner: Tensor,
        lora_a: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """`[tokens, in]`, the base's part and the LoRA's with its dropout.

        Args:
            gy: the gradient of the output.
            weight: of the base, in the dtype of `gy`.
            grad_inner: of `grad_of_inner`.
            lora_a: of the LoRA.
            dtype: of the input.
        """
        if lora_launches.are_for(gy, lora_a.shape[0]):
            return lora_launches.grad_of_x(self, gy, weight, grad_inner, lora_a, dtype)
        grad = torch.mm(grad_inner, cast(lora_a, gy.dtype))
        if self.dropout:
            grad = self.drop_(grad)
        return cast(grad.addmm_(gy, weight), dtype)  # in one buffer


def _is_onednns(tensor: Tensor) -> bool:
    """Whether oneDNN multiplies it: of batches one within another torch turns it off for good."""
    return tensor.is_cpu and tensor.element_size() == 2


def _bmm(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    if not _is_onednns(left):
        return torch.bmm(left, right, out=out)
    product = torch.bmm(left.contiguous(), right.contiguous())
    return product if out is None else out.copy_(product)
