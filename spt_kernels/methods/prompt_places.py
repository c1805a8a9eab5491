"""Where learned tokens may go in a model, and how they start."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.structured import NEW
from ..tuning import replace_module
from .matrices import blocks_of
from .method import Method
from .prompted import PromptedBlock, PromptedWindows

# What ties tokens to their places, so that there can be no more of them
_TIES_OF_MODEL = ("rope", "rel_pos_bias", "shared_rel_pos")
_TIES_OF_ATTENTION = ("rel_pos", "relative_position_index")
_OF_WINDOWS = ("qkv", "num_heads", "window_size", "relative_position_bias_table")


@dataclass(frozen=True)
class PromptPlace:
    """A block that may have prompts of its own.

    Attributes:
        block: its name, as `ParameterInfo.block`.
        width: of a token.
        put: gives it prompts `[prompts, width]`, for good.
    """

    block: str
    width: int
    put: Callable[[nn.Parameter], None]


@dataclass(frozen=True)
class PlainVit:
    """What prompts need to know of a ViT.

    Attributes:
        blocks: each takes and gives `[batch, tokens, width]`.
        width: of a token.
        num_prefix: class and register tokens, which stay in front.
        tie: what ties its tokens to their places; None where there may be more of them.
    """

    blocks: nn.Sequential | nn.ModuleList
    width: int
    num_prefix: int
    tie: str | None = None

    @classmethod
    def of(cls, model: nn.Module) -> PlainVit | None:
        """Find all that in a model; None where it is no plain ViT."""
        blocks, width = getattr(model, "blocks", None), getattr(model, "embed_dim", None)
        prefix = getattr(model, "num_prefix_tokens", None)
        if (
            not isinstance(blocks, (nn.Sequential, nn.ModuleList))
            or width is None
            or prefix is None
        ):
            return None
        places: list[tuple[Any, tuple[str, ...]]] = [(model, _TIES_OF_MODEL)]
        places += [(getattr(block, "attn", None), _TIES_OF_ATTENTION) for block in blocks]
        ties = (n for owner, names in places for n in names if getattr(owner, n, None) is not None)
        return cls(blocks, width, prefix, next(ties, None))

    def check_room(self, model: nn.Module, method: Method) -> None:
        """Refuse prompts among tokens that are tied to their places."""
        if self.tie is not None:
            raise ValueError(
                f"method: {method.name!r} puts prompts among the tokens of a plain ViT, and those "
                f"of {type(model).__name__} are tied to their places by {self.tie}"
            )


def prompt_places(model: nn.Module, method: Method) -> list[PromptPlace]:
    """The blocks of a plain ViT, or of a Swin.

    Raises:
        ValueError: the model is neither, or a ViT whose tokens are tied to their places.
    """
    vit = PlainVit.of(model)
    if vit is not None:
        vit.check_room(model, method)
        named = {id(module): name for name, module in model.named_modules()}  # as it may be wrapped
        return [
            PromptPlace(named[id(block)], vit.width, functools.partial(_put_in_vit, vit, n))
            for n, block in enumerate(vit.blocks)
        ]
    names = blocks_of(model)
    blocks: list[Any] = [model.get_submodule(name) for name in names]
    if not all(_has_windows(block) for block in blocks):
        raise ValueError(
            f"method: {method.name!r} puts prompts among the tokens of a plain ViT (blocks, "
            f"embed_dim, num_prefix_tokens) or of a Swin, got a {type(model).__name__}"
        )
    return [
        PromptPlace(
            name, block.attn.qkv.in_features, functools.partial(_put_in_windows, block, name, model)
        )
        for name, block in zip(names, blocks, strict=True)
    ]


def drawn_prompts(model: nn.Module, count: int, width: int) -> nn.Parameter:
    """`[count, width]`, fp32, uniform as VPT starts them.

    They have to differ: tokens that are the same would have the same gradients, and stay so. They
    are drawn on the CPU, the same on every device.
    """
    weight = getattr(getattr(getattr(model, "patch_embed", None), "proj", None), "weight", None)
    fan_in = weight[0].numel() if isinstance(weight, Tensor) and weight.ndim > 1 else width
    bound = math.sqrt(6 / (fan_in + width))
    drawn = torch.empty(count, width, **NEW).uniform_(-bound, bound)
    return nn.Parameter(drawn.to(next(model.parameters()).device))


def _put_in_vit(vit: PlainVit, number: int, prompts: nn.Parameter) -> None:
    vit.blocks[number] = PromptedBlock(vit.blocks[number], prompts, vit.num_prefix)


def _put_in_windows(block: Any, name: str, model: nn.Module, prompts: nn.Parameter) -> None:
    prompted = PromptedWindows(block.attn, prompts, block.norm1)
    replace_module(model, f"{name}.attn", prompted)


def _has_windows(block: nn.Module) -> bool:
    """Whether a block attends as timm's Swin does (Swin V2 compares by cosine)."""
    attention = getattr(block, "attn", None)
    return hasattr(block, "norm1") and all(hasattr(attention, name) for name in _OF_WINDOWS)
