"""Which layers a model calls, and which it reads the parameters of, if only besides."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from .interception import INERT_CALLS, call_name, tensors_in


@contextlib.contextmanager
def noting_calls(modules: Iterable[nn.Module]) -> Iterator[set[nn.Module]]:
    """Collect those of `modules` that are used by calls alone inside the `with` block.

    A layer whose forward never runs is none of them, nor is one whose parameters a gradient can
    reach from outside its forward as well: what stands for a layer sees its calls alone.
    """
    uses = _Uses(modules)
    handles = (
        register_module_forward_pre_hook(uses.enter),
        register_module_forward_hook(uses.leave, always_call=True),
    )
    try:
        with uses:
            yield uses.called
    finally:
        for handle in handles:
            handle.remove()


class _Uses(TorchFunctionMode):
    """Follows every forward, and in them every operation on the parameters of some modules.

    Attributes:
        called: modules whose forward has run and whose parameters nothing else has used.
        read: modules whose parameters something else has used.
        running: module -> how many of its forwards are running, for any module at all.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.called: set[nn.Module] = set()
        self.read: set[nn.Module] = set()
        self.running: Counter[nn.Module] = Counter()
        self._modules = set(modules)
        self._owners: dict[int, list[nn.Module]] = {}
        for module in self._modules:
            for parameter in module.parameters(recurse=False):
                self._owners.setdefault(id(parameter), []).append(module)

    def enter(self, module: nn.Module, args: object) -> None:
        """Before a forward."""
        self.running[module] += 1
        if module in self._modules and module not in self.read:
            self.called.add(module)

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        """After a forward, or a failed one."""
        self.running[module] -= 1
        if not self.running[module]:
            del self.running[module]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # outside all forwards it is the measurement that handles a parameter
        if self.running and torch.is_grad_enabled() and call_name(func) not in INERT_CALLS:
            for tensor in tensors_in(args, kwargs):
                owners = self._owners.get(id(tensor), ())
                if owners and not any(module in self.running for module in owners):
                    self.read.update(owners)
                    self.called.difference_update(owners)
        return func(*args, **kwargs)
