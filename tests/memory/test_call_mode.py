"""Calls on fake tensors are told, but for the question for a device, which is answered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from spt_kernels.memory.call_mode import CallMode

DEVICE = torch.ops.prim.device.default


class Seen(CallMode):
    """Keeps what was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.calls.append(func)
        return super().called(func, args, kwargs)


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_device_is_answered_and_not_told(device: str) -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, device=device)
    with Seen() as seen:
        y = x @ x.t()
        assert DEVICE(x) == DEVICE(y) == torch.device(device)
        with FakeTensorMode():
            made = torch.ones(2, device=device)
    assert made.device == torch.device(device)
    assert torch.ops.aten.mm.default in seen.calls
    assert DEVICE not in seen.calls


def test_tensors_that_are_no_fakes_are_asked_themselves() -> None:
    x = torch.ones(2)
    with Seen() as seen:
        assert DEVICE(x) == x.device
        assert torch.equal(x + x, torch.full((2,), 2.0))
    assert torch.ops.aten.add.Tensor in seen.calls
