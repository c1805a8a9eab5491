"""`SavedState`: all that a few steps of training change, so that they can be undone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..layers import SparseDelta, sparse_deltas
from .training_step import TrainingStep

# What optimizers fill the state of a parameter with before its first step, by torch's names
_INITIAL = {
    **dict.fromkeys(("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf"), 0.0),
    **dict.fromkeys(("square_avg", "grad_avg", "acc_delta", "momentum_buffer"), 0.0),
    "mu_product": 1.0,
}


class SavedState:
    """Parameters, buffers, gradients, optimizer, scaler and generators as they are when it is made.

    Values are copied to the host: where memory is short, it is so on the card.
    """

    def __init__(self, step: TrainingStep, device: torch.device) -> None:
        model, self._optimizer, self._scaler = step.model, step.optimizer, step.scaler
        self._device = device
        trained = trained_parameters(step)
        self._values = [(t, _on_host(t)) for t in (*trained, *model.buffers())]
        self._gradients = [
            (p, p.grad, None if p.grad is None else _on_host(p.grad)) for p in trained
        ]
        written = [d for d in sparse_deltas(model).values() if not d.beside]
        self._deltas = [(d, _on_host(_entries(d)), d.is_fresh) for d in written]
        self._lrs = [group["lr"] for group in self._optimizer.param_groups]
        self._state = {
            param: {name: (value, _on_host(value)) for name, value in state.items()}
            for param, state in self._optimizer.state.items()
        }
        if self._scaler is not None:
            self._scale = (self._scaler._scale, self._scaler._growth_tracker)
            self._scaler_state = self._scaler.state_dict()
        self._random = host_random_state()
        self._card_random = torch.cuda.get_rng_state(device)

    def rewind(self) -> None:
        """Put all values back; tensors that steps have made stay, as they were before a step.

        Raises:
            RuntimeError: the optimizer has made some whose first values are not known.
        """
        self._put_back()
        for group in self._optimizer.param_groups:
            for param in group["params"]:
                saved = self._state.get(param, {})
                for name, value in self._optimizer.state.get(param, {}).items():
                    if name not in saved and isinstance(value, Tensor):
                        value.fill_(_initial(self._optimizer, group, name))
        if self._scaler is not None:
            self._scaler.load_state_dict(self._scaler_state)

    def restore(self) -> None:
        """Put everything back, as if there had been no step."""
        self._put_back()
        for param in [p for p in self._optimizer.state if p not in self._state]:
            del self._optimizer.state[param]
        for param, state in self._state.items():
            self._optimizer.state[param] = {name: value for name, (value, _) in state.items()}
        for group, lr in zip(self._optimizer.param_groups, self._lrs, strict=True):
            group["lr"] = lr
        for param, grad, value in self._gradients:
            param.grad = grad
            if grad is not None and value is not None:
                grad.copy_(value)
        if self._scaler is not None:
            self._scaler.load_state_dict(self._scaler_state)
            self._scaler._scale, self._scaler._growth_tracker = self._scale

    @torch.no_grad()
    def _put_back(self) -> None:
        for tensor, value in self._values:
            tensor.copy_(value)
        for delta, entries, is_fresh in self._deltas:
            delta.target.view(-1).index_copy_(0, delta.index.long(), entries.to(self._device))
            if is_fresh:
                delta.written.record(delta.delta)
        for param, state in self._state.items():
            now = self._optimizer.state[param]
            for name, (tensor, value) in state.items():
                for place in (tensor, now.get(name)):
                    if isinstance(place, Tensor):
                        place.copy_(value)
        set_host_random_state(self._random)
        torch.cuda.set_rng_state(self._card_random, self._device)


def trained_parameters(step: TrainingStep) -> list[Tensor]:
    """What gets a gradient or is stepped, each once."""
    of_model = [p for p in step.model.parameters() if p.requires_grad]
    of_optimizer = [p for group in step.optimizer.param_groups for p in group["params"]]
    return list(dict.fromkeys((*of_model, *of_optimizer)))


def host_random_state() -> tuple[Any, ...]:
    """Of the generators that code on the host draws from."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return torch.get_rng_state(), random.getstate(), (name, np.asarray(keys).copy(), *rest)


def set_host_random_state(state: tuple[Any, ...]) -> None:
    """Put what `host_random_state` gave back."""
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    np.random.set_state(state[2])


def is_same_random_state(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether nothing was drawn between the two."""
    keys = np.array_equal(one[2][1], other[2][1]) and one[2][2:] == other[2][2:]
    return torch.equal(one[0], other[0]) and one[1] == other[1] and keys


def _on_host(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _entries(delta: SparseDelta) -> Tensor:
    return delta.target.detach().view(-1).index_select(0, delta.index)


def _initial(optimizer: torch.optim.Optimizer, group: dict[str, Any], name: str) -> float:
    if name not in _INITIAL or (name == "momentum_buffer" and group.get("dampening")):
        raise RuntimeError(
            f"optimizer: the first value of the state {name!r} of {type(optimizer).__name__} is "
            "not known: let it take one ordinary step before its steps are captured"
        )
    return _INITIAL[name]
