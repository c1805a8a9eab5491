"""measure_sensitivity against one-sample-at-a-time autograd in float64."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable

import pytest
import timm.layers
import torch
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn
from torch.nn import functional as F

import spt_kernels as spt
from tests.models import _spread, tiny_batch, tiny_convnext, tiny_swin, tiny_vit

from .per_sample_truth import assert_exact, squared_gradients
from .random_convolutions import draw
from .test_input import TimesFunction

MODELS = {"vit": (tiny_vit, 16), "swin": (tiny_swin, 32), "convnext": (tiny_convnext, 32)}


def measure(model: nn.Module, batches, *args, **options) -> spt.Sensitivity:
    return spt.measure_sensitivity(model, batches, *args, progress=False, **options)


def batches_of(sizes: list[int], *, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    images, labels = tiny_batch(sum(sizes), size=size)
    return list(zip(images.split(sizes), labels.split(sizes), strict=True))


@pytest.mark.parametrize("n_without_label", [0, 1])
def test_what_batches_draw_at_random_is_drawn_once(n_without_label: int) -> None:
    """As augmentations are; also where the loss of the first batch depends on nothing."""
    drawn: list[list[Tensor]] = []

    def augmented():
        for n, (images, labels) in enumerate(batches_of([2, 2, 2])):
            noise = torch.randn_like(images)
            drawn[-1].append(noise)
            yield images + noise, torch.full_like(labels, -100) if n < n_without_label else labels

    def loss_fn(scores: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scores, labels)

    model = tiny_vit()
    for look in (lambda batches: measure(model, batches, loss_fn=loss_fn), list):
        torch.manual_seed(0)
        drawn.append([])
        look(augmented())
    measured, alone = drawn
    assert len(measured) == 3
    assert all(map(torch.equal, measured, alone))


def test_a_look_at_samples_leaves_the_models_random_draws_alone() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.dropout(self.first(x), 0.5, training=True))

    model, inputs, labels = Noisy(), torch.randn(4, 6), torch.randint(5, (4,))
    torch.manual_seed(0)
    measure(model, [(inputs[:2], labels[:2]), (inputs[2:], labels[2:])], head="second")
    after = torch.rand(3)
    torch.manual_seed(0)
    for _ in range(2):
        model(inputs[:2])
    assert torch.equal(after, torch.rand(3))


class Twice(nn.Module):
    """A Linear and a norm used twice, at different widths of tokens, and a weight shared by two."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.second = nn.Linear(6, 6)
        self.third = nn.Linear(6, 6, bias=False)
        self.third.weight = self.second.weight
        self.conv = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.top = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)[:, :, :24].unflatten(2, (4, 6)).flatten(1, 2)  # [batch, 12, 6]
        tokens = self.norm(self.first(tokens).relu_())
        tokens = tokens + self.second(tokens)
        grid = tokens.transpose(1, 2).unflatten(2, (3, 4))
        grid = self.conv(self.conv(grid).tanh())
        pooled = self.norm(self.first(grid.mean((2, 3))))
        return self.top(self.third(pooled))


class Convolutions(nn.Module):
    """Convolutions of every geometry, GroupNorm, BatchNorm, RMSNorm, and modules in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, (3, 5), padding="same", dilation=(2, 1), bias=False),
            nn.GroupNorm(2, 8),
            nn.Conv2d(8, 12, 3, stride=2, padding=(1, 0), groups=4, dilation=2),
            nn.GELU(),
            nn.Conv2d(12, 12, 3, padding=1, groups=12, padding_mode="reflect"),
            nn.Conv2d(12, 6, 1, stride=2),
        )
        self.norm = nn.RMSNorm(6)
        self.top = nn.Linear(6, 5)
        nn.init.uniform_(self.layers[1].running_var, 0.5, 2.0)
        nn.init.uniform_(self.layers[1].running_mean, -1.0, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.norm(self.layers(x).mean((2, 3))))


class OneConvolution(nn.Module):
    """A convolution between an activation and a head, so that everything has a gradient."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.top = nn.Linear(conv.out_channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.conv(F.gelu(x)).tanh().mean((2, 3)))


