"""Which layers a model calls, and which it reads the parameters of, if only besides."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


class Calls:
    """Follows every forward of a model, and in them the uses of the parameters of some modules.

    Attributes:
        called: those of `modules` that were used by calls alone. A layer whose forward never ran is
            none of them, nor is one whose parameters a gradient can reach from outside its forward
            as well: what stands for a layer sees its calls alone.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.called: set[nn.Module] = set()
        self._read: set[nn.Module] = set()
        self._running: Counter[nn.Module] = Counter()
        self._modules = set(modules)
        self._owners: dict[int, list[nn.Module]] = {}
        for module in self._modules:
            for parameter in module.parameters(recurse=False):
                self._owners.setdefault(id(parameter), []).append(module)

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Follow the forwards in a `with` block."""
        handles = (
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def note_use(self, parameter: Tensor) -> None:
        """Take note of a parameter that is used now."""
        owners = self._owners.get(id(parameter), ())
        if not owners or not torch.is_grad_enabled():
            return
        if not any(module in self._running for module in owners):
            self._read.update(owners)
            self.called.difference_update(owners)

    def _enter(self, module: nn.Module, args: object) -> None:
        self._running[module] += 1
        if module in self._modules and module not in self._read:
            self.called.add(module)

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        self._running[module] -= 1
        if not self._running[module]:
            del self._running[module]
