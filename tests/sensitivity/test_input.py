"""measure_sensitivity with bad input, and what it leaves behind: nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spt_kernels as spt
from tests.models import tiny_batch, tiny_vit

from .per_sample_truth import assert_exact

IMAGES, LABELS = tiny_batch(3)


def measure(model: nn.Module, batches: Any, *args: Any, **options: Any) -> spt.Sensitivity:
    return spt.measure_sensitivity(model, batches, *args, progress=False, **options)


def through_lambda(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, nn.CrossEntropyLoss(), through_lambda])
@pytest.mark.parametrize("label", [5, -1, 10**6])
def test_labels_out_of_range(loss_fn: Callable[..., Tensor], label: int) -> None:
    labels = torch.tensor([0, label, 1])
    with pytest.raises(ValueError, match="target"):
        measure(tiny_vit(depth=1), [(IMAGES, labels)], loss_fn)


def test_the_message_says_which_labels_there_are() -> None:
    with pytest.raises(ValueError, match=r"from 0 to 4.*got 7"):
        measure(tiny_vit(depth=1), [(IMAGES, torch.tensor([0, 7, 1]))])


def test_labels_out_of_range_in_a_later_batch() -> None:
    with pytest.raises(ValueError, match="target"):
        measure(tiny_vit(depth=1), [(IMAGES, LABELS), (IMAGES, LABELS + 5)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bool], ids=str)
@pytest.mark.parametrize("loss_fn", [F.cross_entropy, nn.CrossEntropyLoss(), through_lambda])
def test_labels_of_the_wrong_dtype(loss_fn: Callable[..., Tensor], dtype: torch.dtype) -> None:
    with pytest.raises((TypeError, ValueError), match="target"):
        measure(tiny_vit(depth=1), [(IMAGES, LABELS.to(dtype))], loss_fn)


def test_labels_of_the_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"target.*shape"):
        measure(tiny_vit(depth=1), [(IMAGES, LABELS[:, None])])


def constant(output: Tensor, target: Tensor) -> Tensor:
    return torch.zeros((), requires_grad=True)


def detached(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.detach(), target)


def unreduced(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


def outputs(output: Tensor, target: Tensor) -> Tensor:
    return output


def number(output: Tensor, target: Tensor) -> Any:
    return F.cross_entropy(output, target).item()


def not_a_number(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target) * float("nan")


def gradient_overflows(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target) * 1e30


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (constant, "loss_fn.*does not depend on"),
        (detached, "loss_fn.*does not depend on"),
        (unreduced, r"loss_fn unreduced: expected a scalar, got shape \(1,\)"),
        (outputs, r"loss_fn outputs: expected a scalar, got shape \(1, 5\)"),
        (number, "loss_fn number: expected a tensor, got float"),
        (not_a_number, "loss is nan in batch 0"),
        (gradient_overflows, "sensitivity of .* is not finite"),
        (lambda output: output.sum(), "loss_fn .*positional argument"),
        ("cross_entropy", "loss_fn: expected a function, got str"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value))[:30],
)
def test_losses_that_cannot_be_measured(loss_fn: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        measure(tiny_vit(depth=1), [(IMAGES, LABELS)], loss_fn)


def test_a_later_batch_with_a_non_finite_loss_is_named() -> None:
    bad = torch.full_like(IMAGES, float("inf"))
    with pytest.raises(ValueError, match="loss is nan in batch 2"):
        measure(tiny_vit(depth=1), [(IMAGES, LABELS), (IMAGES, LABELS), (bad, LABELS)])


def test_a_model_that_ignores_its_candidates() -> None:
    class Ignorant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :5]

    with pytest.raises(ValueError, match="does not depend on"):
        measure(Ignorant(), [(IMAGES, LABELS)])


@pytest.mark.parametrize("batches", [[], iter(()), torch.utils.data.DataLoader([], batch_size=2)])
def test_no_samples(batches: Any) -> None:
    with pytest.raises(ValueError, match=r"batches.*got none"):
        measure(tiny_vit(depth=1), batches)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (3, TypeError, "batches.*int"),
        ([IMAGES], ValueError, "batches.*pairs"),
        ([(IMAGES, LABELS, LABELS)], ValueError, "batches.*3 things as batch 0"),
        ([(IMAGES[:0], LABELS[:0])], ValueError, "batch 0 has no samples"),
        ([(IMAGES, LABELS[:2])], ValueError, "target: expected 3 rows in batch 0.*got 2"),
        ([(IMAGES, LABELS[0])], ValueError, "target: expected 3 rows.*got a scalar"),
        ([(["a"], LABELS)], ValueError, "batches: expected a tensor as input"),
        ([(IMAGES, [0, 1, 2])], ValueError, "target: expected tensors with a row.*got list of 3"),
        ([(IMAGES, LABELS.numpy())], ValueError, "target: expected tensors.*got ndarray of 3"),
    ],
    ids=[
        "int", "no-pair", "triple", "empty-batch", "short-target", "scalar-target", "no-tensor",
        "list-target", "array-target",
    ],
)  # fmt: skip
def test_batches_of_the_wrong_form(batches: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        measure(tiny_vit(depth=1), batches)


@pytest.mark.parametrize("num_samples", [0, -3])
def test_num_samples_must_be_positive(num_samples: int) -> None:
    with pytest.raises(ValueError, match=f"num_samples.*{num_samples}"):
        measure(tiny_vit(depth=1), [(IMAGES, LABELS)], num_samples=num_samples)


@pytest.mark.parametrize("num_samples", [2.0, True, None])
def test_num_samples_must_be_an_int(num_samples: Any) -> None:
    with pytest.raises(TypeError, match="num_samples"):
        measure(tiny_vit(depth=1), [(IMAGES, LABELS)], num_samples=num_samples)


def test_something_else_than_a_model() -> None:
    with pytest.raises(TypeError, match="model"):
        measure(lambda x: x, [(IMAGES, LABELS)])  # type: ignore[arg-type]


class Normalized(nn.Module):
    """A network in which a BatchNorm makes samples depend on each other while training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).square().mean((2, 3)))


