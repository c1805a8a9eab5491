"""Parameters that a model uses through what it makes of them alone, against plain autograd."""

from __future__ import annotations

import pytest
import timm.layers
import torch
from timm.layers import ScaledStdConv2d
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn
from torch.nn import functional as F

import spt_kernels as spt
from spt_kernels.sensitivity.per_sample import probe, uses
from tests.models import _spread, tiny_batch

from .per_sample_truth import assert_exact, squared_gradients

SWIN = {"window_size": 4, "embed_dim": 8, "depths": (2,), "num_heads": (2,), "num_classes": 5}


def swin_v2() -> nn.Module:
    return SwinTransformerV2(img_size=32, patch_size=4, **SWIN)


def swin_v2_cr() -> nn.Module:
    return SwinTransformerV2Cr(img_size=32, patch_size=4, **SWIN)


def shared_position_bias() -> nn.Module:
    return VisionTransformerRelPos(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5,
        shared_rel_pos=True,
    )  # fmt: skip


class Standardized(nn.Module):
    """Weight-standardized convolutions, one in groups, as in nets without norms."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            ScaledStdConv2d(3, 6, 3, stride=2, padding=1),
            nn.GELU(),
            ScaledStdConv2d(6, 12, 3, groups=2),
            nn.GELU(),
        )
        self.top = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.layers(x).mean((2, 3)))


class Made(nn.Module):
    """Things made of parameters that meet the samples by every kind of call, some of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))
        self.table = nn.Parameter(torch.randn(7, 4))
        self.mix = nn.Parameter(torch.randn(6, 6))
        self.net = nn.Linear(2, 4)
        self.norm = nn.LayerNorm(6)
        self.top = nn.Linear(6, 5)
        self.register_buffer("index", torch.arange(16) % 7)
        self.register_buffer("coordinates", torch.randn(16, 2))
        self.register_buffer("mask", torch.randn(1, 4, 16, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., :8, :12].reshape(-1, 3, 16, 6)  # [batch, 3, 16, 6]
        x = x * self.scale.exp().view(3, 1, 1) / (1 + self.scale.float().square().sum())
        bias = self.table[self.index].t()[:, :, None] + self.net(self.coordinates).t()[..., None]
        x = x[:, :, None] + bias + bias.mean(1, keepdim=True)  # [batch, 3, 4, 16, 6]
        x = torch.where(x > 0, x, bias.expand(-1, -1, 6) * x)
        x = F.linear(self.norm(x.mean(2)), self.mix.softmax(0))
        masks = self.mask.expand(len(x), -1, -1, -1).reshape(-1, 4, 16, 6)
        x = x[:, 0] + (bias - masks).tanh().mean(1)
        return self.top(x.mean(1))


class Copied(nn.Module):
    """Position encodings that a network makes of coordinates and copies for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(2, 6, 1)
        self.strength = nn.Parameter(torch.randn(()))
        self.patches = nn.Conv2d(3, 6, 8, stride=8)
        self.top = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        places = torch.arange(16, dtype=x.dtype).view(4, 4)
        encoded = self.projection(torch.stack([places, places.t().sin()])[None])
        encoded = encoded * self.strength.exp()
        encoded = encoded.repeat(len(x), 1, 1, 1).reshape(len(x), 6, -1).permute(0, 2, 1)
        x = x.flatten(2).transpose(1, 2) + encoded
        return self.top(x.tanh().mean(1))


MODELS = {
    "swin-v2": swin_v2,
    "swin-v2-cr": swin_v2_cr,
    "shared-position-bias": shared_position_bias,
    "standardized": Standardized,
    "made": Made,
    "copied": Copied,
}


def model_and_batches(name: str, sizes: list[int]) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = _spread(MODELS[name]())
    images, labels = tiny_batch(sum(sizes), size=32)
    return model, list(zip(images.split(sizes), labels.split(sizes), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_exact_without_fallback(name: str) -> None:
    model, batches = model_and_batches(name, [3, 1])
    sensitivity = spt.measure_sensitivity(model, batches, include=["*"], progress=False)
    assert not sensitivity.fallback
    assert_exact(sensitivity, model, batches)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_inside_of_a_checkpoint(reentrant: bool) -> None:
    model, batches = model_and_batches("swin-v2", [3])
    model.set_grad_checkpointing(True)
    timm.layers.set_reentrant_ckpt(reentrant)
    try:
        sensitivity = spt.measure_sensitivity(model, batches, include=["*"], progress=False)
    finally:
        timm.layers.set_reentrant_ckpt(False)
    assert not sensitivity.fallback
    assert_exact(sensitivity, model, batches)


def test_under_autocast_they_are_near() -> None:
    model, batches = model_and_batches("swin-v2", [3])
    with torch.autocast("cpu", torch.bfloat16):
        sensitivity = spt.measure_sensitivity(model, batches, progress=False)
        plain = squared_gradients(model, batches, list(sensitivity), dtype=torch.float32)
    truth = squared_gradients(model, batches, list(sensitivity))
    made = [name for name in truth if "cpb_mlp" in name]
    assert made
    assert not sensitivity.fallback
    error = sum(float((sensitivity[n] - truth[n]).norm()) for n in made)
    assert error <= 2 * sum(float((plain[n] - truth[n]).norm()) for n in made)


def test_what_is_made_of_parameters_that_are_not_measured_does_not_matter() -> None:
    model, batches = model_and_batches("standardized", [2])
    sensitivity = spt.measure_sensitivity(model, batches, progress=False)
    assert "layers.2.gain" not in sensitivity
    assert not sensitivity.fallback
    assert_exact(sensitivity, model, batches)


class Gated(nn.Module):
    """A number for each sample, times one that is made of a parameter, and a row beside others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gate, self.head = nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(8, 5)
        self.logit_scale = nn.Parameter(torch.tensor(0.3))
        self.token, self.places = (
            nn.Parameter(torch.randn(1, 1, 8)),
            nn.Parameter(torch.randn(3, 8)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x.flatten(2)[..., :8]).tanh()
        gate = self.gate(x.mean(1)).sigmoid() * self.logit_scale.exp()
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = x + torch.cat([self.places[:1] * 2, self.places])[None]
        return self.head(x.mean(1) * gate)


@pytest.mark.parametrize("sizes", [(4, 1), (1, 1)], ids=str)
def test_a_batch_of_one_is_exact(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Gated()
    images, labels = tiny_batch(sum(sizes), size=4)
    batches = list(zip(images.split(sizes), labels.split(sizes), strict=True))
    found = spt.measure_sensitivity(model, batches, include=["*"], head=(), progress=False)
    assert not found.fallback
    assert_exact(found, model, batches)


class Numbered(nn.Module):
    """Numbers and ids that samples bring along, each of which meets what is made of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(48, 6), nn.Linear(6, 5)
        self.log_scale, self.log_share, self.log_size = (
            nn.Parameter(torch.randn(())) for _ in range(3)
        )
        self.table, self.more = (nn.Parameter(torch.randn(2, 6)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        level = x.mean((1, 2, 3)) * self.log_scale.exp()
        ids = (x[:, 0, 0, 0] > 0).long()
        share = x[:, :1, 0, 0] * self.log_share.exp()
        x = self.layer(x.flatten(1)) * level[:, None]
        x = x + self.table[ids] + self.more.index_select(0, ids)
        size = x.norm(dim=1).detach() * self.log_size.exp()
        return self.head(x.tanh()) + share / size[:, None]


@pytest.mark.parametrize("sizes", [(3, 3), (3, 1)], ids=str)
def test_what_samples_bring_along_is_no_constant(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Numbered()
    images, labels = tiny_batch(sum(sizes), size=4)
    images[:, 0, 0, 0] = torch.tensor([0.1, 0.2, -0.3, 0.4, -0.5, 0.6])[: sum(sizes)]
    batches = list(zip(images.split(sizes), labels.split(sizes), strict=True))
    found = spt.measure_sensitivity(model, batches, include=["*"], head=(), progress=False)
    assert found.fallback == ("log_size", "table", "more")
    assert_exact(found, model, batches)


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """`F.mse_loss`, which torch 2.11 has no gradient of where the two are of different dtypes."""
    return (output - target).square().mean()


def test_a_sample_of_one_number_counts_alone_as_well() -> None:
    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Linear(1, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.slope.weight.exp())

    model = Line()
    batches = [(torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)), (torch.ones(1, 1),) * 2]
    found = spt.measure_sensitivity(model, batches, squared_error, head=(), progress=False)
    assert found.num_samples == 3
    assert_exact(found, model, batches, squared_error)


def test_a_bias_that_is_made_of_another_is_exact_beside_a_plain_weight() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm, self.head = nn.Linear(48, 6), nn.LayerNorm(6), nn.Linear(6, 5)
            self.gate = nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            x = F.linear(x.flatten(1), self.layer.weight, self.layer.bias * 0.5)
            x = F.layer_norm(x, (6,), self.norm.weight, self.norm.bias * self.gate)
            return self.head(x.tanh())

    torch.manual_seed(0)
    model, batches = _spread(Halved()), [tiny_batch(3, size=4)]
    found = spt.measure_sensitivity(model, batches, include=["*"], head=(), progress=False)
    assert not found.fallback
    assert_exact(found, model, batches)


def test_some_samples_at_a_time_give_the_same(monkeypatch) -> None:
    model, batches = model_and_batches("standardized", [5])
    at_once = spt.measure_sensitivity(model, batches, progress=False)
    monkeypatch.setattr(uses, "_UNFOLDED_NUMEL", 2000)
    in_parts = spt.measure_sensitivity(model, batches, progress=False)
    for name, score in at_once.items():
        torch.testing.assert_close(in_parts[name], score)
    assert_exact(in_parts, model, batches)


def test_a_table_of_all_samples_and_one_that_each_looks_words_up_in() -> None:
    class Embeds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(9, 6)
            self.places = nn.Embedding(4, 6)
            self.norm = nn.LayerNorm(6)
            self.top = nn.Linear(6, 5)
            self.register_buffer("order", torch.arange(4)[None])

        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids) + self.places(self.order)
            return self.top(self.norm(x).tanh().mean(1))

    torch.manual_seed(0)
    model = _spread(Embeds())
    batches = [(torch.randint(9, (3, 4)), torch.arange(3))]
    sensitivity = spt.measure_sensitivity(model, batches, include=["*"], progress=False)
    assert not sensitivity.fallback
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for ids, label in zip(*batches[0], strict=True):
        loss = F.cross_entropy(model(ids[None]), label[None])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for score, gradient in zip(expected.values(), gradients, strict=True):
            score += gradient**2
    for name, score in sensitivity.items():
        torch.testing.assert_close(score, expected[name])


def test_what_a_forward_caches_is_forgotten_before_the_next() -> None:
    class Caches(nn.Module):
        """As LeViT's attention: biases are looked up once, until the model is trained."""

        def __init__(self) -> None:
            super().__init__()
            self.linear, self.top = nn.Linear(48, 6), nn.Linear(6, 5)
            self.bias = nn.Parameter(torch.randn(4, 6))
            self.register_buffer("index", torch.tensor([0, 2, 2, 3]))
            self.cache: dict[str, Tensor] = {}
            self.keeps = True

        def train(self, mode: bool = True) -> Caches:
            if mode:
                self.cache.clear()
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            if self.training or not self.keeps or "bias" not in self.cache:
                self.cache["bias"] = self.bias[self.index]
            x = self.linear(x[..., :8, :8].reshape(-1, 4, 48)) + self.cache["bias"]
            return self.top(x.tanh().mean(1))

    torch.manual_seed(0)
    model = _spread(Caches())
    images, labels = tiny_batch(4)
    batches = [(images[:3], labels[:3]), (images[3:], labels[3:])]
    with torch.no_grad():
        model.eval()(images)
    sensitivity = spt.measure_sensitivity(model, batches, include=["*"], progress=False)
    assert not model.cache
    assert not sensitivity.fallback
    model.keeps = False
    assert_exact(sensitivity, model, batches)


@pytest.mark.parametrize("wrong", [0, 1])
def test_the_gradient_of_either_sample_is_checked(
    wrong: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, changed = probe._watch, []

    def watch_wrongly(*args: object, **named: bool) -> dict[str, Tensor]:
        gradients = watch(*args, **named)
        if args[-1] == wrong:
            changed.extend(gradients)
            gradients = {name: 1.01 * gradient for name, gradient in gradients.items()}
        return gradients

    monkeypatch.setattr(probe, "_watch", watch_wrongly)
    model, batch = Standardized(), tiny_batch(3, size=16)
    sensitivity = spt.measure_sensitivity(model, [batch], num_samples=3)
    assert changed
    assert set(changed) & set(sensitivity) == set(sensitivity.fallback)
    assert_exact(sensitivity, model, [batch])
