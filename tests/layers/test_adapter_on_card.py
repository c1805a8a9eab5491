"""Adapters that go as on a card, whose products are kernels there, against the same by torch."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spt_kernels import AdapterSpec
from spt_kernels.layers import AdapterLinear
from spt_kernels.ops.launching import as_on_card

from .truth import sparse_linear

FUNCTION = "CardAdapterBackward"
ROWS = {
    "all": ((0, 6),),
    "thirds": ((0, 2), (2, 4), (4, 6)),
}
OTHER_ROWS = {"some": ((1, 5),), "of two widths": ((0, 2), (2, 6)), "apart": ((0, 2), (4, 6))}


def model(rows: tuple[tuple[int, int], ...], rank: int = 2, *, deltas: bool = False) -> nn.Module:
    torch.manual_seed(0)
    adapter = AdapterLinear(sparse_linear() if deltas else nn.Linear(8, 6), AdapterSpec(rank, rows))
    for parameter in adapter._new_parameters():
        nn.init.normal_(parameter)
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), adapter)


def run(net: nn.Module, *, as_card: bool, device: str = "cpu") -> dict[str, Tensor]:
    """Output and all gradients."""
    net.zero_grad()
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1)).to(device)
    x.requires_grad_()
    with as_on_card() if as_card else contextlib.nullcontext():
        y = net(x)
        F.mse_loss(y.float(), torch.ones_like(y, dtype=torch.float32)).backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    found = {"y": y.detach(), "x": x.grad, **grads}
    return {name: tensor.cpu() for name, tensor in found.items() if tensor is not None}


def name_of(net: nn.Module) -> str:
    y = net(torch.ones(2, 8))
    return "" if y.grad_fn is None else str(y.grad_fn.name())


@pytest.mark.parametrize("deltas", [False, True])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_output_and_gradients_are_those_of_the_other_way(
    rows: tuple[tuple[int, int], ...], deltas: bool
) -> None:
    net = model(rows, deltas=deltas)
    expected = run(net, as_card=False)
    assert {"2.down_weight", "2.down_bias", "2.up_weight", "2.up_bias"} <= expected.keys()
    torch.testing.assert_close(run(net, as_card=True), expected)
    with as_on_card():
        assert name_of(net) == FUNCTION


@pytest.mark.gpu
@pytest.mark.parametrize("rows", (ROWS | OTHER_ROWS).values(), ids=[*ROWS, *OTHER_ROWS])
def test_on_a_card(rows: tuple[tuple[int, int], ...]) -> None:
    net = model(rows)
    expected = run(copy.deepcopy(net), as_card=False)
    found = run(net.to("cuda"), as_card=False, device="cuda")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("trained", ["down_weight", "down_bias", "up_weight", "up_bias"])
def test_some_of_it_may_be_frozen(trained: str) -> None:
    net = model(ROWS["thirds"])
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name == f"2.{trained}")
    expected = run(net, as_card=False)
    assert expected.keys() == {"y", "x", f"2.{trained}"}
    torch.testing.assert_close(run(net, as_card=True), expected)


def test_its_output_may_be_edited_in_place() -> None:
    net, x = model(ROWS["all"]), torch.ones(2, 8)
    with as_on_card():
        y = net(x)
        y += 1.0
        F.relu_(y).sum().backward()
    assert net[2].up_bias.grad.isfinite().all()


def test_nothing_goes_through_the_dispatcher_that_may_be_launched() -> None:
    net, x = model(ROWS["thirds"]), torch.ones(2, 8)
    with as_on_card(), torch.profiler.profile() as profile:
        net(x).sum().backward()
    called = {event.name for event in profile.events()}
    assert "aten::gelu_backward" in called
    assert not [name for name in called if name.startswith("spt::")]


def test_its_gradients_can_be_differentiated() -> None:
    adapter, x = model(ROWS["thirds"])[2], torch.randn(4, 8)
    parameters = adapter._new_parameters()

    def penalty(as_card: bool) -> tuple[Tensor, ...]:
        with as_on_card() if as_card else contextlib.nullcontext():
            loss = adapter(x).pow(3).sum()
            first = torch.autograd.grad(loss, parameters, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), parameters)

    for found, expected in zip(penalty(True), penalty(False), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rows", OTHER_ROWS.values(), ids=OTHER_ROWS)
def test_what_it_is_not_for_goes_by_torch(rows: tuple[tuple[int, int], ...]) -> None:
    net = model(rows)
    torch.testing.assert_close(run(net, as_card=True), run(net, as_card=False))
    with as_on_card():
        assert name_of(net) != FUNCTION


def test_more_of_what_it_is_for() -> None:
    net = model(ROWS["all"])
    assert name_of(net) != FUNCTION  # on a CPU
    with as_on_card():
        assert name_of(model(ROWS["all"], rank=65)) != FUNCTION
        assert name_of(net.requires_grad_(False)) == ""
        empty = net(torch.zeros(0, 8))
    assert empty.shape == (0, 6)
