"""Tasks of a weight that two layers have: they are loaded, and never mixed within a batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.plan import Plan


class Tied(nn.Module):
    """Two layers of one weight: one parameter, two in one memory, or a part of it."""

    def __init__(self, way: str = "parameter") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.second = nn.Linear(6, 6, bias=False)
        if way == "parameter":
            self.second.weight = self.first.weight
        elif way == "memory":
            self.second.weight.data = self.first.weight.data
        elif way == "part":
            self.second = nn.Linear(6, 4, bias=False)
            self.second.weight.data = self.first.weight.data[1:5]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)))


@torch.no_grad()
def trained(seed: int) -> nn.Module:
    model = spt.apply(Tied(), Plan({}, {}, {}, head=("first.weight",), model_name="tied"))
    model.first.weight.add_(torch.randn(6, 6, generator=torch.Generator().manual_seed(seed)))
    return model.eval()


@torch.no_grad()
def test_tasks_of_a_weight_that_is_trained_whole() -> None:
    model, x = Tied().eval(), torch.randn(3, 6)
    base, bank, tuned = model(x), spt.TaskBank(model), [trained(seed) for seed in range(2)]
    for n, task in enumerate(tuned):
        bank.add(f"t{n}", task)
        torch.testing.assert_close(bank.use(f"t{n}")(x), task(x))
    assert torch.equal(bank.use(None)(x), base)
    truth = torch.stack([tuned[0](x)[0], base[1], tuned[1](x)[2]])
    torch.testing.assert_close(bank.run(x, ["t0", None, "t1"]), truth)
    with pytest.raises(ValueError, match=r"first\.weight is tied to second\.weight"):
        bank.run(x, ["t0", None, "t1"], together=True)


def test_entries_of_what_lies_in_one_memory_are_refused() -> None:
    tuned = Tied("memory")
    tuned.second.weight.data = tuned.first.weight.data.clone()
    scores = {"second.weight": torch.rand(6, 6)}
    sensitivity = spt.Sensitivity.from_tensors(scores, num_samples=1)
    spt.apply(tuned, spt.allocate(sensitivity, 3, None))
    with pytest.raises(ValueError, match=r"second\.weight is shared with first\.weight"):
        spt.TaskBank(Tied("memory")).add("t", tuned)


@torch.no_grad()
def test_a_head_in_the_memory_of_another_weight_is_refused() -> None:
    tuned = Tied("part")
    tuned.second.weight.data = tuned.second.weight.data.clone()
    spt.apply(tuned, Plan({}, {}, {}, head=("second.weight",), model_name="tied"))
    tuned.second.weight.add_(1.0)
    with pytest.raises(ValueError, match=r"second\.weight is shared with first\.weight: two param"):
        spt.TaskBank(Tied("part")).add("t", tuned)
