"""Learned tokens before the patches of every block (VPT-Deep, Jia et al., 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..model import backbone_numel
from .method import Method
from .tunable import Tunable, counted, freeze_backbone


def tune(model: nn.Module, method: Method, plan: Any) -> Tunable:
    """Give every block as many prompts as the budget pays for, at least one.

    Raises:
        ValueError: the model is no plain ViT.
    """
    blocks, width = getattr(model, "blocks", None), getattr(model, "embed_dim", None)
    prefix = getattr(model, "num_prefix_tokens", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or width is None or prefix is None:
        raise ValueError(
            "method: deep prompts need a plain ViT: blocks, embed_dim, num_prefix_tokens"
        )
    prompts = max(1, method.count(backbone_numel(model, method.head)) // (len(blocks) * width))
    freeze_backbone(model, method.head)
    for number, block in enumerate(blocks):
        blocks[number] = PromptedBlock(block, prompts, width, prefix)
    return counted(model, head=method.head)


class PromptedBlock(nn.Module):
    """A transformer block with learned tokens of its own.

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
