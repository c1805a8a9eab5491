"""The kernel that counts steps, and a planned step, interpreted, against the op's launcher."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels import adamw_plan
from spt_kernels.kernels import sparse_adamw as kernels
from spt_kernels.kernels.adamw_plan import AdamWPlan

from ...ops.test_sparse_adamw import AdamWEntry, dense_adamw, make_entry
from .test_sparse_adamw import KINDS, columns_of

SIZES = (31, 0, 65, 7, 40)
GROUPS = (1, 0, 0, 1, 0)
# lr, beta1, beta2, eps, weight_decay, maximize
NUMBERS = [(1e-2, 0.9, 0.99, 1e-8, 0.05, 0.0), (0.3, 0.0, 0.5, 1e-3, 0.0, 1.0)]
COUNTED = (0.0, 3.0, 0.0, 99.0, 0.0)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (kernels, adamw_plan):
        monkeypatch.setattr(module, "BLOCK", 32)
    monkeypatch.setattr(adamw_plan, "_ENTRIES", 4)  # more entries than one program counts


class Planned:
    """A plan of some entries, and gradients that are new tensors in every step."""

    def __init__(self, stochastic: bool = False) -> None:
        self.entries = [make_entry(n, KINDS[i % 4], seed=i) for i, n in enumerate(SIZES)]
        self.steps = [torch.tensor(count) for count in COUNTED]
        columns = columns_of(self.entries)
        columns.pop(1)  # the gradients
        self.plan = AdamWPlan(
            *columns,
            range(10, 15),
            steps=self.steps,
            groups=GROUPS,
            n_groups=2,
            stochastic_rounding=stochastic,
            seed=2**32 + 7,
        )
        self.lrs: list[Tensor | None] = [None, None]
        self.generator = torch.Generator().manual_seed(1)

    def step(self, numbers: list[tuple[float, ...]] = NUMBERS, **options: Any) -> list[Tensor]:
        grads = [torch.randn(n, generator=self.generator) for n in SIZES]
        self.grads = [grad.clone() for grad in grads]
        given: dict[str, Any] = {"grad_scale": None, "found_inf": None} | options
        self.plan.step([grad.data_ptr() for grad in self.grads], numbers, self.lrs, **given)
        return grads

    def state(self) -> list[Tensor]:
        return [*self.steps, *mutated(self.entries)]


def mutated(entries: list[AdamWEntry]) -> list[Tensor]:
    parts = ("param", "exp_avg", "exp_avg_sq", "target")
    found = [getattr(entry, part) for entry in entries for part in parts]
    return [tensor for tensor in found if tensor is not None]


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_steps_are_those_of_the_op_to_the_last_bit(stochastic: bool) -> None:
    ours = Planned(stochastic)
    expected = [make_entry(n, KINDS[i % 4], seed=i) for i, n in enumerate(SIZES)]
    columns = columns_of(expected)
    for t in range(1, 5):
        columns[1] = ours.step()
        rows = [
            [*NUMBERS[group][:5], count + t, NUMBERS[group][5], 10 + n]
            for n, (group, count) in enumerate(zip(GROUPS, COUNTED, strict=True))
        ]
        hyper = torch.tensor(rows, dtype=torch.float64)
        kernels.sparse_adamw(*columns, hyper, stochastic, 2**32 + 7)
    assert ours.steps == [count + 4 for count in COUNTED]
    for found, other in zip(mutated(ours.entries), mutated(expected), strict=True):
        assert torch.equal(found, other)


@pytest.mark.parametrize("t", [1, 7, 1000, 1_000_000])
def test_numbers_are_those_of_the_host(t: int) -> None:
    ours = Planned()
    for step in ours.steps:
        step.fill_(t - 1)
    numbers = [(1e-3, 0.9, 0.999, 1e-8, 0.1, 0.0), (0.3, 0.0, 0.99999, 1e-3, 0.0, 1.0)]
    ours.step(numbers)
    rows = [[*numbers[g][:5], t, numbers[g][5], 10 + n] for n, g in enumerate(GROUPS)]
    expected = kernels.numbers_of(torch.tensor(rows, dtype=torch.float64))
    torch.testing.assert_close(ours.plan._numbers, expected, rtol=1e-11, atol=0)


def test_a_learning_rate_on_the_device_is_read_in_each_step() -> None:
    tensors, plain = Planned(), Planned()
    tensors.lrs = [torch.tensor(0.0), torch.tensor(0.0, dtype=torch.float64)]
    for lr in (0.5, 0.25):
        for tensor in tensors.lrs:
            tensor.fill_(lr)  # type: ignore[union-attr]
        tensors.step()
        plain.step([(lr, *row[1:]) for row in NUMBERS])
    for found, other in zip(tensors.state(), plain.state(), strict=True):
        assert torch.equal(found, other)


def test_gradients_are_divided_by_the_scale_in_place() -> None:
    ours, plain = Planned(), Planned()
    scale = torch.tensor(3.0)
    for _ in range(2):
        grads = ours.step(grad_scale=scale)
        for grad, unscaled in zip(grads, ours.grads, strict=True):
            assert torch.equal(unscaled, grad / 3)
        addresses = [grad.data_ptr() for grad in ours.grads]
        plain.plan.step(addresses, NUMBERS, plain.lrs, grad_scale=None, found_inf=None)
    for found, other in zip(ours.state(), plain.state(), strict=True):
        assert torch.equal(found, other)


@pytest.mark.parametrize("found", [1.0, 2.0])  # on one device, on two
def test_an_overflow_changes_nothing_and_is_not_counted(found: float) -> None:
    ours = Planned()
    ours.step()
    before = [tensor.clone() for tensor in ours.state()]
    grads = ours.step(found_inf=torch.tensor(found), grad_scale=torch.tensor(2.0))
    for was, now in zip([*before, *grads], [*ours.state(), *ours.grads], strict=True):
        assert torch.equal(was, now)
    ours.step(found_inf=torch.tensor(0.0))
    assert ours.steps == [count + 2 for count in COUNTED]


def test_an_overflow_in_the_very_first_step() -> None:
    ours = Planned()
    before = [tensor.clone() for tensor in ours.state()]
    ours.step(found_inf=torch.tensor(1.0))
    for was, now in zip(before, ours.state(), strict=True):
        assert torch.equal(was, now)
    assert not any(math.isnan(value) for value in ours.plan._numbers.flatten().tolist())


def test_nothing_travels_when_nothing_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Planned()
    grads = [torch.ones(n) for n in SIZES]
    arguments = [grad.data_ptr() for grad in grads], NUMBERS, ours.lrs
    ours.plan.step(*arguments, grad_scale=None, found_inf=None)

    copies = []
    copy = Tensor.copy_
    monkeypatch.setattr(Tensor, "copy_", lambda *a, **k: copies.append(a) or copy(*a, **k))
    ours.plan.step(*arguments, grad_scale=None, found_inf=None)
    assert not copies
    other = [(0.1, *row[1:]) for row in NUMBERS]
    ours.plan.step(arguments[0], other, ours.lrs, grad_scale=None, found_inf=None)
    assert len(copies) == 1, "a schedule needs one small copy"


def test_many_steps_follow_torch() -> None:
    ours = Planned()
    ours.steps[2].zero_()
    entry = make_entry(SIZES[2], KINDS[2], seed=2)
    grads = [ours.step()[2] for _ in range(20)]
    expected = dense_adamw(entry, grads, torch.float32)
    torch.testing.assert_close(ours.entries[2].param, expected, rtol=2e-6, atol=1e-7)