class OneConvolutionAtTwoSizes(nn.Module):
    """A convolution with a bias on many positions, and again on fewer than it has channels."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1, groups=groups)
        self.top = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).tanh()
        return self.top(self.conv(F.avg_pool2d(x, 4)).mean((2, 3)))


class Exotic(nn.Module):
    """Uses that no observer sees as they are: each must end up exact all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(16, 8)
        self.transposed = nn.Linear(8, 8)
        self.tokens_first = nn.Linear(8, 8)
        self.no_batch = nn.Linear(2, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.twice = nn.Linear(8, 8)
        self.scripted = torch.jit.script(nn.Linear(8, 8))
        self.table = nn.Parameter(torch.randn(4, 8))
        self.shift = nn.Parameter(torch.randn(1, 1, 8))
        self.mixed = nn.Parameter(torch.randn(1, 8))
        self.unused = nn.Linear(3, 3)
        self.top = nn.Linear(8, 5)
        self.register_buffer("coordinates", torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(x[:, 0]) + self.shift  # [batch, 16, 8]
        x = x @ self.transposed.weight.T + self.transposed.bias
        x = self.tokens_first(x.transpose(0, 1)).transpose(0, 1)
        x = x + self.no_batch(self.coordinates).repeat(4, 1) + self.table.repeat(4, 1)
        x = x * self.mixed.softmax(0) + self.mixed.sum()
        # in sight, and out of it
        x = self.twice(x) + TimesFunction.apply(x.flatten(0, 1), self.twice.weight).view_as(x)
        x = self.scripted(x)
        x = self.attention(x, x, x, need_weights=False)[0].tanh()
        return self.top(x.mean(1))


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_exact(name: str) -> None:
    make, size = MODELS[name]
    model, batches = make(), batches_of([3, 2], size=size)
    sensitivity = measure(model, batches)
    assert not sensitivity.fallback
    assert sensitivity.num_samples == 5
    assert_exact(sensitivity, model, batches)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_exact_when_included(name: str) -> None:
    make, size = MODELS[name]
    model, batches = make(), batches_of([3], size=size)
    sensitivity = measure(model, batches, include=["*"])
    assert list(sensitivity) == [name for name, _ in model.named_parameters()]
    assert not sensitivity.fallback
    assert_exact(sensitivity, model, batches)


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (
            lambda: Beit(16, 4, embed_dim=24, depth=2, num_heads=3, num_classes=5, init_values=0.1),
            16,
        ),
        (lambda: ConvNeXt(depths=(1,) * 4, dims=(8,) * 4, num_classes=5, use_grn=True), 32),
        (Convolutions, 32),
        (Twice, 16),
    ],
    ids=["beit", "convnext-v2", "convolutions", "used-twice-and-shared"],
)
def test_other_models_are_exact_without_fallback(make, size: int) -> None:
    torch.manual_seed(0)
    model, batches = _spread(make()), batches_of([3, 1], size=size)
    shared = ["second.weight"] if make is Twice else []  # shared weights only when asked for
    sensitivity = measure(model, batches, include=shared)
    assert set(shared) <= sensitivity.keys()
    assert not sensitivity.fallback
    assert_exact(sensitivity, model, batches)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("seed", range(40))
def test_any_convolution_is_exact(seed: int) -> None:
    conv, x = draw(seed)
    model, batch = OneConvolution(conv), (x, torch.arange(len(x)))
    sensitivity = measure(model, [batch], include=["*"])
    assert not sensitivity.fallback
    # of so few values how well a CPU's kernels round them is luck, to plain torch's credit or ours
    assert_exact(sensitivity, model, [batch], factor=4.0)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_a_convolution_used_on_many_positions_and_on_few_is_exact(groups: int) -> None:
    torch.manual_seed(0)
    model = OneConvolutionAtTwoSizes(groups)
    batch = torch.randn(3, 6, 12, 12), torch.arange(3)
    sensitivity = measure(model, [batch], include=["*"])
    assert not sensitivity.fallback
    assert_exact(sensitivity, model, [batch])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_unobservable_uses_are_exact_by_fallback_and_say_so(caplog) -> None:
    torch.manual_seed(0)
    model, batches = _spread(Exotic()), batches_of([2, 1])
    sensitivity = measure(model, batches, include=["*"])
    assert "twice.bias" not in sensitivity.fallback
    assert {name.split(".")[0] for name in sensitivity.fallback} == {
        "transposed",
        "tokens_first",
        "twice",
        "scripted",
    }
    assert len(caplog.records) == 1
    assert "sample by sample" in caplog.text
    assert not sensitivity["unused.weight"].any()
    assert_exact(sensitivity, model, batches)


