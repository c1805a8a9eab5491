"""The matrices of a model's blocks that a method is put on, and layers in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from ..model import ParameterInfo, describe
from ..tuning import replace_module


def block_matrices(model: nn.Module) -> dict[str, ParameterInfo]:
    """Module name -> what is known of its weight, for every linear layer inside a block."""
    return {
        name.removesuffix(".weight"): what
        for name, what in describe(model).items()
        if what.kind == "linear" and what.block and name.endswith(".weight")
    }


def attention_matrices(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that compute attention's q, k, v; without attention, all in the blocks."""
    linear = block_matrices(model)
    chosen = [
        name for name, what in linear.items() if any(b.operation == "q" for b in what.row_blocks)
    ]
    modules = {name: model.get_submodule(name) for name in chosen or linear}
    return {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}


def folding(names: Iterable[str]) -> Callable[[nn.Module], nn.Module]:
    """What puts, into the place of each of these layers, the plain one that it folds into."""

    def fold(model: nn.Module) -> nn.Module:
        for name in names:
            replace_module(model, name, model.get_submodule(name).folded())  # type: ignore[operator]
        return model

    return fold
