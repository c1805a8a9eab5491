"""Sparse norms against dense autograd of the plain norm, masked."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, LayerNorm2d, RmsNorm
from torch import nn

from spt_kernels.layers import SparseDeltaLinear, SparseDeltaNorm

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