def test_samples_that_influence_each_other() -> None:
    model = Normalized()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="depends on the other samples"):
        measure(model, [(IMAGES, LABELS)], train=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} was changed"
    assert not measure(model, [(IMAGES, LABELS)]).fallback


@pytest.mark.parametrize("share", [1e-9, 1e-3])
def test_an_influence_below_rounding_is_none(share: float) -> None:
    class Leaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.fc((x + share * x.roll(1, 0)).square().mean((2, 3)))

    torch.manual_seed(0)
    model = Leaks()
    if share == 1e-3:
        with pytest.raises(ValueError, match="depends on the other samples"):
            measure(model, [(IMAGES, LABELS)])
        return
    sensitivity = measure(model, [(IMAGES, LABELS)])
    assert not sensitivity.fallback
    assert_exact(sensitivity, model, [(IMAGES, LABELS)])


class TrapError(Exception):
    """Raised from the middle of a measurement."""


@pytest.mark.parametrize("failing", ["never", "forward", "loss", "loader", "backward"])
def test_the_model_is_left_as_it_was(failing: str) -> None:
    model = tiny_vit(depth=2).train()
    model.blocks[0].eval()
    model.blocks[1].norm1.requires_grad_(False)
    model.pos_embed.grad = torch.ones_like(model.pos_embed)
    calls = []
    handle = model.blocks[1].register_forward_hook(lambda *_: calls.append(1))
    backward_hook = model.blocks[1].register_full_backward_hook(lambda *_: None)
    before = state_of(model)
    generator = torch.get_rng_state()

    def batches() -> Any:
        yield IMAGES, LABELS
        if failing == "loader":
            raise TrapError
        yield IMAGES, LABELS

    def fail(*_: Any) -> None:
        if len(calls) > 2:  # two forward passes are the probe's
            raise TrapError

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        if failing == "loss":
            fail()
        if failing == "backward":
            output.register_hook(fail)
        return F.cross_entropy(output, target)

    if failing == "forward":
        model.blocks[0].register_forward_pre_hook(fail)
    before = state_of(model)
    if failing == "never":
        measure(model, batches(), loss_fn)
    else:
        with pytest.raises(TrapError):
            measure(model, batches(), loss_fn)

    assert len(calls) >= 3, "the model's own hooks must run"
    assert state_of(model) == before
    assert torch.equal(model.pos_embed.grad, torch.ones_like(model.pos_embed))
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.training
    assert not model.blocks[0].training
    handle.remove()
    backward_hook.remove()


