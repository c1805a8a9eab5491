"""Which layers a model calls, and which it only reads the weights of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import nn


@contextlib.contextmanager
def noting_calls(modules: Iterable[nn.Module]) -> Iterator[set[nn.Module]]:
    """Collect those of `modules` whose forward runs inside the `with` block."""
    called: set[nn.Module] = set()

    def note(module: nn.Module, args: object) -> None:
        called.add(module)

    handles = [module.register_forward_pre_hook(note) for module in modules]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()
