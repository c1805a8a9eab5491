"""A layer of which some is trained as the head, and the rest is frozen: that is the base's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.errors import BaseModelMismatch
from spt_kernels.model import describe
from spt_kernels.plan import Plan
from spt_kernels.task import transfer

IMAGES, LABELS = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.norm, self.head = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.norm(F.gelu(self.fc(x))))
        return scores


def trained(head: tuple[str, ...], *, sparse: bool = True) -> nn.Module:
    model = Net()
    entries = {"fc.weight": torch.tensor([1, 8, 20])} if sparse else {}
    what = {"fc.weight": describe(model)["fc.weight"]}
    spt.apply(model, Plan(entries, {}, what, head=head, model_name="net"))
    optimizer = spt.SparseAdamW(spt.param_groups(model), lr=0.1)
    F.cross_entropy(model(IMAGES), LABELS).backward()
    optimizer.step()
    return model


@pytest.fixture(
    params=[("head.weight",), ("head.bias",), ("norm.weight", "head.weight", "head.bias")],
    ids=lambda head: "+".join(head),
)
def head(request: pytest.FixtureRequest) -> tuple[str, ...]:
    names: tuple[str, ...] = request.param
    return names


@pytest.mark.parametrize("sparse", [True, False], ids=["entries too", "head alone"])
def test_it_comes_back_on_the_base(head: tuple[str, ...], sparse: bool, tmp_path: Path) -> None:
    model = trained(head, sparse=sparse)
    spt.save_delta(model, tmp_path / "task")
    loaded = spt.load_delta(Net(), tmp_path / "task")
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    bank = spt.TaskBank(Net().eval())
    bank.load("own", tmp_path / "task")
    assert torch.equal(bank.use("own")(IMAGES), model(IMAGES))
    plain = spt.unload(loaded)
    for (name, value), own in zip(Net().named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(value, own), name


def test_it_comes_back_where_another_task_fails(
    head: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spt.save_delta(trained(("head.weight", "head.bias"), sparse=False), tmp_path / "other")
    model = trained(head)
    before = model(IMAGES)
    tried = []

    def fail_once(*given: object) -> None:
        tried.append(given)
        if len(tried) == 1:
            raise MemoryError
        apply_to_known(*given)  # type: ignore[arg-type]

    apply_to_known = transfer.apply_to_known
    monkeypatch.setattr(transfer, "apply_to_known", fail_once)
    with pytest.raises(MemoryError):
        spt.load_delta(model, tmp_path / "other")
    assert torch.equal(model(IMAGES), before)


def test_what_is_frozen_of_it_must_be_the_same(tmp_path: Path) -> None:
    spt.save_delta(trained(("head.weight",)), tmp_path / "task")
    model = Net()
    nn.init.normal_(model.head.bias)
    with pytest.raises(BaseModelMismatch, match=r"head\.bias: the weights differ"):
        spt.load_delta(model, tmp_path / "task")