def state_of(model: nn.Module) -> list[Any]:
    """Everything about a model that a measurement could forget to put back."""
    state: list[Any] = [
        (
            name,
            id(p),
            type(p),
            p._version,
            p.requires_grad,
            id(p.grad),
            vars(p).copy(),
            p._backward_hooks,
        )
        for name, p in model.named_parameters()
    ]
    for name, module in model.named_modules():
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks))
        state.append((name, module.training, sorted(module.__dict__), hooks))
    return state


def test_buffers_that_training_mode_changes_are_put_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(768, 5)
            self.register_buffer("n_calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.n_calls += 1
            return self.fc1(x.flatten(1))

    model = Counting()
    buffer = model.n_calls
    measure(model, [(IMAGES, LABELS)])
    assert model.n_calls is buffer
    assert float(model.n_calls) == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_an_optimizer_in_backward_does_not_step() -> None:
    model = tiny_vit(depth=1)
    model.blocks[0].mlp.act = torch.jit.script(nn.PReLU())  # which uses its weight out of sight
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: p.data.zero_())
    before = copy.deepcopy(model.state_dict())
    sensitivity = measure(model, [(IMAGES, LABELS)], include=["*"])
    assert sensitivity.fallback == ("blocks.0.mlp.act.weight",)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_inputs_are_left_as_they_were() -> None:
    images = IMAGES.clone().requires_grad_(True)
    measure(tiny_vit(depth=1), [(images, LABELS)])
    assert images.grad is None
    assert torch.equal(images, IMAGES)


def test_a_model_whose_uses_vary_is_refused() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(768, 768)
            self.n_calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.n_calls += 1
            x = self.layer(x.flatten(1))
            return (self.layer(x) if self.n_calls > 3 else x)[:, :5]

    with pytest.raises(RuntimeError, match=r"layer.weight is used 2 times"):
        measure(Fickle(), [(IMAGES, LABELS)])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_use_that_only_a_later_batch_makes_is_refused() -> None:
    class Late(nn.Module):
        def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
            super().__init__()
            self.layer = nn.Linear(768, 5)
            self.use = use
            self.n_calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.n_calls += 1
            x = x.flatten(1)
            y = self.layer(x)
            return y + self.use(x, self.layer.weight) if self.n_calls > 3 else y

    for use in (torch.jit.script(times), TimesFunction.apply, times, F.linear):
        model = Late(use)
        with pytest.raises(RuntimeError, match=r"layer\.weight.* the first one"):
            measure(model, [(IMAGES, LABELS), (IMAGES, LABELS)])
        assert type(model.layer.weight) is nn.Parameter
        assert model.layer.weight.grad is None


def times(x: Tensor, weight: Tensor) -> Tensor:
    return x.matmul(weight.t())


class TimesFunction(torch.autograd.Function):
    """A product that torch's own calls show nothing of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad_output @ weight, grad_output.T @ x


def test_a_wrapped_model_is_refused_as_apply_refuses_it() -> None:
    for wrap in (nn.DataParallel, lambda model: torch.compile(model, backend="eager")):
        with pytest.raises(ValueError, match=r"model is wrapped in a .*: measure the model itself"):
            measure(wrap(tiny_vit(depth=1)), [(IMAGES, LABELS)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.inference_mode()(tiny_vit)(depth=1), "made under torch.inference_mode"),
        (lambda: tiny_vit(depth=1).to("meta"), "on the meta device"),
    ],
    ids=["inference", "meta"],
)
def test_weights_that_cannot_be_trained(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=rf"cls_token .*{message}"):
        measure(make(), [(IMAGES, LABELS)])


def test_the_inference_mode_of_the_caller_does_not_matter() -> None:
    model = tiny_vit(depth=1)
    expected = measure(model, [(IMAGES, LABELS)])
    with torch.inference_mode():
        found = measure(model, [(IMAGES, LABELS)])
    for name, score in expected.items():
        assert torch.equal(found[name], score)
        assert not found[name].is_inference()


def test_a_tuned_model_is_refused() -> None:
    model = tiny_vit(depth=1)
    spt.apply(model, spt.allocate(measure(model, [(IMAGES, LABELS)]), budget=10))
    with pytest.raises(ValueError, match="model: expected a plain model, got a tuned one"):
        measure(model, [(IMAGES, LABELS)])


def test_a_head_of_zeros_is_told_of() -> None:
    model = tiny_vit(depth=1)
    nn.init.zeros_(model.head.weight)
    with pytest.raises(ValueError, match=r"every sensitivity is zero.*head"):
        measure(model, [(IMAGES, LABELS)])
    assert model.head.weight.requires_grad
