"""`SparseAdamW` on a card: what only hardware shows of waits, graphs and agreement."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from spt_kernels.optim import SparseAdamW
from spt_kernels.optim.prepared_step import PreparedStep

from .runs import Run, assert_close, scale_of, scheduled

pytestmark = pytest.mark.gpu


@pytest.fixture
def no_waits() -> Iterator[Any]:
    """Makes every wait for the device an error, once it is called."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def captured(call: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_steps_are_those_of_a_cpu_and_wait_for_nothing(dtype: torch.dtype, no_waits: Any) -> None:
    ours, expected = (Run(device, dtype, torch.float32).steps(2) for device in ("cuda", "cpu"))
    step, other = scheduled(ours), scheduled(expected)
    for n in range(4):
        for run in (ours, expected):
            run.new_grads()
            scale_of(run, float(n == 2))
        no_waits()
        step()
        torch.cuda.set_sync_debug_mode("default")
        other()
    assert ours.optimizer._prepared is not None
    assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_prepared_steps_are_the_general_ones(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Run("cuda", dtype, torch.float32, stochastic_rounding=True).steps(5)
    monkeypatch.setattr(PreparedStep, "of", lambda *_: None)
    general = Run("cuda", dtype, torch.float32, stochastic_rounding=True).steps(5)
    assert_equal(ours, general)


def assert_equal(one: Run, other: Run) -> None:
    for found, expected in zip(one.state(), other.state(), strict=True):
        assert torch.equal(found, expected)


def test_grad_scaler_never_waits(no_waits: Any) -> None:
    results = []
    for kind in (SparseAdamW, torch.optim.AdamW):
        head = nn.Linear(6, 3).cuda()
        with torch.no_grad():
            for p in head.parameters():
                p.fill_(0.1)
        x = torch.arange(24.0, device="cuda").view(4, 6) / 10
        optimizer = kind(head.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
        factors = torch.tensor([1.0, 1.0, float("inf"), 1.0, 1.0], device="cuda").unbind()
        for n, factor in enumerate(factors):
            if kind is SparseAdamW and n > 0:
                no_waits()
            optimizer.zero_grad()
            scaler.scale(head(x).square().sum() * factor).backward()
            if n == 3:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        torch.cuda.set_sync_debug_mode("default")
        assert float(optimizer.state[head.weight]["step"]) == 4
        assert scaler.get_scale() == 512
        results.append(list(head.parameters()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_step_is_a_step_whatever_happens_between_replays(dtype: torch.dtype) -> None:
    lr = torch.tensor(1e-2, device="cuda")
    ours, eager = (
        Run("cuda", dtype, torch.float32, lr=rate, capturable=True, stochastic_rounding=True)
        for rate in (lr, 1e-2)
    )
    for run in (ours, eager):
        run.steps(1).new_grads()
    static = [[param.grad for param in run.params] for run in (ours, eager)]
    graph = captured(ours.optimizer.step)
    for now in (1e-2, 5e-3, 0.1):
        lr.fill_(now)
        for group in eager.optimizer.param_groups:
            group["lr"] = float(lr)
        graph.replay()
        eager.optimizer.step()
        for run, grads in zip((ours, eager), static, strict=True):
            run.steps(1)  # on other gradients
            for param, grad in zip(run.params, grads, strict=True):
                param.grad = grad
    assert_equal(ours, eager)


def test_a_captured_schedule_and_a_head_in_16_bits() -> None:
    lr = torch.tensor(1e-2, device="cuda")
    ours = Run("cuda", torch.bfloat16, lr=lr, capturable=True).steps(1)
    expected = Run("cpu", torch.bfloat16).steps(1)
    for run in (ours, expected):
        run.new_grads()
    graph = captured(ours.optimizer.step)
    schedules = [
        torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.5) for run in (ours, expected)
    ]
    for _ in range(4):
        graph.replay()
        expected.optimizer.step()
        for schedule in schedules:
            schedule.step()
    assert_close(ours, expected)


def test_a_captured_step_skips_overflows() -> None:
    ours, expected = Run("cuda", capturable=True).steps(1), Run("cpu").steps(1)
    for run in (ours, expected):
        run.new_grads(8.0)
        scale_of(run, 0.0)
    graph = captured(ours.optimizer.step)
    for found in (0.0, 1.0, 0.0):
        for run in (ours, expected):
            run.optimizer.found_inf.fill_(found)
            for param in run.params:
                param.grad.fill_(float("inf") if found else 8.0)
        graph.replay()
        expected.optimizer.step()
    assert_close(ours, expected)
    assert all(float(state["step"]) == 3 for state in ours.optimizer.state.values())


def test_a_grad_scaler_can_be_captured() -> None:
    param = nn.Parameter(torch.tensor([1.0, -2.0], device="cuda"))
    optimizer = SparseAdamW([param], lr=0.1, capturable=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0, growth_interval=1000)
    param.grad = torch.full_like(param, 8.0)

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    scaler.scale(param.detach().sum())  # makes the scale
    step()
    graph = captured(step)
    for grad in (8.0, float("inf"), 4.0):
        param.grad.fill_(grad)
        graph.replay()
    expected = nn.Parameter(torch.tensor([1.0, -2.0]))
    theirs = torch.optim.AdamW([expected], lr=0.1)
    for _ in range(3):
        expected.grad = torch.ones(2)
        theirs.step()
    torch.testing.assert_close(param.cpu(), expected, rtol=2e-5, atol=2e-6)
    assert scaler.get_scale() == 4


def test_a_state_dict_of_a_cpu_goes_on_on_a_card() -> None:
    run, cpu = Run("cuda"), Run("cpu").steps(2)
    run.optimizer.load_state_dict(cpu.optimizer.state_dict())
    with torch.no_grad():
        for ours, theirs in zip(run.params, cpu.params, strict=True):
            ours.copy_(theirs)
    for one in (run, cpu):
        one.generator.manual_seed(5)
        one.steps(3)
    assert all(state["step"].is_cuda for state in run.optimizer.state.values())
    assert_close(run, cpu)


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_other_layouts_go_through_torch(found: float) -> None:
    results = []
    for device in ("cuda", "cpu"):
        dense = torch.ones(2, 3, 4, 4, device=device).to(memory_format=torch.channels_last)
        params = [nn.Parameter(dense), nn.Parameter(torch.ones(4, 3, device=device).t())]
        params.append(nn.Parameter(torch.ones(7, device=device)))
        optimizer = SparseAdamW(params, lr=1e-2)
        for n in range(3):
            for param in params:
                param.grad = torch.full_like(param, 2.0 + n)
            optimizer.grad_scale = torch.tensor(2.0, device=device)
            optimizer.found_inf = torch.tensor(found if n == 1 else 0.0, device=device)
            optimizer.step()
        results.append([param.detach().cpu() for param in params])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)
