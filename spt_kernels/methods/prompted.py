"""Learned tokens among a ViT's own: where they may go, how they start, blocks that have them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .method import Method


@dataclass(frozen=True)
class PlainVit:
    """What prompts need to know of a ViT.

    Attributes:
        blocks: each takes and gives `[batch, tokens, width]`.
        width: of a token.
        num_prefix: class and register tokens, which stay in front.
        fan_in: pixels of a patch, over all channels.
    """

    blocks: nn.Sequential | nn.ModuleList
    width: int
    num_prefix: int
    fan_in: int

    @classmethod
    def of(cls, model: nn.Module, method: Method) -> PlainVit:
        """Find all that in a model.

        Raises:
            ValueError: it is no plain ViT.
        """
        blocks, width = getattr(model, "blocks", None), getattr(model, "embed_dim", None)
        prefix = getattr(model, "num_prefix_tokens", None)
        if (
            not isinstance(blocks, (nn.Sequential, nn.ModuleList))
            or width is None
            or prefix is None
        ):
            raise ValueError(
                f"method: {method.name!r} puts prompts among the tokens of a plain ViT (blocks, "
                f"embed_dim, num_prefix_tokens), got a {type(model).__name__}"
            )
        patches = getattr(getattr(model, "patch_embed", None), "proj", None)
        weight = getattr(patches, "weight", None)
        fan_in = weight[0].numel() if isinstance(weight, Tensor) and weight.ndim > 1 else width
        return cls(blocks, width, prefix, fan_in)

    def prompts(self, count: int) -> nn.Parameter:
        """`[count, width]`, fp32, uniform as VPT starts them.

        They have to differ: tokens that are the same would have the same gradients, and stay so.
        They are drawn on the CPU, the same on every device.
        """
        bound = math.sqrt(6 / (self.fan_in + self.width))
        device = next((p.device for p in self.blocks.parameters()), None)
        drawn = torch.empty(count, self.width).uniform_(-bound, bound)
        return nn.Parameter(drawn.to(device))


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
        x = torch.cat((x[:, : self.num_prefix], prompts, x[:, self.num_prefix :]), dim=1)
        x = self.block(x, *args, **kwargs)
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


def without_prompts(x: Tensor, num_prompts: int, num_prefix: int) -> Tensor:
    """The tokens of the model itself: `[batch, tokens - num_prompts, width]`."""
    return torch.cat((x[:, :num_prefix], x[:, num_prefix + num_prompts :]), dim=1)
