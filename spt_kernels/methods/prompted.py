"""Blocks of a ViT, and windows of a Swin, with learned tokens among their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PromptedBlock(nn.Module):
    """A transformer block with learned tokens of its own.

    Args:
        block: takes and gives `[batch, tokens, width]`.
        prompts: `[prompts, width]`, inserted after the `num_prefix` first tokens.
        num_prefix: class and register tokens, which stay in front.
        stay: whether the prompts go on to the next block, or what became of them is dropped.
    """

    def __init__(
        self, block: nn.Module, prompts: nn.Parameter, num_prefix: int, *, stay: bool = False
    ) -> None:
        super().__init__()
        self.block = block
        self.prompts = prompts
        self.num_prefix = num_prefix
        self.stay = stay

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Insert the prompts, run the block."""
        prompts = self.prompts.to(x.dtype).expand(len(x), -1, -1)
        x = self.block(with_prompts(x, prompts, self.num_prefix), *args, **kwargs)
        return x if self.stay else without_prompts(x, len(self.prompts), self.num_prefix)


class DroppingBlock(nn.Module):
    """A transformer block after which prompts that came from another one are dropped.

    Args:
        block: takes and gives `[batch, tokens, width]`.
        num_prompts: how many there are.
        num_prefix: tokens before them.
    """

    def __init__(self, block: nn.Module, num_prompts: int, num_prefix: int) -> None:
        super().__init__()
        self.block = block
        self.num_prompts, self.num_prefix = num_prompts, num_prefix

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the block, drop what became of the prompts."""
        x = self.block(x, *args, **kwargs)
        return without_prompts(x, self.num_prompts, self.num_prefix)


def with_prompts(x: Tensor, prompts: Tensor, num_prefix: int) -> Tensor:
    """Tokens with prompts `[batch, prompts, width]` after the first: one sequence of both."""
    return torch.cat((x[:, :num_prefix], prompts, x[:, num_prefix:]), dim=1)


def without_prompts(x: Tensor, num_prompts: int, num_prefix: int) -> Tensor:
    """The tokens of the model itself: `[batch, tokens - num_prompts, width]`."""
    return torch.cat((x[:, :num_prefix], x[:, num_prefix + num_prompts :]), dim=1)


class PromptedWindows(nn.Module):
    """A Swin's attention within windows, in which learned tokens are seen by every window.

    They are normed as the block's tokens are, attended to without a relative position and past any
    mask. What would become of them is dropped after each block, so that it is not computed.

    Args:
        attention: timm's `WindowAttention`.
        prompts: `[prompts, width]`.
        norm: what the block's tokens pass before the attention; it stays the block's.
    """

    def __init__(self, attention: nn.Module, prompts: nn.Parameter, norm: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.prompts = prompts
        self.norm = [norm]  # in a list: not a child

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[windows, tokens, width]` and a mask `[windows of an image, tokens, tokens]`, if any."""
        own: Any = self.attention
        windows, tokens, _ = x.shape
        extra = len(self.prompts)
        prompts = self.norm[0](self.prompts.to(x.dtype)).to(x.dtype).expand(windows, -1, -1)
        qkv = own.qkv(torch.cat((prompts, x), dim=1))  # [windows, prompts + tokens, 3 * width]
        qkv = qkv.unflatten(-1, (3, own.num_heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = qkv.unbind(0)
        bias = F.pad(own._get_rel_pos_bias(), (extra, 0))  # [1, heads, tokens, prompts + tokens]
        if mask is not None:
            each = F.pad(mask, (extra, 0)).unsqueeze(1)
            bias = bias + each.repeat(windows // len(mask), 1, 1, 1)
        y = F.scaled_dot_product_attention(
            queries[:, :, extra:],
            keys,
            values,
            attn_mask=bias.to(queries.dtype),
            dropout_p=own.attn_drop.p if self.training else 0.0,
        )
        y = own.proj(y.transpose(1, 2).reshape(windows, tokens, -1))
        dropped: Tensor = own.proj_drop(y)
        return dropped
