"""What a graph reads of an optimizer stays where it is, whatever is put in its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from spt_kernels.step.held_optimizer import HeldOptimizer

CPU = torch.device("cpu")


def held() -> tuple[HeldOptimizer, torch.optim.Optimizer, nn.Parameter]:
    """An optimizer of two groups, after a step."""
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    groups: list[Any] = [{"params": [params[0]]}, {"params": [params[1]], "lr": 0.5}]
    optimizer = torch.optim.AdamW(groups, lr=0.25)
    made = HeldOptimizer(optimizer, CPU)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    made.hold_state()
    return made, optimizer, params[0]


def test_rates_are_tensors_that_stay() -> None:
    made, optimizer, _ = held()
    rates = [group["lr"] for group in optimizer.param_groups]
    assert [rate.item() for rate in rates] == [0.25, 0.5]
    assert all(rate.dim() == 0 and rate.dtype == torch.float32 for rate in rates)
    for value in (0.125, torch.tensor(0.125, dtype=torch.float64), torch.tensor([0.125])[0]):
        rates[0].fill_(1.0)
        optimizer.param_groups[0]["lr"] = value
        made.carry_over()
        assert optimizer.param_groups[0]["lr"] is rates[0]
        assert rates[0].item() == 0.125
    rates[1].mul_(2)  # as a scheduler
    made.carry_over()
    assert optimizer.param_groups[1]["lr"] is rates[1]
    assert rates[1].item() == 1.0


def test_a_rate_that_is_on_the_device_is_kept() -> None:
    rate = torch.tensor(0.5, dtype=torch.float64)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=rate)
    HeldOptimizer(optimizer, CPU)
    assert optimizer.param_groups[0]["lr"] is rate


def test_loaded_state_is_copied_to_where_it_is_read() -> None:
    made, optimizer, param = held()
    own = dict(optimizer.state[param])
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"] = torch.full((3,), 7.0)
    state["state"][0]["step"] = torch.tensor(9.0)
    state["param_groups"][0] |= {"capturable": True, "lr": 0.75}
    optimizer.load_state_dict(state)
    assert optimizer.state[param]["exp_avg"] is not own["exp_avg"]
    made.carry_over()
    for name, tensor in own.items():
        assert optimizer.state[param][name] is tensor
    assert own["exp_avg"].tolist() == [7.0] * 3
    assert own["step"].item() == 9.0
    assert optimizer.param_groups[0]["lr"].item() == 0.75
    assert optimizer.param_groups[0]["capturable"] is False  # how it is stepped is not loaded


def test_state_of_another_shape_or_none_is_refused() -> None:
    made, optimizer, param = held()
    optimizer.state[param]["exp_avg"] = torch.ones(4)
    with pytest.raises(RuntimeError, match=r"its state 'exp_avg', \[3\] when .* is now \[4\]"):
        made.carry_over()
    optimizer.state.clear()
    with pytest.raises(RuntimeError, match=r"its state 'step', \[\] when .*, is gone"):
        made.carry_over()


def test_whatever_the_graph_holds_as_a_number_may_not_change() -> None:
    made, optimizer, param = held()
    group = optimizer.param_groups[1]
    group["weight_decay"], before = 0.3, group["weight_decay"]
    with pytest.raises(RuntimeError, match=rf"weight_decay of group 1 was {before} when"):
        made.carry_over()
    group["weight_decay"] = before
    made.carry_over()
    group["params"] = [param]
    with pytest.raises(RuntimeError, match="group 1 has other parameters"):
        made.carry_over()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(RuntimeError, match="it had 2 groups when its step was captured, and has 3"):
        made.carry_over()
