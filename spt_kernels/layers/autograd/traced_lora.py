"""The update of a LoRA as compilers take it best: out of place, one product for all ranges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .plain_backward import plain_backward
from .row_ranges import Ranges
from .traced import made_again, thin_product
from .traced_dropout import dropped
from .wide_product import wide_product


@dataclass(frozen=True)
class LoraTrace:
    """What of a LoRA is the same in every call.

    Attributes:
        ranges: of `ranges_of`.
        scale: factor of the update.
        dropout: probability of dropping an element; 0 outside training.
    """

    ranges: Ranges
    scale: float
    dropout: float

    @property
    def rows(self) -> slice:
        """The output features from the first range to the last."""
        return slice(self.ranges[0][0].start, self.ranges[-1][0].stop)

    @property
    def factor(self) -> float:
        """The scale, and what makes up for the dropped elements."""
        return 0.0 if self.dropout >= 1.0 else self.scale / (1.0 - self.dropout)

    def spread(self, lora_b: Tensor) -> Tensor:
        """`[rows of all ranges, rank]` as `[rows, ranges · rank]`, zeros where a range has none."""
        if len(self.ranges) == 1:
            return lora_b
        wide = lora_b.new_zeros(self.rows.stop - self.rows.start, self.ranges[-1][2].stop)
        for features, own, part in self._within_rows():
            wide[features, part] = lora_b[own]
        return wide

    def up(self, inner: Tensor, lora_b: Tensor) -> Tensor:
        """`[..., rows]` of the bottleneck, zeros between the ranges."""
        pieces, last = [], 0
        for features, own, part in self._within_rows():
            if features.start > last:
                pieces.append(inner.new_zeros(*inner.shape[:-1], features.start - last))
            pieces.append(thin_product(inner[..., part], lora_b.t()[:, own]))
            last = features.stop
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)

    def gathered(self, wide: Tensor) -> Tensor:
        """What `spread` takes, from what it gives."""
        parts = [wide[features, part] for features, _, part in self._within_rows()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _within_rows(self) -> Ranges:
        first = self.rows.start
        return tuple(
            (slice(features.start - first, features.stop - first), own, part)
            for features, own, part in self.ranges
        )


class TracedLora(torch.autograd.Function):
    """`scale · B_i A_i dropout(x)` in the rows of a `LoraTrace`, zeros between its ranges.

    Each factor of a number is taken to a matrix that is cast anyway: as a call of its own on what
    comes from a product it would be a launch.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_a: Tensor, lora_b: Tensor, words: Tensor | None, lora: LoraTrace
    ) -> Tensor:
        """`[..., rows]`, in the dtype that autocast, if it is on, gives to `F.linear`."""
        update, inner = lora_update(x, lora_a, lora_b, words, lora)
        ctx.save_for_backward(x, lora_a, lora_b, words, inner)
        ctx.lora = lora
        return update

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input and of both factors."""
        x, lora_a, lora_b, words, inner = ctx.saved_tensors
        lora: LoraTrace = ctx.lora
        dtype = grad_output.dtype
        gy = grad_output.flatten(0, -2)  # [tokens, rows]
        grad_x = None
        grad_b = lora.gathered(wide_product(gy.t(), inner.flatten(0, -2)))
        grad_inner = gy @ lora.spread((lora_b * lora.factor).to(dtype))
        flat = dropped(x, lora.dropout, words).to(dtype).flatten(0, -2)
        grad_a = wide_product(grad_inner.t(), made_again(flat))
        if ctx.needs_input_grad[0]:
            grad = thin_product(grad_inner, lora_a.to(dtype)).view(x.shape)
            grad_x = dropped(grad, lora.dropout, words).to(x.dtype)
        return grad_x, grad_a.to(lora_a.dtype), grad_b.to(lora_b.dtype), None, None


def lora_update(
    x: Tensor, lora_a: Tensor, lora_b: Tensor, words: Tensor | None, lora: LoraTrace
) -> tuple[Tensor, Tensor]:
    """The update `[..., rows]`, and `scale · A dropout(x)`, without autograd."""
    low = (lora_a * lora.factor).to(x.dtype)
    inner = F.linear(dropped(x, lora.dropout, words), low)  # [..., ranges · rank]
    return lora.up(inner, lora_b.to(inner.dtype)), inner
