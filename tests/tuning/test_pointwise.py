"""Models of 1×1 convolutions, from their sensitivities to a merged task."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from timm.models.convnext import ConvNeXt
from torch import nn
from torch.nn import functional as F

import spt_kernels as spt
from spt_kernels.layers import AdapterConv2d, LoraConv2d, tuned_modules
from spt_kernels.model import ParameterInfo, describe
from tests.models import _spread, tiny_batch


class Bottleneck(nn.Module):
    """As in a ResNet, with a strided shortcut."""

    def __init__(self, wide: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(wide, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, stride, 1, bias=False), nn.BatchNorm2d(6)
        self.conv3, self.bn3 = nn.Conv2d(6, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.downsample = nn.Conv2d(wide, 16, 1, stride, bias=False)

    def forward(self, x):  # type: ignore[no-untyped-def]
        y = self.bn1(self.conv1(x)).relu_()
        y = self.bn2(self.conv2(y)).relu_()
        return (self.bn3(self.conv3(y)) + self.downsample(x)).relu_()


class InvertedResidual(nn.Module):
    """As in a MobileNet, with its squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_pw, self.bn1 = nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.conv_dw = nn.Conv2d(24, 24, 3, 1, 1, groups=24)
        self.reduce, self.expand = nn.Conv2d(24, 4, 1), nn.Conv2d(4, 24, 1)
        self.conv_pwl = nn.Conv2d(24, 16, 1)

    def forward(self, x):  # type: ignore[no-untyped-def]
        y = F.hardswish(self.conv_dw(F.hardswish(self.bn1(self.conv_pw(x)))))
        y = y * self.expand(self.reduce(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x + self.conv_pwl(y)


def cnn() -> nn.Module:
    stem = nn.Conv2d(3, 8, 3, 2, 1)
    blocks = [Bottleneck(8, 1), Bottleneck(16, 2), InvertedResidual()]
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(stem, nn.ReLU(), *blocks, pool, nn.Linear(16, 5))


def convnext() -> nn.Module:
    return ConvNeXt(
        depths=(1,) * 4, dims=(8, 8, 12, 12), num_classes=5, conv_mlp=True, ls_init_value=0.5
    )


MODELS = {"cnn": cnn, "convnext": convnext}
BUDGETS = {"cnn": 400, "convnext": 2000}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return _spread(MODELS[name]())


def planned(model: nn.Module, structured: str, budget: int = 400) -> spt.Plan:
    images, labels = tiny_batch(4, size=32)
    sensitivity = spt.measure_sensitivity(model, [(images, labels)], progress=False)
    return spt.allocate(sensitivity, budget, structured=structured, rank=1, dropout=0.0)


def train(model: nn.Module) -> nn.Module:
    images, labels = tiny_batch(4, size=32)
    optimizer = spt.SparseAdamW(spt.param_groups(model, weight_decay=1e-4), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model.eval()(images), labels).backward()
        optimizer.step()
    return model


def answers(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tiny_batch(4, size=32)[0])


@pytest.mark.parametrize("structured", ["lora", "adapter"])
@pytest.mark.parametrize("name", MODELS)
def test_a_task_is_trained_saved_loaded_and_dropped(
    name: str, structured: str, tmp_path: Path
) -> None:
    model = made(name)
    base, plan = copy.deepcopy(model), planned(model, structured, BUDGETS[name])
    spt.apply(model, plan)
    kind = LoraConv2d if structured == "lora" else AdapterConv2d
    on = {n for n, module in tuned_modules(model).items() if isinstance(module, kind)}
    assert on == {n.removesuffix(".weight") for n in plan.structured}
    assert len(on) >= 2
    assert all(isinstance(model.get_submodule(n), nn.Conv2d) for n in on)
    before = answers(model)
    train(model)
    tuned = answers(model)
    assert not torch.allclose(tuned, before)
    spt.save_delta(model, tmp_path / "task.safetensors")

    other = copy.deepcopy(base)
    spt.load_delta(other, tmp_path / "task.safetensors")
    assert torch.equal(answers(other), tuned)
    spt.load_delta(other, tmp_path / "task.safetensors")  # a swap
    assert torch.equal(answers(other), tuned)
    spt.unload(other)
    for key, value in base.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key
    if structured == "lora":
        spt.merge(model)
        torch.testing.assert_close(answers(model), tuned, rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="an Adapter is not linear"):
            spt.merge(model)
        spt.unload(model)
    assert {type(module) for module in model.modules()} == {type(m) for m in base.modules()}


def test_in_channels_last_it_is_the_same_task() -> None:
    rows, last = made("cnn"), made("cnn").to(memory_format=torch.channels_last)
    plan = planned(rows, "lora")
    train(spt.apply(rows, plan))
    torch.manual_seed(0)
    spt.apply(last, plan)
    theirs = dict(rows.named_parameters())
    with torch.no_grad():
        for name, parameter in last.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(theirs[name])
    torch.testing.assert_close(answers(last), answers(rows), rtol=1e-4, atol=1e-5)
    spt.merge(last)
    torch.testing.assert_close(answers(last), answers(rows), rtol=1e-4, atol=1e-5)
    assert last[2].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_memory_is_told_without_touching_the_model() -> None:
    model = made("cnn")
    plan = planned(model, "lora")
    tuned = spt.estimate_memory(model, (32, 3, 64, 64), plan=plan)
    full = spt.estimate_memory(model, (32, 3, 64, 64))
    assert 0 < tuned.peak_bytes < full.peak_bytes
    assert not tuned_modules(model)


def test_what_is_pointwise() -> None:
    kinds = {name: what.kind for name, what in describe(made("cnn")).items()}
    assert kinds["2.conv1.weight"] == kinds["4.reduce.weight"] == "pointwise"
    assert kinds["2.downsample.weight"] == kinds["3.downsample.weight"] == "pointwise"
    assert kinds["2.conv2.weight"] == kinds["4.conv_dw.weight"] == "conv2d"

    class Standardized(nn.Conv2d):
        def forward(self, input):  # type: ignore[no-untyped-def]
            return self._conv_forward(input, self.weight / self.weight.std(), self.bias)

    layers = nn.Sequential(
        Standardized(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1, padding=1)
    )
    assert {what.kind for what in describe(layers).values()} == {"conv2d", "bias"}


def test_sensitivities_of_before_mean_what_they_did() -> None:
    model = made("cnn")
    images, labels = tiny_batch(4, size=32)
    now = spt.measure_sensitivity(model, [(images, labels)], progress=False)
    then = {
        name: ParameterInfo.from_json(
            what.to_json() | ({"kind": "conv2d"} if what.kind == "pointwise" else {})
        )
        for name, what in now.info.items()
    }
    old = spt.Sensitivity.from_tensors(dict(now), num_samples=4, info=then)
    plan = spt.allocate(old, 400, structured="lora", rank=1)
    assert not plan.structured
    assert spt.allocate(now, 400, structured="lora", rank=1).structured
    spt.apply(model, plan)


def test_a_weight_that_the_model_reads_itself_takes_no_lora() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.top = nn.Conv2d(3, 8, 1), nn.Linear(8, 5)

        def forward(self, x):  # type: ignore[no-untyped-def]
            return self.top(F.conv2d(x, self.conv.weight, self.conv.bias).tanh().mean((2, 3)))

    torch.manual_seed(0)
    model, (images, labels) = _spread(Reads()), tiny_batch(4)
    sensitivity = spt.measure_sensitivity(model, [(images, labels)], progress=False)
    assert sensitivity.info["conv.weight"].kind == "functional"
    plan = spt.allocate(sensitivity, 20, structured="lora", rank=1)
    assert not plan.structured
    before = answers_of(model, images)
    train_on(spt.apply(model, plan), images, labels)
    assert not torch.allclose(answers_of(model, images), before)


def answers_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images)


def train_on(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer = spt.SparseAdamW(spt.param_groups(model, weight_decay=1e-4), lr=1e-2)
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
