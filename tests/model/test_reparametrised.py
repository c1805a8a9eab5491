"""Layers that compute their weight from other parameters are refused by name, and only they."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import spt_kernels as spt
from spt_kernels.methods import Method, make_plan
from spt_kernels.model import candidate_names

WAYS: dict[str, tuple[Callable[[nn.Module], Any], str, str]] = {
    "weight_norm": (nn.utils.weight_norm, "weight_norm", "remove_weight_norm"),
    "spectral_norm": (nn.utils.spectral_norm, "spectral_norm", "remove_spectral_norm"),
    "new-weight_norm": (parametrizations.weight_norm, "WeightNorm", "remove_parametrizations"),
    "orthogonal": (parametrizations.orthogonal, "Orthogonal", "remove_parametrizations"),
    "pruning": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        "pruning",
        r"prune\.remove",
    ),
}


class Net(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 8), nn.Linear(8, 8, bias=bias)
        self.score = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.b(self.a(x).relu()).relu())


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 12), torch.tensor([0, 1, 2, 0])


def measured(model: nn.Module, **how: Any) -> spt.Sensitivity:
    return spt.measure_sensitivity(model, [batch()], progress=False, **how)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("way", WAYS)
def test_it_is_refused_before_the_measurement(way: str, bias: bool) -> None:
    change, name, remedy = WAYS[way]
    model = Net(bias)
    change(model.b)
    message = rf"b\.weight is computed by {name} .*{remedy}.* exclude=\['b\.\*'\]"
    with pytest.raises(ValueError, match=message):
        measured(model)
    with pytest.raises(ValueError, match=message):
        measured(model, include=["b.*"])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("where", ["left out", "the head"])
@pytest.mark.parametrize("way", WAYS)
def test_where_it_is_not_tuned_it_is_none_of_our_business(way: str, where: str) -> None:
    torch.manual_seed(0)
    model = Net()
    WAYS[way][0](model.b if where == "left out" else model.score)
    model.eval()
    x, y = batch()
    before = model(x).detach().clone()
    sensitivity = measured(model, exclude=["b.*"] if where == "left out" else [])
    assert {name.split(".")[0] for name in sensitivity.head} == {"score"}
    spt.apply(model, spt.allocate(sensitivity, 20, structured=None))
    optimizer = spt.SparseAdamW(spt.param_groups(model), lr=0.01)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert not torch.equal(model(x), before)
    spt.unload(model)
    assert torch.equal(model(x), before)


def test_a_layer_of_another_kind_is_looked_at_only_where_it_is_wanted() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 1), nn.Flatten(), nn.Linear(12, 6), nn.Linear(6, 3))
    parametrizations.weight_norm(model[0])
    assert candidate_names(model, head="3") == ["2.weight", "2.bias"]
    with pytest.raises(ValueError, match=r"0\.weight is computed by WeightNorm"):
        candidate_names(model, include=["0.bias"], head="3")


def test_a_plan_without_scores_passes_it_by() -> None:
    model = Net()
    prune.l1_unstructured(model.b, "weight", 0.5)
    plan = make_plan(model, Method("linear", head="score"))
    assert plan is not None
    assert plan.head == ("score.weight", "score.bias")
