"""Sparse norms against dense autograd of the plain norm, masked."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, LayerNorm2d, RmsNorm
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from spt_kernels import Plan, apply
from spt_kernels.layers import SparseDeltaLinear, SparseDeltaNorm
from spt_kernels.model import describe
from spt_kernels.ops.launching import as_on_card

NORMS = {
    "LayerNorm": (lambda: nn.LayerNorm(8), (3, 5, 8)),
    "LayerNorm_two_dims": (lambda: nn.LayerNorm((5, 8)), (3, 5, 8)),
    "LayerNorm_no_bias": (lambda: nn.LayerNorm(8, bias=False), (3, 5, 8)),
    "timm_LayerNorm": (lambda: LayerNorm(8), (3, 5, 8)),
    "timm_LayerNorm2d": (lambda: LayerNorm2d(8), (3, 8, 4, 4)),
    "timm_RmsNorm": (lambda: RmsNorm(8), (3, 5, 8)),
    "RMSNorm": (lambda: nn.RMSNorm(8), (3, 5, 8)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 8), (3, 8, 4, 4)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(8), (3, 8, 4, 4)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(8, affine=True), (3, 8, 4, 4)),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NORMS)
def test_output_buffers_and_gradients(name: str, training: bool) -> None:
    make, shape = NORMS[name]
    torch.manual_seed(0)
    norm = make().train(training)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    dense = copy.deepcopy(norm)
    index = torch.tensor([1, 2, 7])
    has_bias = norm._parameters.get("bias") is not None
    layer = SparseDeltaNorm(norm, index, torch.tensor([0, 5]) if has_bias else None)
    x = torch.randn(shape, requires_grad=True)
    leaf = x.detach().clone().requires_grad_()
    for _ in range(2):  # running statistics move once per forward
        y, expected = layer(x), dense(leaf)
    assert torch.equal(y, expected)
    y.pow(3).sum().backward()
    expected.pow(3).sum().backward()
    torch.testing.assert_close(x.grad, leaf.grad)
    torch.testing.assert_close(layer.weight_delta.grad, dense.weight.grad.flatten()[index])
    assert layer.weight.grad is None
    if has_bias:
        torch.testing.assert_close(layer.bias_delta.grad, dense.bias.grad.flatten()[[0, 5]])
    for own, other in zip(layer.plain.buffers(), dense.buffers(), strict=True):
        assert torch.equal(own, other)


def test_training_moves_the_weight_that_the_forward_uses() -> None:
    layer = SparseDeltaNorm(nn.LayerNorm(8), torch.tensor([2]))
    optimizer = torch.optim.SGD([layer.weight_delta], lr=0.5)
    x = torch.randn(4, 8)
    before = layer(x).detach()
    layer(x).pow(2).sum().backward()
    optimizer.step()
    assert float(layer.weight[2]) != 1.0
    after = layer(x)
    assert torch.equal(after, F.layer_norm(x, (8,), layer.weight, layer.bias))
    assert torch.equal(after[:, :2], before[:, :2])
    assert not torch.equal(after[:, 2], before[:, 2])


@pytest.mark.parametrize("name", ["LayerNorm", "timm_LayerNorm"])
def test_a_sparse_linear_still_rebuilds_what_a_sparse_norm_produced(name: str) -> None:
    torch.manual_seed(0)
    norm = SparseDeltaNorm(NORMS[name][0](), torch.tensor([2]), torch.tensor([3]))
    nn.init.constant_(norm.weight_delta, 0.3)
    linear = SparseDeltaLinear(nn.Linear(8, 6), torch.arange(0, 48, 3))
    x = torch.randn(3, 5, 8, requires_grad=True)
    y = linear(norm(x))
    assert y.grad_fn.saved_input.kind == "layer_norm"
    y.square().sum().backward()
    weight = linear.weight.detach().clone().requires_grad_()
    leaf = x.detach()
    scale = torch.ones(8)
    scale[2] += 0.3
    h = F.layer_norm(leaf, (8,), scale, torch.zeros(8), norm.eps)
    F.linear(h, weight, linear.bias).square().sum().backward()
    torch.testing.assert_close(linear.delta.grad, weight.grad.flatten()[::3])


@pytest.mark.parametrize(("name", "argument"), [("LayerNorm", "input"), ("timm_LayerNorm", "x")])
def test_an_input_by_its_name(name: str, argument: str) -> None:
    norm = SparseDeltaNorm(NORMS[name][0](), torch.tensor([2]))
    nn.init.constant_(norm.weight_delta, 0.3)
    x = torch.randn(3, 8)
    y = norm(**{argument: x})
    assert torch.equal(y, norm(x))
    y.sum().backward()
    assert norm.weight_delta.grad is not None
    with pytest.raises(TypeError, match="positional argument"):
        norm(x, x)


@pytest.mark.parametrize("as_card", [False, True])
@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("way", ["weight_norm", "pruning"])
def test_a_weight_that_is_made_of_others_is_not_left_out(
    way: str, is_late: bool, as_card: bool
) -> None:
    def change(norm: nn.Module) -> None:
        if way == "pruning":
            prune.l1_unstructured(norm, "weight", 0.5)
        else:
            parametrizations.weight_norm(norm, dim=None)

    norm, x = nn.LayerNorm(8), torch.randn(3, 8)
    nn.init.normal_(norm.weight)
    if is_late:
        norm = SparseDeltaNorm(norm, bias_index=torch.tensor([2]))
    change(norm)
    if not is_late:
        norm = SparseDeltaNorm(norm, bias_index=torch.tensor([2]))
    with as_on_card() if as_card else contextlib.nullcontext():
        assert torch.equal(norm(x), F.layer_norm(x, (8,), norm.weight, norm.bias))


@pytest.mark.parametrize("as_card", [False, True])
def test_a_weight_that_is_gone_is_told_of(as_card: bool) -> None:
    norm = SparseDeltaNorm(nn.LayerNorm(8), torch.tensor([2]))
    norm.weight = None
    way = as_on_card() if as_card else contextlib.nullcontext()
    with way, pytest.raises(ValueError, match=r"\.weight is gone"):
        norm(torch.randn(3, 8))


def test_state_copies_casts_and_attributes() -> None:
    norm = SparseDeltaNorm(nn.BatchNorm2d(8), torch.tensor([2]))
    names = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert set(norm.state_dict()) == names | {"weight_delta", "weight_index", "weight_original"}
    assert (norm.num_features, norm.eps) == (8, 1e-5)
    nn.init.constant_(norm.weight_delta, 0.5)
    x = torch.randn(2, 8, 3, 3)
    twin = copy.deepcopy(norm)
    assert torch.equal(twin(x), norm(x))
    assert torch.equal(twin.plain.running_mean, norm.plain.running_mean)
    norm.eval()
    assert not norm.plain.training
    norm.bfloat16()
    assert norm.weight_delta.dtype == torch.float32
    assert norm.plain.running_mean.dtype == torch.bfloat16
    assert "BatchNorm2d" in repr(norm)
    assert "weight_nnz=1" in repr(norm)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"weight_index was given, but .* no weight"):
        SparseDeltaNorm(nn.LayerNorm(8, elementwise_affine=False), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"weight_index must lie in \[0, 8\)"):
        SparseDeltaNorm(nn.LayerNorm(8), torch.tensor([8]))
    norm = nn.LayerNorm(8)
    with pytest.raises(ValueError, match=r"bias_index must lie in \[0, 8\)"):
        SparseDeltaNorm(norm, torch.tensor([1]), torch.tensor([9]))
    assert norm.weight.requires_grad, "a refused layer must be left as it was"
    with pytest.raises(TypeError, match=r"norm must be an nn\.Module, got int"):
        SparseDeltaNorm(3, torch.tensor([1]))  # type: ignore[arg-type]


def test_a_norm_of_which_nothing_is_trained_is_the_plain_one() -> None:
    plain = nn.LayerNorm(4)
    x = torch.randn(3, 4)
    assert torch.equal(SparseDeltaNorm(plain)(x), plain(x))


class Conditional(nn.Module):
    """A norm called with more than its input, as conditional and fused add + norm are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.gate = nn.Parameter(torch.linspace(0, 1, width))

    def forward(
        self, x: Tensor, residual: Tensor | None = None, *, eps: float = 1e-5
    ) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        return self._scaled(F.layer_norm(total, total.shape[-1:], eps=eps)), total

    def _scaled(self, x: Tensor) -> Tensor:
        return x * (self.weight + self.gate) + self.bias


