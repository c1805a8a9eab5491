"""`StandIn`: a forward in place of a module's own, on that module alone, until it is removed."""

from __future__ import annotations

from typing import Any

from torch import nn


class StandIn:
    """Called in place of a module's `forward`; the module is the object and the type that it was.

    It is an attribute of the module, as any `forward` that is assigned to one, so that it stays
    when the module's class changes as tuning begins or ends, and is copied and pickled with it.

    Attributes:
        module: on which it stands.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def put(self) -> None:
        """Stand in from now on."""
        vars(self.module)["forward"] = self

    def plain(self, *inputs: Any) -> Any:
        """What the module's own forward makes."""
        return type(self.module).forward(self.module, *inputs)


def stand_in_of(module: nn.Module) -> StandIn | None:
    """What stands in on a module, if that is ours."""
    own = vars(module).get("forward")
    return own if isinstance(own, StandIn) else None


def may_stand_in(module: nn.Module) -> bool:
    """Whether a module's forward is its class's, or ours: another's is left alone."""
    return "forward" not in vars(module) or stand_in_of(module) is not None


def remove(module: nn.Module) -> None:
    """Give a module its own forward back."""
    if stand_in_of(module) is not None:
        del vars(module)["forward"]
