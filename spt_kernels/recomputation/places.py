"""Where in a model's blocks regions are put: their attention, their MLP, the norms around these."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..model import innermost_blocks

_MLP = re.compile(
    r"(^|_)(mlp|ffn|feed_?forward|intermediate|dense_relu_dense)\d*(_|$)", re.IGNORECASE
)
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")  # where a name as T5's DenseReluDense has a new word
_ATTENTION = re.compile(r"(^|_)(attn|attention|token_mixer|mixer)\d*(_|$)", re.IGNORECASE)


@dataclass(frozen=True)
class BlockPlaces:
    """What of a block can be computed again.

    Attributes:
        modules: option -> full names of the modules that it is put around; without those that the
            block has none for.
        norms: full names of the norms outside of attention and MLP.
    """

    modules: dict[str, tuple[str, ...]]
    norms: tuple[str, ...]


def places_of(model: nn.Module) -> dict[str, BlockPlaces]:
    """By the name of each innermost block, in the model's order; empty if names tell no blocks."""
    modules = dict(model.named_modules())
    return {name: _places_in(name, modules[name], model) for name in innermost_blocks(model)}


def _places_in(block: str, module: nn.Module, model: nn.Module) -> BlockPlaces:
    mlps, attentions = (list(_topmost(module, own)) for own in (_MLP, _ATTENTION))
    # where an attention has an MLP for itself, as of positions, the block's is another one
    mlps = [mlp for mlp in mlps if not mlp.startswith(_within(attentions))] or mlps
    attentions = [
        name
        for name in attentions
        if not any(mlp.startswith(f"{name}.") for mlp in mlps)  # a block of its own, or around all
        and not name.startswith(_within(mlps))
    ]
    inside = _within([*mlps, *attentions])
    norms = [
        name
        for name, each in module.named_modules()
        if name and _is_norm(each) and not f"{name}.".startswith(inside)
    ]
    found = {
        "mlp": mlps,
        "qkv": [n for n in attentions if _may_be_fused(module.get_submodule(n), model)],
        "attention": attentions,
        "block": [""],
    }
    return BlockPlaces(
        {
            option: tuple(f"{block}.{name}" if name else block for name in names)
            for option, names in found.items()
            if names
        },
        tuple(f"{block}.{name}" for name in norms),
    )


def _within(names: list[str]) -> tuple[str, ...]:
    """What the names of all that lies in these modules begin with."""
    return tuple(f"{name}." for name in names)


def _topmost(module: nn.Module, pattern: re.Pattern[str], prefix: str = "") -> Iterator[str]:
    """Names of the modules with a matching name and parameters, none within another.

    A single matrix is none, as MViT's `shortcut_proj_attn`: all that it saves is what it is given.
    """
    for local, child in module.named_children():
        name = f"{prefix}{local}"
        is_one = pattern.search(_HUMP.sub("_", local)) and not _is_norm(child)
        is_one = is_one and not isinstance(child, (nn.Linear, nn.Conv2d))
        if is_one and next(child.parameters(), None) is not None:
            yield name
        else:
            yield from _topmost(child, pattern, f"{name}.")


def _may_be_fused(attention: nn.Module, model: nn.Module) -> bool:
    """Whether it may call `F.scaled_dot_product_attention`, as far as its library lets one know.

    Where that cannot be known, or hangs on a mask or a kernel, the first forward tells.
    """
    own = list(attention.modules())
    library = type(attention).__module__.partition(".")[0]
    if library == "timm":  # all that could have a switch
        return any(getattr(module, "fused_attn", False) for module in own)
    if library == "torchvision":  # its ViT's attention is torch's own
        return any(isinstance(module, nn.MultiheadAttention) for module in own)
    if library == "transformers":
        configs = (getattr(module, "config", None) for module in (*own, *model.modules()))
        told = (getattr(config, "_attn_implementation", None) for config in configs)
        return next((way for way in told if way is not None), "sdpa") == "sdpa"
    return True


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a norm that keeps no memory of its calls, as a batch norm does."""
    name = type(module).__name__.lower()
    is_named_so = "norm" in name and next(module.children(), None) is None
    return (isinstance(module, nn.LayerNorm) or is_named_so) and not list(module.buffers())
