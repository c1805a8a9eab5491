"""`HeldOptimizer`: keeps the tensors of an optimizer that captured work reads in their places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# How a step is carried out rather than what it computes: as it was captured, whatever is loaded
_MANNERS = ("capturable", "foreach", "fused", "differentiable")


class HeldOptimizer:
    """Learning rates and state of an optimizer, at the addresses that a graph reads.

    A scheduler fills the learning rate where it is. A number that is put in its place, or the state
    of another run that is loaded, is copied to where the graph reads it.

    Args:
        optimizer: whose learning rates become tensors.
        device: where to.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._lrs: list[Tensor] = []
        for group in optimizer.param_groups:
            lr = group["lr"]
            if not (isinstance(lr, Tensor) and lr.device == device and lr.dim() == 0):
                group["lr"] = torch.tensor(float(lr), dtype=torch.float32, device=device)
            self._lrs.append(group["lr"])
        self._params = [list(group["params"]) for group in optimizer.param_groups]
        self._options = [
            {k: v for k, v in group.items() if k not in ("params", "lr", "initial_lr")}
            for group in optimizer.param_groups
        ]
        self._state: list[tuple[Tensor, str, Tensor]] = []

    def hold_state(self) -> None:
        """Take note of the state, once the optimizer has made it."""
        self._state = [
            (param, name, value)
            for params in self._params
            for param in params
            for name, value in self._optimizer.state.get(param, {}).items()
            if isinstance(value, Tensor)
        ]

    def carry_over(self) -> None:
        """Copy what was put in the place of a tensor that is read into that tensor.

        Raises:
            RuntimeError: something has changed that the graph holds as a number, or that is of
                another shape.
        """
        groups = self._optimizer.param_groups
        if len(groups) != len(self._lrs):
            raise RuntimeError(
                f"optimizer: it had {len(self._lrs)} groups when its step was captured, and has "
                f"{len(groups)}: capture the step anew"
            )
        for n, (group, lr, options) in enumerate(
            zip(groups, self._lrs, self._options, strict=True)
        ):
            if group["lr"] is not lr:
                lr.copy_(group["lr"]) if isinstance(group["lr"], Tensor) else lr.fill_(group["lr"])
                group["lr"] = lr
            self._check_options(n, group, options)
        states = self._optimizer.state
        for param, name, value in self._state:
            now = states.get(param, {}).get(name)
            if now is not value:
                self._copy(param, name, value, now)

    def _check_options(self, n: int, group: dict[str, Any], options: dict[str, Any]) -> None:
        params = group["params"]
        if len(params) != len(self._params[n]) or any(
            one is not other for one, other in zip(params, self._params[n], strict=True)
        ):
            raise RuntimeError(f"optimizer: group {n} has other parameters: capture the step anew")
        for name, value in options.items():
            now = group.get(name)
            if now is value or now == value:
                continue
            if name not in _MANNERS:
                raise RuntimeError(
                    f"optimizer: {name} of group {n} was {value} when its step was captured, and "
                    f"is {now}: only the learning rate may change (OneCycleLR: "
                    "cycle_momentum=False), or capture the step anew"
                )
            group[name] = value

    def _copy(self, param: Tensor, name: str, value: Tensor, now: Any) -> None:
        if now is None or (isinstance(now, Tensor) and now.shape != value.shape):
            got = "is gone" if now is None else f"is now {list(now.shape)}"
            raise RuntimeError(
                f"optimizer: its state {name!r}, {list(value.shape)} when its step was captured, "
                f"{got}: capture the step anew"
            )
        value.copy_(now) if isinstance(now, Tensor) else value.fill_(now)
        self._optimizer.state[param][name] = value