class ConditionalNorm(Conditional):
    """The same, known to be a norm by its name."""


@pytest.mark.parametrize("kind", [Conditional, ConditionalNorm])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_norm_with_more_arguments_results_and_parameters(
    kind: type[Conditional], compiled: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(8))
    dense, x, residual = copy.deepcopy(model[0]), torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    index = {f"0.{name}": torch.tensor([1, 6]) for name in ("weight", "bias", "gate")}
    apply(model, Plan(index, {}, describe(model)))
    norm = model[0]
    run = torch.compile(norm, fullgraph=True, backend="eager") if compiled else norm
    y, total = run(x, residual, eps=1e-3)
    expected, _ = dense(x, residual=residual, eps=1e-3)
    assert torch.equal(y, expected)
    assert torch.equal(total, x + residual)
    y.square().sum().backward()
    expected.square().sum().backward()
    for name in ("weight", "bias", "gate"):
        truth = dense.get_parameter(name).grad[[1, 6]]
        torch.testing.assert_close(getattr(norm, f"{name}_delta").grad, truth)
    torch.testing.assert_close(norm(x=x)[0], dense(x)[0])


def test_inputs_by_name() -> None:
    x = torch.randn(3, 8)
    for layer in (
        SparseDeltaNorm(nn.LayerNorm(8), torch.tensor([1])),
        SparseDeltaLinear(nn.Linear(8, 6), torch.tensor([1])),
    ):
        assert torch.equal(layer(input=x), layer(x))


