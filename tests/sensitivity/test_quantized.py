"""The sensitivity of quantized matrices: that of the float matrices whose values they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import spt_kernels as spt
from spt_kernels.sensitivity import find_head
from tests.models import tiny_batch, tiny_vit
from tests.quantized import RowScaled, as_floats, quantize

BATCHES = [tiny_batch(5)]


def measure(model: nn.Module, **how: Any) -> spt.Sensitivity:
    return spt.measure_sensitivity(model, BATCHES, progress=False, **how)


def assert_same(found: spt.Sensitivity, expected: spt.Sensitivity) -> None:
    assert found.info == expected.info
    assert found.head == expected.head
    assert found.backbone_numel == expected.backbone_numel
    assert found.fallback == expected.fallback
    assert found.idle == expected.idle
    for name, scores in expected.scores.items():
        error = (found[name] - scores).norm()
        assert error <= 1e-4 * scores.norm() + 1e-12, name


def test_scores_are_those_of_the_float_model() -> None:
    assert_same(measure(quantize(tiny_vit())), measure(as_floats(quantize(tiny_vit()))))


def test_scores_are_sums_of_squared_gradients_of_each_sample() -> None:
    model, truth = quantize(tiny_vit(depth=1)), as_floats(quantize(tiny_vit(depth=1))).eval()
    weight = truth.blocks[0].mlp.fc2.weight
    expected = torch.zeros_like(weight)
    images, labels = BATCHES[0]
    for n in range(len(images)):
        loss = F.cross_entropy(truth(images[n : n + 1]), labels[n : n + 1])
        expected += torch.autograd.grad(loss, weight)[0].square()
    found = measure(model)["blocks.0.mlp.fc2.weight"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


class Tangled(nn.Module):
    """Layers that are used twice, that a checkpoint runs again, and that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Linear(48, 8), nn.Linear(8, 8, bias=False)
        self.again, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.unfold(2, 4, 4).unfold(3, 4, 4).transpose(1, 3).flatten(3).flatten(1, 2))
        x = self.twice(self.twice(x).tanh()).tanh()
        again = checkpoint(lambda x: self.again(x).tanh(), x, use_reentrant=False)
        assert isinstance(again, Tensor)
        return self.head(again.mean(1))


def test_layers_used_twice_run_again_or_not_at_all() -> None:
    torch.manual_seed(0)
    model = Tangled()
    state = model.state_dict()
    quantize(model)
    floats = Tangled()
    floats.load_state_dict(state)
    found, expected = measure(model), measure(as_floats(quantize(floats)))
    assert "unused.weight" in expected.idle
    assert_same(found, expected)


class OneByOne(Tangled):
    """Its samples depend on nothing but themselves in a way that cannot be seen in batches."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(OneByOne, self).forward(one) for one in x.split(1)])


def test_where_samples_are_measured_one_by_one() -> None:
    torch.manual_seed(0)
    model, floats = OneByOne(), OneByOne()
    floats.load_state_dict(model.state_dict())
    found, expected = measure(quantize(model)), measure(as_floats(quantize(floats)))
    assert "again.weight" in expected.fallback
    assert_same(found, expected)


def test_the_model_is_as_it_was_also_after_an_error() -> None:
    model = quantize(tiny_vit())
    weights = {n: p for n, p in model.named_parameters() if isinstance(p.data, RowScaled)}
    assert len(weights) == 8

    def fails(output: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("as a loss may")

    measure(model)
    with pytest.raises(ValueError, match="as a loss may"):
        measure(model, loss_fn=fails)
    now = dict(model.named_parameters())
    assert all(now[name] is weight for name, weight in weights.items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_head_is_found() -> None:
    model = quantize(tiny_vit())
    assert find_head(model, BATCHES) == ("head.weight", "head.bias")


def test_scores_of_either_base_make_a_plan_for_the_other() -> None:
    floats, model = tiny_vit(), quantize(tiny_vit())
    for scores in (measure(floats), measure(model)):
        plan = spt.allocate(scores, 800, "lora", rank=2)
        for each in (floats, model):
            spt.unload(spt.apply(each, plan))


def test_a_quantized_table_cannot_be_included() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mix, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, words: Tensor) -> Tensor:
            return self.head(self.mix(F.embedding(words, self.values())).tanh().mean(1))

        def values(self) -> Tensor:
            weight: Any = self.table.weight
            return weight.dequantize() if isinstance(weight.data, RowScaled) else weight

    model = quantize(Words())
    model.table.weight = nn.Parameter(RowScaled.of(model.table.weight), requires_grad=False)
    batches = [(torch.randint(0, 9, (4, 3)), torch.arange(4))]
    found = spt.measure_sensitivity(model, batches, progress=False)
    assert set(found) == {"mix.weight", "mix.bias"}
    with pytest.raises(
        ValueError, match=r"table\.weight is quantized to RowScaled and is no weight"
    ):
        spt.measure_sensitivity(model, batches, include=["table.*"], progress=False)
