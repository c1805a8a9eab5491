"""What a model keeps of its parameters in eval mode follows the tasks that come and go."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.layers import sparse_deltas, write_deltas
from spt_kernels.model.kept import forget_kept
from spt_kernels.task.set_aside import merge_aside, put_task_back, take_aside, unmerge


class Keeps(nn.Module):
    """As LeViT's attention: biases are looked up once, until the model is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(8))
        self.register_buffer("index", torch.tensor([0, 2, 2, 3, 6, 7]))
        self.looked_up: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> None:  # type: ignore[override]  # neither does LeViT's
        super().train(mode)
        if mode:
            self.looked_up = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x + self.bias[self.index]
        if "bias" not in self.looked_up:
            self.looked_up["bias"] = self.bias[self.index]
        return x + self.looked_up["bias"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.keeps, self.head = nn.Linear(6, 6), Keeps(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.keeps(self.first(x)))


X = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def anew(model: nn.Module) -> Tensor:
    """What a model says that has kept nothing."""
    other = copy.deepcopy(model)
    other.keeps.looked_up = {}  # type: ignore[union-attr]
    return other(X)


def plain() -> nn.Module:
    model = Net()
    model.eval()
    return model


@torch.no_grad()
def task(seed: int, folder: Path) -> Path:
    model = plain()
    score = torch.rand(8, generator=torch.Generator().manual_seed(seed))
    sensitivity = spt.Sensitivity.from_tensors({"keeps.bias": score + 1}, num_samples=1)
    spt.apply(model, spt.allocate(sensitivity, 6 if seed < 2 else 8, None))
    for delta in sparse_deltas(model).values():
        delta.delta.add_(1.0 + seed)
    write_deltas(sparse_deltas(model).values())
    spt.save_delta(model, folder / f"t{seed}")
    return folder / f"t{seed}"


Exchange = Callable[[nn.Module], None]


def merged_for_a_while(model: nn.Module) -> None:
    merged = merge_aside(model)
    model(X)
    unmerge(model, merged)


def set_aside_for_a_while(model: nn.Module) -> None:
    aside = take_aside(model)
    assert torch.equal(model(X), anew(model))
    put_task_back(model, aside)


@pytest.mark.parametrize("ends", [spt.unload, spt.merge, merged_for_a_while, set_aside_for_a_while])
@torch.no_grad()
def test_a_model_says_what_its_parameters_do(ends: Exchange, tmp_path: Path) -> None:
    model = plain()
    for seed in (0, 0, 2):  # the second into the same parameters, the third into others
        model(X)
        spt.load_delta(model, task(seed, tmp_path))
        assert torch.equal(model(X), anew(model))
    ends(model)
    assert torch.equal(model(X), anew(model))
    assert not any(module.training for module in model.modules())


@torch.no_grad()
def test_so_does_that_of_a_bank(tmp_path: Path) -> None:
    model = plain()
    base, bank = model(X), spt.TaskBank(model)
    for seed in range(2):
        bank.load(f"t{seed}", task(seed, tmp_path))
    for name in ("t0", "t1", None):
        said = bank.use(name)(X)
        assert torch.equal(said, anew(model))
        assert torch.equal(said, base) == (name is None)
    truth = torch.stack([anew(bank.use(f"t{n}"))[n] for n in range(2)])
    torch.testing.assert_close(bank.run(X, ["t0", "t1"], together=True), truth)
    assert torch.equal(bank.use(None)(X), base)


def test_the_modes_of_all_parts_stay() -> None:
    model = plain()
    model.keeps.inside = nn.Dropout()  # type: ignore[union-attr]
    model(X)
    forget_kept(model.modules())
    assert not model.keeps.looked_up  # type: ignore[union-attr]
    assert not model.keeps.training
    assert model.keeps.inside.training  # type: ignore[union-attr]


def test_a_bank_takes_what_a_forward_has_left_a_graph_in() -> None:
    model = plain()
    model(X)
    assert model.keeps.looked_up["bias"].grad_fn is not None  # type: ignore[union-attr]
    spt.TaskBank(model)
