"""The matrices of a model's blocks that a method is put on, and layers in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from ..model import HeadPatterns, ParameterInfo, describe, head_names
from ..tuning import replace_module


def block_matrices(model: nn.Module, head: HeadPatterns | None = None) -> dict[str, ParameterInfo]:
    """Module name -> what is known of its weight, for every linear layer inside a block.

    A head that is given is no part of a block.

    Raises:
        ValueError: there is none.
    """
    of_head = () if head is None else head_names(model, head)
    matrices = {
        name.removesuffix(".weight"): what
        for name, what in describe(model).items()
        if what.kind == "linear" and what.block and name.endswith(".weight") and name not in of_head
    }
    if not matrices:
        raise ValueError("method: the model has no linear matrices in blocks")
    return matrices


def attention_matrices(model: nn.Module, head: HeadPatterns | None = None) -> dict[str, nn.Linear]:
    """The layers that compute attention's q, k, v; without attention, all in the blocks."""
    linear = block_matrices(model, head)
    chosen = [
        name for name, what in linear.items() if any(b.operation == "q" for b in what.row_blocks)
    ]
    modules = {name: model.get_submodule(name) for name in chosen or linear}
    return {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}


def blocks_of(model: nn.Module) -> tuple[str, ...]:
    """Names of the innermost blocks, in the model's order; a stage around others is none.

    Raises:
        ValueError: there is none.
    """
    names = dict.fromkeys(what.block for what in describe(model).values() if what.block)
    blocks = tuple(n for n in names if not any(other.startswith(f"{n}.") for other in names))
    if not blocks:
        raise ValueError(f"method: {type(model).__name__} has no blocks")
    return blocks


def last_matrices(model: nn.Module, head: HeadPatterns | None = None) -> dict[str, ParameterInfo]:
    """As `block_matrices`, of each block the last one: what its MLP ends with."""
    blocks = set(blocks_of(model))
    last = {
        what.block: (name, what)
        for name, what in block_matrices(model, head).items()
        if what.block in blocks
    }
    return dict(last.values())


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