LOSSES = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "class-weights": nn.CrossEntropyLoss(weight=torch.tensor([0.1, 2.0, 1.0, 0.5, 3.0])),
    "label-smoothing": nn.CrossEntropyLoss(label_smoothing=0.2),
    "lambda": lambda output, target: (output.softmax(1)[:, 0] * (target + 1)).sum() ** 2,
}


@pytest.mark.parametrize("name", LOSSES)
def test_any_loss_is_each_samples_own(name: str) -> None:
    model, batches = tiny_vit(), batches_of([4])
    assert_exact(measure(model, batches, LOSSES[name]), model, batches, LOSSES[name])


def test_mean_and_sum_reduction_agree() -> None:
    model, batches = tiny_vit(), batches_of([4])
    mean = measure(model, batches, LOSSES["mean"])
    total = measure(model, batches, LOSSES["sum"])
    for name in mean:
        assert torch.equal(mean[name], total[name]), name


def test_class_probabilities_are_targets_too() -> None:
    model, ((images, _),) = tiny_vit(), batches_of([3])
    batches = [(images, torch.rand(3, 5).softmax(1))]
    assert_exact(measure(model, batches), model, batches)


@pytest.mark.parametrize(
    ("sizes", "num_samples"),
    [([4, 4, 4], 6), ([4, 4, 4], 8), ([1, 1, 1], 2), ([5], 1), ([3, 1, 4], 8)],
    ids=str,
)
def test_exactly_num_samples_are_used(sizes: list[int], num_samples: int) -> None:
    model, batches = tiny_vit(depth=1), batches_of(sizes)
    images, labels = tiny_batch(sum(sizes))
    drawn = []

    def loader():
        for batch in batches:
            drawn.append(len(batch[0]))
            yield batch

    sensitivity = measure(model, loader(), num_samples=num_samples)
    assert sensitivity.num_samples == num_samples
    assert sum(drawn) - drawn[-1] < num_samples, "a batch was drawn that was not needed"
    assert_exact(sensitivity, model, [(images[:num_samples], labels[:num_samples])])


def test_fewer_samples_than_wanted_are_all_used() -> None:
    model, batches = tiny_vit(depth=1), batches_of([2, 1])
    assert measure(model, batches, num_samples=800).num_samples == 3


def test_a_data_loader_works() -> None:
    images, labels = tiny_batch(5)
    dataset = torch.utils.data.TensorDataset(images, labels)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, drop_last=True)
    model = tiny_vit(depth=1)
    sensitivity = measure(model, loader)
    assert sensitivity.num_samples == 4
    assert_exact(sensitivity, model, [(images[:4], labels[:4])])


