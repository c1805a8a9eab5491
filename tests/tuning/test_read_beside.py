"""Parameters that a model reads besides calling their module: every use of them trains."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spt_kernels as spt
from spt_kernels.layers import sparse_deltas
from spt_kernels.model import describe
from spt_kernels.plan import Plan

WIDTH = 8


class Reader(nn.Module):
    """A norm, a convolution and a Linear, used as `use` has it."""

    def __init__(self, use: Callable[[Reader, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.norm = nn.LayerNorm(WIDTH)
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 5)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        x = self.use(self, F.gelu(self.stem(x)))
        return self.head(F.gelu(x).flatten(2).mean(2))


def on_channels(x: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    return norm(x.movedim(1, -1)).movedim(-1, 1)


def read(norm: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    return lambda x: F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias)


def dilated(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return F.conv2d(x, conv.weight, conv.bias, padding=2, dilation=2, groups=conv.groups)


USES: dict[str, Callable[[Reader, Tensor], Tensor]] = {
    "a norm": lambda m, x: on_channels(F.gelu(on_channels(x, read(m.norm))), m.norm),
    "a norm that is never called": lambda m, x: on_channels(x, read(m.norm)),
    "a norm's bias": lambda m, x: on_channels(x, lambda y: m.norm(y) + 2 * m.norm.bias),
    "a convolution": lambda m, x: m.conv(x) + dilated(x, m.conv),
    "a convolution by channels": lambda m, x: m.depthwise(x) + dilated(x, m.depthwise),
    "a convolution's own function": lambda m, x: m.conv(
        F.gelu(m.conv._conv_forward(x, m.conv.weight, m.conv.bias))
    ),
    "a bias": lambda m, x: on_channels(x, lambda y: m.linear(y) + 2 * m.linear.bias),
}


@pytest.mark.parametrize("name", USES)
def test_gradients_are_those_of_every_use(name: str) -> None:
    model = Reader(USES[name])
    images, labels = torch.randn(6, 3, 5, 5), torch.randint(5, (6,))
    scores = spt.measure_sensitivity(
        model, [(images, labels)], head="head", exclude=["stem.*"], progress=False
    )
    everything = {key: torch.arange(score.numel()) for key, score in scores.items() if score.any()}
    plan = Plan(everything, {}, dict(scores.info), head=("head.weight", "head.bias"))
    assert everything
    assert any(info.reads for info in plan.info.values())
    plain = copy.deepcopy(model)
    spt.apply(model, plan)
    for net in (model, plain):
        F.cross_entropy(net(images), labels).backward()
    truth = {key: p.grad for key, p in plain.named_parameters()}
    for key, delta in sparse_deltas(model).items():
        torch.testing.assert_close(delta.delta.grad, truth[key].flatten())


def test_a_bias_whose_weight_is_left_out() -> None:
    model = Reader(USES["a bias"])
    images, labels = torch.randn(6, 3, 5, 5), torch.randint(5, (6,))
    scores = spt.measure_sensitivity(
        model, [(images, labels)], head="head", exclude=["*.weight"], progress=False
    )
    plan = Plan({"linear.bias": torch.arange(WIDTH)}, {}, dict(scores.info), head=())
    plain = copy.deepcopy(model)
    spt.apply(model, plan)
    for net in (model, plain):
        F.cross_entropy(net(images), labels).backward()
    found = sparse_deltas(model)["linear.bias"].delta.grad
    torch.testing.assert_close(found, plain.linear.bias.grad)


def test_what_is_called_alone_is_tuned_as_ever() -> None:
    model = Reader(lambda m, x: m.conv(on_channels(x, m.norm)))
    batch = torch.randn(4, 3, 5, 5), torch.randint(5, (4,))
    info = spt.measure_sensitivity(model, [batch], progress=False).info
    assert not info["conv.weight"].is_read
    assert not info["norm.weight"].is_read
    assert info["depthwise.weight"].is_read  # never called: no other batch need be like this one


def test_a_plan_remembers_it(tmp_path) -> None:
    model = Reader(USES["a norm"])
    batch = torch.randn(4, 3, 5, 5), torch.randint(5, (4,))
    plan = spt.allocate(spt.measure_sensitivity(model, [batch], progress=False), 16)
    plan.save(tmp_path / "a.plan")
    again = Plan.load(tmp_path / "a.plan")
    assert again.info == plan.info
    assert again.info["norm.weight"].reads


def test_a_linear_with_a_forward_of_its_own_trains_entries() -> None:
    class Cosine(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 4 * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1), self.bias)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), Cosine(16, 16), nn.GELU(), nn.Linear(16, 5))
    batch = torch.randn(8, 6), torch.randint(5, (8,))
    scores = spt.measure_sensitivity(model, [batch], progress=False)
    assert scores.info["2.weight"].kind == "functional"
    plan = spt.allocate(scores, 80, structured="lora", rank=1)
    assert "2.weight" in plan.unstructured
    plain = copy.deepcopy(model)
    spt.apply(model, plan)
    for net in (model, plain):
        F.cross_entropy(net(batch[0]), batch[1]).backward()
    truth = plain.get_parameter("2.weight").grad.flatten()[plan.unstructured["2.weight"]]
    torch.testing.assert_close(sparse_deltas(model)["2.weight"].delta.grad, truth)


def test_a_tuned_model_is_described_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 5))
    scores = {"0.weight": torch.rand(8, 6), "2.weight": torch.rand(8, 8)}
    before = {name: info.kind for name, info in describe(model).items()}
    made = spt.Sensitivity.from_tensors(scores, num_samples=1)
    spt.apply(model, spt.allocate(made, 30, structured="lora", rank=1))
    after = {name: info.kind for name, info in describe(model).items() if name in before}
    assert after == before
