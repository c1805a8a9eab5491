"""The same steps of an optimizer anywhere: on a CPU, a card, or what pretends to be one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spt_kernels.layers import SparseDeltaLinear
from spt_kernels.optim import SparseAdamW, param_groups

CLOSE = {"rtol": 2e-6, "atol": 1e-7}


class Run:
    """A model of two sparse layers and a head, and steps on gradients made up on the CPU."""

    def __init__(
        self,
        device: str,
        dtype: torch.dtype = torch.float32,
        head: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        first, second = nn.Linear(20, 12).to(dtype), nn.Linear(12, 8).to(dtype)
        self.model = nn.Sequential(
            SparseDeltaLinear(first, torch.arange(3, 240, 7), bias_index=torch.arange(0, 12, 4)),
            SparseDeltaLinear(second, torch.arange(1, 96, 5)),
            nn.Linear(8, 3).to(head or dtype),
        ).to(device)
        for layer in self.model[:2]:
            layer.write_stale_deltas()  # as a forward does: a layer never called is refused
        options = {"lr": 1e-2, "seed": 3} | options
        self.optimizer = SparseAdamW(param_groups(self.model), **options)
        self.params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.generator = torch.Generator().manual_seed(1)
        self.device = device

    def new_grads(self, scale: float = 1.0) -> None:
        for param in self.params:
            grad = torch.randn(param.shape, generator=self.generator) * scale
            param.grad = grad.to(self.device, param.dtype)

    def steps(self, n: int) -> Run:
        for _ in range(n):
            self.new_grads()
            self.optimizer.step()
        return self

    def state(self) -> list[Tensor]:
        found = [p.detach() for p in self.model.parameters()]
        states = [self.optimizer.state[param] for param in self.params]
        found += [state[name] for state in states for name in ("exp_avg", "exp_avg_sq", "step")]
        return [tensor.cpu() for tensor in found]


def assert_close(one: Run, other: Run) -> None:
    for found, expected in zip(one.state(), other.state(), strict=True):
        gap = CLOSE if found.dtype == torch.float32 else {"rtol": 2**-6, "atol": 1e-3}
        torch.testing.assert_close(found, expected, **gap)


def scheduled(run: Run) -> Callable[[], None]:
    schedule = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.5)

    def step() -> None:
        run.optimizer.step()
        schedule.step()

    return step


def scale_of(run: Run, found: float) -> None:
    device = run.device
    run.optimizer.grad_scale = torch.tensor(8.0, device=device)
    run.optimizer.found_inf = torch.tensor(found, device=device)