def test_within_a_failing_forward_and_after_it() -> None:
    norm = SparseDeltaNorm(nn.BatchNorm2d(8), torch.tensor([2]))
    with pytest.raises(ValueError, match="expected 4D input"):
        norm(torch.randn(2, 8))
    assert isinstance(norm.weight, nn.Parameter)


class WaitingNorm(nn.Module):
    """Lets others run before it reads its weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, meanwhile: Callable[[], object]) -> Tensor:
        meanwhile()
        return F.normalize(x, dim=-1) * self.weight


def test_two_threads_in_one_norm() -> None:
    norm = SparseDeltaNorm(WaitingNorm(8), torch.tensor([2, 5]))
    x, in_other, in_this = torch.randn(3, 8), threading.Event(), threading.Event()

    def wait_for_this() -> None:
        in_other.set()
        assert in_this.wait(10)

    other = threading.Thread(target=lambda: norm(x, wait_for_this))

    def let_other_return() -> None:
        in_this.set()
        other.join(10)
        assert not other.is_alive()

    other.start()
    assert in_other.wait(10)
    norm(x, let_other_return).sum().backward()
    truth = F.normalize(x, dim=-1).sum(0)[[2, 5]]
    torch.testing.assert_close(norm.weight_delta.grad, truth)
    assert isinstance(norm.weight, nn.Parameter)


def test_a_norm_within_a_norm() -> None:
    outer, inner = (SparseDeltaNorm(WaitingNorm(8), torch.tensor([n])) for n in (2, 5))
    x, read = torch.randn(3, 8), []
    outer(x, lambda: inner(x, lambda: read.extend([outer.weight, inner.weight])))
    assert all(weight.grad_fn is not None for weight in read)
    assert isinstance(inner.weight, nn.Parameter)
