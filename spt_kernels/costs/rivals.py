"""Other ways of fine-tuning, as their authors write them, to be costed beside this package's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PromptedBlock(nn.Module):
    """A transformer block with learned tokens of its own (VPT-Deep, Jia et al., 2022).

    Args:
        block: takes and gives `[batch, tokens, width]`.
        num_prompts: tokens to add, after the `num_prefix` class tokens.
        width: of a token.
        num_prefix: class and register tokens, which stay in front.
    """

    def __init__(self, block: nn.Module, num_prompts: int, width: int, num_prefix: int) -> None:
        super().__init__()
        self.block = block
        self.num_prefix = num_prefix
        device = next((p.device for p in block.parameters()), None)
        self.prompts = nn.Parameter(torch.zeros(num_prompts, width, device=device))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Insert the prompts, run the block, drop what became of them."""
        prompts = self.prompts.to(x.dtype).expand(len(x), -1, -1)
        x = torch.cat((x[:, : self.num_prefix], prompts, x[:, self.num_prefix :]), dim=1)
        x = self.block(x, *args, **kwargs)
        after = self.num_prefix + len(self.prompts)
        return torch.cat((x[:, : self.num_prefix], x[:, after:]), dim=1)


class PlainLora(nn.Module):
    """`W x + B A x` as three modules under autograd (Hu et al., 2021)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        form: Any = {"bias": False, "dtype": torch.float32, "device": base.weight.device}
        self.down = nn.Linear(base.in_features, rank, **form)
        self.up = nn.Linear(rank, base.out_features, **form)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Base and low-rank path, the latter in its own precision."""
        y = self.base(x)
        return y + self.up(self.down(x.to(self.down.weight.dtype))).to(y.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The base layer with the product added."""
        self.base.weight += (self.up.weight @ self.down.weight).to(self.base.weight.dtype)
        return self.base


class MaskedLinear(nn.Module):
    """A trainable dense weight whose gradient is computed whole and then masked."""

    def __init__(self, linear: nn.Linear, index: Tensor) -> None:
        super().__init__()
        self.plain = [linear]  # in a list: not a child, its parameters are ours
        self.weight, self.bias = linear.weight.requires_grad_(), linear.bias
        mask = torch.zeros_like(linear.weight, dtype=torch.bool).view(-1)
        mask[index.to(mask.device)] = True
        self.mask: Tensor
        self.register_buffer("mask", mask.view(linear.weight.shape))

    def forward(self, x: Tensor) -> Tensor:
        """The plain layer."""
        weight: Any = _MaskedGradient.apply(self.weight, self.mask)
        return F.linear(x, weight, self.bias)

    def merged(self) -> nn.Linear:
        """The layer that was replaced; it shares the weight."""
        return self.plain[0]


class _MaskedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return grads[0] * mask, None


class DiagonalLinear(nn.Module):
    """The layer that was published with SPT: a clone per forward, a diagonal per backward.

    The gradient of nnz values is the diagonal of the nnz × nnz product of the gathered rows of the
    output's gradient and the gathered columns of the input.
    """

    def __init__(self, linear: nn.Linear, index: Tensor) -> None:
        super().__init__()
        self.plain = [linear]
        self.weight, self.bias = linear.weight, linear.bias
        self.index: Tensor
        self.register_buffer("index", index.to(linear.weight.device))
        self.delta = nn.Parameter(torch.zeros(index.numel(), device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """Clone the weight, add the values, multiply."""
        y: Any = _DiagonalGradient.apply(x, self.weight, self.bias, self.delta, self.index)
        return y

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The layer that was replaced, the values added to its weight."""
        self.weight.view(-1).index_add_(0, self.index, self.delta.to(self.weight.dtype))
        return self.plain[0]


class _DiagonalGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor, index: Tensor
    ) -> Tensor:
        whole = weight.clone()
        whole.view(-1).index_add_(0, index, delta.to(whole.dtype))
        ctx.save_for_backward(x, whole, index)
        return F.linear(x, whole.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, whole, index = ctx.saved_tensors
        gy = grads[0].flatten(0, -2)  # [tokens, out]
        rows, columns = index // whole.shape[1], index % whole.shape[1]
        inputs = x.flatten(0, -2)[:, columns].to(gy.dtype)  # under autocast x may be wider
        product = gy[:, rows].t() @ inputs  # [nnz, nnz]
        grad_x = grads[0] @ whole.to(grads[0].dtype)
        return grad_x, None, None, product.diagonal().float(), None