def test_nested_inputs_outputs_and_targets() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            x = self.layer(inputs["a"]) * inputs["b"]
            return x, {"square": x**2}

    def loss_fn(outputs, targets) -> Tensor:
        return (outputs[0] * targets[0]).sum() + outputs[1]["square"].mean() * targets[1].sum()

    torch.manual_seed(0)
    model = Nested()
    a, b, c, d = torch.randn(4, 4), torch.randn(4, 1), torch.randn(4, 3), torch.randn(4)
    sensitivity = measure(model, [({"a": a, "b": b}, (c, d))], loss_fn)
    expected = torch.zeros(3, 4)
    for i in range(4):
        weight = model.layer.weight.detach().clone().requires_grad_(True)
        x = F.linear(a[i], weight, model.layer.bias.detach()) * b[i]
        loss = (x * c[i]).sum() + (x**2).mean() * d[i]
        expected += torch.autograd.grad(loss, weight)[0] ** 2
    torch.testing.assert_close(sensitivity["layer.weight"], expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", MODELS)
def test_checkpointed_blocks_are_exact(name: str, reentrant: bool) -> None:
    make, size = MODELS[name]
    model, batches = make(), batches_of([3], size=size)
    checkpointed = copy.deepcopy(model)
    checkpointed.set_grad_checkpointing(True)
    timm.layers.set_reentrant_ckpt(reentrant)
    try:
        sensitivity = measure(checkpointed, batches)
    finally:
        timm.layers.set_reentrant_ckpt(False)
    assert not sensitivity.fallback
    assert_exact(sensitivity, model, batches)


@pytest.mark.parametrize("name", MODELS)
def test_under_autocast_scores_are_fp32_and_near(name: str) -> None:
    make, size = MODELS[name]
    model, batches = make(), batches_of([3], size=size)
    with torch.autocast("cpu", torch.bfloat16):
        sensitivity = measure(model, batches, include=["*"])
        plain = squared_gradients(model, batches, list(sensitivity), dtype=torch.float32)
    truth = squared_gradients(model, batches, list(sensitivity))
    assert not sensitivity.fallback
    error = {n: float((sensitivity[n] - truth[n]).norm()) for n in truth}
    allowed = {n: 2 * float((plain[n] - truth[n]).norm()) for n in truth}
    assert all(score.dtype == torch.float32 for score in sensitivity.values())
    # bf16 noise differs from parameter to parameter: the sum over the model must not be worse
    assert sum(error.values()) <= sum(allowed.values())


def test_a_half_precision_model_is_near() -> None:
    model, batches = tiny_vit(), batches_of([3])
    halves = [(images.bfloat16(), labels) for images, labels in batches]
    sensitivity = measure(copy.deepcopy(model).bfloat16(), halves)
    truth = squared_gradients(model, batches, list(sensitivity))
    error = sum(float((sensitivity[n] - truth[n]).norm()) for n in truth)
    assert error <= 0.1 * sum(float(score.norm()) for score in truth.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_norm_without_an_eps_has_the_one_that_torch_takes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.RMSNorm(16), nn.Linear(16, 5))
    for parameter in model[0].parameters():  # to be small beside an eps of the dtype's own
        parameter.data *= 0.05
    model = model.to(dtype)
    batches = [(images.to(dtype), labels) for images, labels in batches_of([4], size=2)]
    batches = [(images[:, :2].flatten(1), labels) for images, labels in batches]

    found = measure(model, batches, include=["*"])

    assert not found.fallback
    plain = squared_gradients(model, batches, list(found), dtype=dtype)
    for name, score in found.items():
        torch.testing.assert_close(score, plain[name].float(), rtol=0.05, atol=1e-4, msg=name)


def test_a_float64_model_is_measured_in_fp32() -> None:
    model, batches = tiny_vit(), batches_of([3])
    doubles = [(images.double(), labels) for images, labels in batches]
    assert_exact(measure(copy.deepcopy(model).double(), doubles), model, batches)


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, contextlib.nullcontext],
    ids=lambda c: c.__name__,
)
def test_the_callers_grad_mode_does_not_matter(context) -> None:
    model, batches = tiny_vit(depth=1), batches_of([3])
    with context():
        sensitivity = measure(model, batches)
    assert_exact(sensitivity, model, batches)


def test_a_frozen_model_is_measured_alike() -> None:
    model, batches = tiny_vit(depth=1), batches_of([3])
    free = measure(model, batches)
    frozen = measure(model.requires_grad_(False), batches)
    for name in free:
        assert torch.equal(free[name], frozen[name]), name


def test_repeated_measurements_give_the_same_bits() -> None:
    model, batches = tiny_swin(), batches_of([3], size=32)
    first, second = measure(model, batches), measure(model, batches)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_training_mode_is_used_when_asked() -> None:
    model, batches = tiny_vit(depth=1), batches_of([4])
    model.head_drop.p = 0.5
    plain = measure(model, batches)
    assert_exact(plain, model, batches)
    dropped = measure(model, batches, train=True)
    assert not torch.allclose(dropped["norm.weight"], plain["norm.weight"], rtol=0.05)


def test_included_head_parameters_are_no_longer_the_head() -> None:
    model, batches = tiny_vit(depth=1), batches_of([2])
    plain = measure(model, batches)
    assert plain.head == ("head.weight", "head.bias")
    n_head = model.head.weight.numel() + model.head.bias.numel()
    n_all = sum(parameter.numel() for parameter in model.parameters())
    assert plain.backbone_numel == n_all - n_head
    with_bias = measure(model, batches, include=["head.bias"])
    assert with_bias.head == ("head.weight",)
    assert with_bias.backbone_numel == n_all - model.head.weight.numel()


