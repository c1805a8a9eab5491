"""`recompute`: which parts of a model's blocks the backward computes again, and what was chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from .places import BlockPlaces, places_of
from .region import LastNorm, Region, Whose
from .words import NOTHING, OPTIONS, why_without

What = str | Iterable[str] | Mapping[str, str | Iterable[str]]

_OWNERS = (LastNorm, Region, Whose)


@dataclass(frozen=True)
class Recomputation:
    """What the backward of a model computes again.

    Attributes:
        blocks: name of each block -> its options, of `"mlp"`, `"qkv"`, `"attention"`, `"block"`;
            none for a block whose activations are all kept.
        modules: name of each module whose calls are computed again -> the option.
    """

    blocks: Mapping[str, tuple[str, ...]]
    modules: Mapping[str, str]

    def __post_init__(self) -> None:
        for name in ("blocks", "modules"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __bool__(self) -> bool:
        return bool(self.modules)

    def summary(self) -> str:
        """A text table: blocks that have the same in common lines, and what of them is computed."""
        rows: list[tuple[str, str, str]] = []
        for block, options in self.blocks.items():
            what = " and ".join(options) or NOTHING
            if rows and rows[-1][2] == what:
                rows[-1] = (rows[-1][0], block, what)
            else:
                rows.append((block, block, what))
        spans = [first if first == last else f"{first} to {last}" for first, last, _ in rows]
        width = max([len("block"), *map(len, spans)])
        lines = [f"{'block':<{width}}  computed again in the backward"]
        lines += [
            f"{span:<{width}}  {what}" for span, (_, _, what) in zip(spans, rows, strict=True)
        ]
        return "\n".join(lines)


def recompute(model: nn.Module, what: What) -> Recomputation:
    """Let the backward compute parts of blocks again; `spt_kernels.recompute` tells all of it.

    Args:
        model: plain, or tuned by this package or another; not compiled.
        what: options for all blocks that have such a part, or by the name of a block for these.

    Raises:
        TypeError: an argument of another type.
        ValueError: an option or block that there is not, a block that has no such part, or a model
            whose names tell no blocks. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise ValueError(
            f"model is a {type(model).__name__}, which is compiled: call recompute on the model "
            "that it was made of, before"
        )
    places = places_of(model)
    chosen = _chosen(model, what, places)
    modules = dict(model.named_modules())
    for module in modules.values():
        _take_off(module)
    found: dict[str, str] = {}
    for block, options in chosen.items():
        norms = LastNorm()
        for option in options:
            for name in places[block].modules[option]:
                around = norms if option != "block" else None
                Region(name, option == "qkv", around).attach(modules[name])
                found[name] = option
        if options and "block" not in options:
            norms.attach(modules[name] for name in places[block].norms)
    if found:
        model.register_forward_pre_hook(Whose().drop_stale_frames, prepend=True)
    return Recomputation(chosen, found)


def _take_off(module: nn.Module) -> None:
    """Remove every hook of an earlier call."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        ours = [n for n, h in hooks.items() if isinstance(getattr(h, "__self__", None), _OWNERS)]
        for number in ours:
            del hooks[number]
            module._forward_pre_hooks_with_kwargs.pop(number, None)
            module._forward_hooks_with_kwargs.pop(number, None)
            module._forward_hooks_always_called.pop(number, None)


def _chosen(
    model: nn.Module, what: Any, places: Mapping[str, BlockPlaces]
) -> dict[str, tuple[str, ...]]:
    """The options of every block."""
    if isinstance(what, Mapping):
        for block in what:
            if block not in places:
                known = ", ".join(places) or "none"
                raise ValueError(f"what: {type(model).__name__} has blocks {known}, got {block!r}")
        asked = {block: _options(what.get(block, ())) for block in places}
        for block, options in asked.items():
            for option in options:
                if option not in places[block].modules:
                    why = why_without(option, [places[block].modules])
                    raise ValueError(f"what: {block} has no part for {option!r}{why}")
        return {block: _without_parts(options) for block, options in asked.items()}
    options = _options(what)
    if options and not places:
        raise ValueError(f"what: {type(model).__name__} has no blocks that can be told by name")
    every = [each.modules for each in places.values()]
    for option in options:
        if not any(option in own for own in every):
            kind, why = type(model).__name__, why_without(option, every)
            raise ValueError(f"what: no block of {kind} has a part for {option!r}{why}")
    return {
        block: _without_parts([option for option in options if option in each.modules])
        for block, each in places.items()
    }


def _options(what: Any) -> list[str]:
    try:
        options = [what] if isinstance(what, str) else list(what)
    except TypeError:
        raise TypeError(
            f"what must be an option, several, or a mapping of blocks to such, got {what!r}"
        ) from None
    if options == [NOTHING]:
        return []
    for option in options:
        if option not in OPTIONS:
            raise ValueError(f"what must be of {', '.join(OPTIONS)}, or {NOTHING}, got {option!r}")
    return options


def _without_parts(options: Iterable[str]) -> tuple[str, ...]:
    """Options in their order, without what is part of another."""
    chosen = set(options)
    if "block" in chosen:
        return ("block",)
    if "attention" in chosen:
        chosen.discard("qkv")
    return tuple(option for option in OPTIONS if option in chosen)
