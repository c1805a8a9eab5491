"""What a model keeps of its parameters from one forward to the next, forgotten as they change."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def forget_kept(modules: Iterable[nn.Module]) -> None:
    """Let forwards look anew at parameters that were just written.

    Autocast keeps what it has cast of them. In eval mode some modules keep what they have looked up
    in them, as the attention of LeViT and of TinyViT its biases, until they are in training mode.

    Args:
        modules: all that may keep something; each is in the same mode afterwards.
    """
    torch.clear_autocast_cache()
    for module in modules:
        if not module.training and has_own_mode(module) and _keeps_tensors(module):
            modes = [(each, each.training) for each in module.modules()]
            module.train(True)
            module.train(False)
            for each, mode in modes:
                each.training = mode


def has_own_mode(module: nn.Module) -> bool:
    """Whether a module does more than others do when its mode is set."""
    return type(module).train is not nn.Module.train


def _keeps_tensors(module: nn.Module) -> bool:
    """Whether a module with parameters of its own has tensors in a dictionary besides."""
    own = vars(module)
    kept = (own[name] for name in own.keys() - _MEMBERS if type(own[name]) is dict)
    return bool(module._parameters) and any(
        isinstance(value, Tensor) for some in kept for value in some.values()
    )


_MEMBERS = vars(nn.Module()).keys()  # dictionaries that every module has
