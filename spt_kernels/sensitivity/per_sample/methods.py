"""By which method each parameter of a model is measured."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from torch import nn


@dataclass(frozen=True)
class Methods:
    """How each parameter is measured.

    Attributes:
        n_uses: observed parameters, with the number of their uses in one forward pass.
        derived: those of them that are followed through what the model makes of them alone.
        expanded: parameters shared by all samples as `[1, ...]`, replaced by `[samples, ...]`.
        one_by_one: parameters for which only plain autograd on single samples is exact.
        idle: parameters that the loss does not depend on, as far as was seen.
        asleep: those of them of which a use would be observed.
        input_needs_grad: whether the model's checkpoints pass on gradients only then.
        called: the layers that the model uses by calls alone.
    """

    n_uses: Mapping[str, int]
    derived: frozenset[str]
    expanded: tuple[str, ...]
    one_by_one: tuple[str, ...]
    idle: tuple[str, ...]
    asleep: tuple[str, ...]
    input_needs_grad: bool
    called: frozenset[nn.Module]

    def with_woken(self, names: Collection[str]) -> Methods:
        """These, with some of the idle parameters measured one by one."""
        idle = tuple(name for name in self.idle if name not in names)
        return replace(self, one_by_one=(*self.one_by_one, *names), idle=idle)

    def with_idle(self, names: Collection[str]) -> Methods:
        """These, where some of those measured one by one have turned out to be idle."""
        one_by_one = tuple(name for name in self.one_by_one if name not in names)
        idle = {*self.idle, *names}
        return replace(
            self, one_by_one=one_by_one, idle=tuple(sorted(idle)) if names else self.idle
        )
