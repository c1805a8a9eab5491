"""Sparse deltas of parameters that a module reads as attributes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from spt_kernels.layers import (
    attach_parameter,
    delta_of,
    is_tuned,
    sparse_deltas,
    tuned_modules,
    untune,
)


class Scales(nn.Module):
    """Two parameters, and a method of its own that a tuned class must not hide."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(1, 2, 6))
        self.table = nn.Parameter(torch.linspace(0, 1, 12).view(6, 2))
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x) * self.gamma) @ self.table

    def release(self) -> str:
        return "released"


GAMMA, TABLE = torch.tensor([0, 4]), torch.tensor([1, 5, 10])


def attached() -> tuple[Scales, Scales]:
    torch.manual_seed(0)
    module = Scales()
    plain = copy.deepcopy(module)
    attach_parameter(module, "gamma", GAMMA)
    attach_parameter(module, "table", TABLE)
    return module, plain


def test_gradients_are_those_of_the_plain_module() -> None:
    module, plain = attached()
    x = torch.randn(3, 6)
    y, expected = module(x), plain(x)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(module.gamma_delta.grad, plain.gamma.grad[GAMMA])
    torch.testing.assert_close(module.table_delta.grad, plain.table.grad.flatten()[TABLE])
    assert module._parameters["gamma"].grad is None
    torch.testing.assert_close(module.inner.weight.grad, plain.inner.weight.grad)


def test_reading_the_attribute_anywhere_counts() -> None:
    module, _ = attached()
    (2 * module.gamma).sum().backward()  # not in forward
    assert module.gamma_delta.grad.tolist() == [2.0, 2.0]
    with torch.no_grad():
        module.gamma_delta.fill_(5.0)
        assert module.gamma[[0, 4]].tolist() == (module.gamma_original + 5.0).tolist()


def test_names_type_and_methods_stay() -> None:
    module, plain = attached()
    assert isinstance(module, Scales)
    assert type(module).__name__ == "Scales"
    assert module.release() == "released"
    assert is_tuned(module)
    assert not is_tuned(plain)
    added = {f"{n}_{part}" for n in ("gamma", "table") for part in ("delta", "index", "original")}
    assert set(module.state_dict()) == set(plain.state_dict()) | added
    assert set(sparse_deltas(module)) == {"gamma", "table"}
    assert delta_of(module.table_delta).target is module._parameters["table"]
    assert list(tuned_modules(nn.Sequential(module))) == ["0"]
    assert [name for name, _ in module.plain.named_parameters()] == [
        name for name, _ in plain.named_parameters()
    ]
    assert type(module.plain) is Scales


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_train_apart(duplicate) -> None:  # type: ignore[no-untyped-def]
    module, _ = attached()
    nn.init.constant_(module.gamma_delta, 0.5)
    twin = duplicate(module)
    x = torch.randn(3, 6)
    assert torch.equal(twin(x), module(x))
    twin(x).sum().backward()
    assert twin.gamma_delta.grad is not None
    assert module.gamma_delta.grad is None
    assert delta_of(twin.gamma_delta).target is twin._parameters["gamma"]


def test_casting_keeps_deltas_fp32() -> None:
    module, _ = attached()
    nn.init.constant_(module.gamma_delta, 0.001)
    module.bfloat16()
    assert module.gamma_delta.dtype == torch.float32
    expected = (module.gamma_original.double() + 0.001).bfloat16()
    assert torch.equal(module._parameters["gamma"][GAMMA], expected)


def test_state_dict_round_trip() -> None:
    module, _ = attached()
    nn.init.constant_(module.table_delta, 0.25)
    x = torch.randn(3, 6)
    y = module(x)
    other, _ = attached()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), y)


def test_detached_it_is_the_plain_module_again() -> None:
    module, plain = attached()
    nn.init.constant_(module.gamma_delta, 0.5)
    for delta in sparse_deltas(module).values():
        delta.restore()
    untune(module)
    assert type(module) is Scales
    assert list(module.state_dict()) == list(plain.state_dict())
    for own, other in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(own, other)
    assert vars(module).keys() == vars(plain).keys()


def test_refusals_leave_the_module_as_it_was() -> None:
    module = Scales()
    with pytest.raises(ValueError, match=r"must lie in \[0, 6\)"):
        attach_parameter(module, "gamma", torch.tensor([6]))
    with pytest.raises(ValueError, match="no beta"):
        attach_parameter(module, "beta", torch.tensor([0]))
    assert type(module) is Scales
    attach_parameter(module, "gamma", GAMMA)
    with pytest.raises(ValueError, match="gamma has a sparse delta already"):
        attach_parameter(module, "gamma", GAMMA)
    module(torch.randn(2, 6))


def test_gradient_can_be_differentiated_again() -> None:
    module, plain = attached()
    gammas = []
    for m, leaf in ((module, module.gamma_delta), (plain, plain.gamma)):
        x = torch.linspace(0, 1, 6, requires_grad=True)
        (gx,) = torch.autograd.grad((m.gamma * x**2).sum(), x, create_graph=True)
        gammas.append(torch.autograd.grad(gx.square().sum(), leaf)[0])
    torch.testing.assert_close(gammas[0], gammas[1][GAMMA])
