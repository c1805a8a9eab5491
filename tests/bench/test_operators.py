"""What a training step of ours asks of its host, counted in operators."""

from __future__ import annotations

import pytest
import torch

from bench.bench_host import METHODS, stepper
from bench.operators import count_operators


def test_every_operator_is_counted_once_prepared() -> None:
    x = torch.randn(3, 4)
    calls = []

    def run() -> None:
        calls.append(len(calls))
        for _ in range(10 if len(calls) < 3 else 2):  # the first calls have more to do
            x.sin()

    assert count_operators(run) == 2
    assert len(calls) > 3


@pytest.mark.parametrize("name", ["spt-lora", "spt-unstructured"])
def test_a_step_dispatches_fewer_operators_than_full_tuning(name: str) -> None:
    methods = {method.name: method for method in METHODS}
    ours, full = (count_operators(stepper(methods[which])) for which in (name, "full"))
    assert ours < full