def test_no_mode_sees_the_calls_of_a_model() -> None:
    model, depths = tiny_vit(depth=1), []
    model.blocks[0].register_forward_hook(
        lambda *_: depths.append(len(torch.overrides._get_current_function_mode_stack()))
    )
    measure(model, batches_of([2, 2]))
    assert depths[-2:] == [0, 0]
    assert max(depths) == 1  # in the probe, which looks for rows that values choose


def calls_of(run: Callable[[], object]) -> int:
    """Python functions that `run` calls."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def test_a_use_costs_few_calls_of_python() -> None:
    model, ((images, labels), *_) = tiny_vit(depth=6), batches_of([4])
    per_batch = []
    measure(model, [(images, labels)])
    for n_batches in (2, 4):
        batches = [(images, labels)] * n_batches
        per_batch.append(calls_of(lambda batches=batches: measure(model, batches)))
    ours = (per_batch[1] - per_batch[0]) / 2
    plain = calls_of(lambda: F.cross_entropy(model(images), labels).backward())
    n_uses = 6 * (4 + 2) + 1
    # 99 with torch 2.14, 107 with 2.11; a mode that sees all calls made it 680
    assert ours <= plain + 120 * n_uses


def test_progress_is_reported_to_a_function() -> None:
    calls: list[tuple[int, int]] = []
    spt.measure_sensitivity(
        tiny_vit(depth=1),
        batches_of([2, 2]),
        num_samples=3,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(2, 3), (3, 3)]


def test_a_weight_cast_once_and_kept_is_still_measured() -> None:
    class Caches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(768, 5, bias=False, dtype=torch.float64)
            self.kept: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.kept = self.kept or [self.layer.weight.float()]
            return F.linear(x.flatten(1), self.kept[0])

    model, batches = Caches(), batches_of([3, 2])
    sensitivity = measure(model, batches)
    model.kept.clear()
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    probabilities = model(images).softmax(1).double() - F.one_hot(labels, 5)
    expected = (probabilities[:, :, None] * images.flatten(1)[:, None]).square().sum(0)
    torch.testing.assert_close(sensitivity["layer.weight"], expected.float())


class Attends(nn.Module):
    """Torch's attention, which reads the weight of its output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=True)
        self.mix = nn.Linear(24, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.mix(self.layer(images.flatten(1).view(-1, 32, 24))).mean(1))


def tiny_beit() -> nn.Module:
    torch.manual_seed(0)
    return _spread(
        Beit(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3, num_classes=5)
    )


@pytest.mark.parametrize(
    ("make", "read", "called"),
    [
        (Attends, "layer.self_attn.out_proj.weight", "mix.weight"),
        (Attends, "layer.linear2.weight", "mix.weight"),
        (tiny_beit, "blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight"),
    ],
)
def test_no_lora_for_a_weight_that_the_model_reads_itself(make, read, called) -> None:
    model = make()
    sensitivity = measure(model, batches_of([3]))
    assert sensitivity.info[read].kind == "functional"
    assert sensitivity.info[called].kind == "linear"
    assert not model.get_submodule(called.removesuffix(".weight"))._forward_pre_hooks
    spent = sum(int((score > 0).sum()) for score in sensitivity.values()) // 4
    plan = spt.allocate(sensitivity, budget=spent, structured="lora", rank=1)
    assert called in plan.structured
    assert read not in plan.structured
    spt.apply(model, plan)


@pytest.mark.parametrize("structured", ["lora", "adapter", None])
def test_torchs_fused_encoder_layer_infers_what_was_trained(structured: str | None) -> None:
    torch.manual_seed(0)
    model, batches = Attends().eval(), batches_of([3])
    plan = spt.allocate(measure(model, batches), 900, structured=structured, rank=1)
    spt.apply(model, plan)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    (images, _), *_ = batches
    trained = model(images)  # with gradients torch calls layer by layer, without them all at once
    with torch.no_grad():
        torch.testing.assert_close(model(images), trained.detach())
