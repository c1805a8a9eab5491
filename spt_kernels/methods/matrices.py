"""The matrices of a model's blocks that a method is put on, and layers in their place."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from ..model import HeadPatterns, ParameterInfo, describe, head_names, innermost_blocks, stem_names
from ..tuning import replace_module

# of a name inside a block: what stands beside the layers that lead from its input to its output
_BESIDE = re.compile(r"(^|\.)(e?se|downsample|shortcut|skip)(\.|$)")


def block_matrices(model: nn.Module, head: HeadPatterns | None = None) -> dict[str, ParameterInfo]:
    """Module name -> what is known of its weight, for every linear layer inside a block.

    A head that is given is no part of a block.

    Raises:
        ValueError: there is none.
    """
    matrices = {
        name: what
        for name, what in _on_channels(model, head).items()
        if what.kind == "linear" and what.block
    }
    if not matrices:
        raise ValueError(
            f"method: the model has no linear matrices in blocks{what_there_is(model, head)}"
        )
    return matrices


def lora_matrices(
    model: nn.Module, head: HeadPatterns | None = None, rank: int = 1
) -> dict[str, ParameterInfo]:
    """Module name -> what is known of its weight, where LoRA goes that no scores have placed.

    That is on the linear layers that compute attention's q, k, v. A model without has it on every
    linear layer and every 1×1 convolution in its blocks, or, where its names tell no blocks, on
    every 1×1 convolution between stem and head. A 1×1 convolution with fewer channels than the rank
    on one side, as a squeeze-and-excitation has them, is passed over.

    Raises:
        ValueError: there is none.
    """
    matrices = _on_channels(model, head)
    attention = {
        name: what
        for name, what in matrices.items()
        if what.kind == "linear" and what.block and any(b.operation == "q" for b in what.row_blocks)
    }
    if attention:
        return attention
    inside = {name: what for name, what in matrices.items() if what.block}
    if not inside:
        inside = {name: what for name, what in matrices.items() if what.kind == "pointwise"}
    chosen = {
        name: what
        for name, what in inside.items()
        if what.kind == "linear" or min(what.shape[:2]) >= rank
    }
    if not chosen:
        wanted = "a Linear or a 1×1 convolution in a block"
        if inside:
            most = max(min(what.shape[:2]) for what in inside.values())
            wanted += f", of at least {rank} channels on each side (there are up to {most})"
        raise ValueError(f"method: LoRA goes on {wanted}{what_there_is(model, head)}")
    return chosen


def last_matrices(model: nn.Module, head: HeadPatterns | None = None) -> dict[str, ParameterInfo]:
    """Module name -> what is known of its weight, of each block the last: what its MLP ends with.

    It is a linear layer or a 1×1 convolution. Shortcuts and squeeze-and-excitation, told by their
    names, are beside what a block computes and no end of it.

    Raises:
        ValueError: there is none.
    """
    matrices = _on_channels(model, head)
    blocks = set(innermost_blocks(model))
    last = {
        what.block: (name, what)
        for name, what in matrices.items()
        if what.block in blocks and not _BESIDE.search(name.removeprefix(what.block))
    }
    if not last:
        raise ValueError(
            "method: an Adapter goes on the last Linear or 1×1 convolution of each block"
            f"{what_there_is(model, head)}"
        )
    return dict(last.values())


def what_there_is(model: nn.Module, head: HeadPatterns | None = None) -> str:
    """The end of a refusal: which layers with matrices a model has."""
    counts: Counter[str] = Counter()
    left_out = {*head_names(model, head), *stem_names(model)}
    for name, what in describe(model).items():
        module = model.get_submodule(name.rpartition(".")[0])
        if not name.endswith(".weight") or name in left_out or what.kind in ("norm", "other"):
            continue
        if isinstance(module, nn.Conv2d):
            kind = "×".join(map(str, module.kernel_size)) + " convolution"
            kind += " in groups" if module.groups > 1 else ""
        else:
            kind = "Linear that is read, not called" if what.kind == "functional" else "Linear"
        counts[kind if what.block else f"{kind} outside blocks"] += 1
    listed = ", ".join(f"{count} × {kind}" for kind, count in counts.most_common()) or "nothing"
    return f"; {type(model).__name__} has, between stem and head: {listed}"


def _on_channels(model: nn.Module, head: HeadPatterns | None) -> dict[str, ParameterInfo]:
    """Module name -> what is known of its weight, for every matrix that a module may be put on."""
    left_out = {*head_names(model, head), *stem_names(model)}
    return {
        name.removesuffix(".weight"): what
        for name, what in describe(model).items()
        if what.takes_modules and name.endswith(".weight") and name not in left_out
    }


def blocks_of(model: nn.Module) -> tuple[str, ...]:
    """Names of the innermost blocks, in the model's order; a stage around others is none.

    Raises:
        ValueError: there is none.
    """
    blocks = innermost_blocks(model)
    if not blocks:
        raise ValueError(f"method: {type(model).__name__} has no blocks")
    return blocks


def check_rank(argument: str, rank: int, shapes: Iterable[Sequence[int]]) -> None:
    """Refuse a rank that one of the matrices cannot have."""
    most = min(min(shape) for shape in shapes)
    if rank > most:
        raise ValueError(f"{argument}: expected a rank of at most {most}, got {rank}")


def folding(names: Iterable[str]) -> Callable[[nn.Module], nn.Module]:
    """What puts, into the place of each of these layers, the plain one that it folds into."""

    def fold(model: nn.Module) -> nn.Module:
        for name in names:
            replace_module(model, name, model.get_submodule(name).folded())  # type: ignore[operator]
        return model

    return fold
