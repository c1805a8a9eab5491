"""Views of fake tensors are those of real ones, and all other calls are left to the fake mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from spt_kernels.memory import fake_view
from spt_kernels.memory.call_mode import CallMode


class Viewing(CallMode):
    """Makes views at once, as a ledger does."""

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return fake_view.call(func, args, kwargs)


def of_mode(func: Any, *args: Any) -> None:
    raise AssertionError(f"{func} was left to the fake mode")


VIEWS: dict[str, Callable[[Tensor], Any]] = {
    "view": lambda x: x.view(2, 3, 2, 5),
    "unsafe view": lambda x: torch.ops.aten._unsafe_view(x, [6, 10]),
    "transposed": lambda x: x.transpose(0, 2)[..., 1:],
    "permuted": lambda x: x.permute(2, 0, 1).unsqueeze(1),
    "expanded": lambda x: x[:, :1].expand(-1, 7, -1),
    "strided": lambda x: x.as_strided((3, 2), (5, 2), 4),
    "selected": lambda x: x.select(1, 2).squeeze(),
    "diagonal": lambda x: x.diagonal(0, 1, 2),
    "detached": lambda x: x.detach(),
    "split": lambda x: x.split([1, 3], 1),
    "unbound": lambda x: x.unbind(0),
    "complex": lambda x: torch.view_as_complex(x.as_strided((3, 2), (4, 1))).conj(),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_view_is_as_that_of_a_real_tensor(
    view: Callable[[Tensor], Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.zeros(3, 4, 5)
    with FakeTensorMode() as mode:
        fake = torch.empty(3, 4, 5, device=device)
        monkeypatch.setattr(FakeTensorMode, "dispatch", of_mode)
        with Viewing():
            found = tree_leaves(view(fake))
        monkeypatch.undo()
    expected = tree_leaves(view(real))
    for part, other in zip(found, expected, strict=True):
        assert type(part) is FakeTensor
        assert part.fake_mode is mode
        assert part.device == torch.device(device)
        assert part.untyped_storage()._cdata == fake.untyped_storage()._cdata
        assert (part.shape, part.stride()) == (other.shape, other.stride())
        assert part.storage_offset() == other.storage_offset()
        assert (part.dtype, part.is_conj()) == (other.dtype, other.is_conj())


def test_gradients_go_through_views() -> None:
    with FakeTensorMode():
        x = torch.empty(3, 4, requires_grad=True)
        with Viewing():
            first, _ = x.view(4, 3).t().unbind(1)[:2]
            (first * 2).sum().backward()
        x.detach().t().zero_()
    assert x.grad is not None
    assert (x.grad.shape, x.grad.stride()) == (x.shape, x.stride())
    assert x._version == 1, "what is written to a view is written to its base"


def test_other_calls_are_the_modes() -> None:
    with FakeTensorMode(), Viewing():
        x = torch.empty(2, 3)
        made = x + x.t().reshape(2, 3)
        assert made.untyped_storage()._cdata != x.untyped_storage()._cdata
        with pytest.raises(RuntimeError, match="invalid for input of size 6"):
            x.view(4)
        number = torch.tensor(3.0)  # whose value its fake keeps
        assert number.view(1).item() == 3.0


def test_real_tensors_are_viewed_as_ever() -> None:
    x = torch.arange(6.0)
    with Viewing():
        rows = x.view(2, 3)
    assert torch.equal(rows, torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]))
    assert rows.data_ptr() == x.data_ptr()
