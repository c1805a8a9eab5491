"""The sparse Conv2d against dense autograd of the plain one, masked."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spt_kernels.layers import SparseDeltaConv2d, untune
from tests.sensitivity.random_convolutions import draw
from tests.tolerance import assert_within_budget

CONVS = {
    "1x1": lambda: nn.Conv2d(4, 6, 1),
    "1x1_dilated": lambda: nn.Conv2d(4, 6, 1, dilation=2),
    "1x1_strided": lambda: nn.Conv2d(4, 6, 1, stride=2),
    "1x1_padded": lambda: nn.Conv2d(4, 6, 1, padding=1),
    "patch_4x4": lambda: nn.Conv2d(4, 6, 4, 4),
    "patch_2x3_uneven": lambda: nn.Conv2d(4, 6, (2, 3), (2, 3)),
    "patch_no_bias": lambda: nn.Conv2d(4, 6, 2, 2, bias=False),
    "depthwise_7x7": lambda: nn.Conv2d(4, 4, 7, padding=3, groups=4),
    "grouped": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "full_3x3_strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2),
    "same": lambda: nn.Conv2d(4, 6, (3, 4), padding="same"),
    "valid_patch": lambda: nn.Conv2d(4, 6, 2, 2, padding="valid"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "circular_patch": lambda: nn.Conv2d(4, 6, 2, 2, padding=1, padding_mode="circular"),
}


def tuned(name: str, dtype: torch.dtype = torch.float32) -> SparseDeltaConv2d:
    torch.manual_seed(0)
    conv = CONVS[name]().to(dtype)
    index = torch.randperm(conv.weight.numel())[:9].sort().values
    bias_index = None if conv.bias is None else torch.tensor([0, 3])
    layer = SparseDeltaConv2d(conv, index, bias_index)
    nn.init.normal_(layer.delta, std=0.1)
    return layer


def run(module: nn.Module, x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    y = module(F.gelu(x) if gelu else x)
    y.double().square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CONVS)
def test_output_and_gradients(name: str, dtype: torch.dtype) -> None:
    layer = tuned(name, dtype)
    x = torch.randn(2, 4, 9, 11, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer(x)  # writes the delta
    plain = copy.deepcopy(layer.plain).requires_grad_()
    exact = copy.deepcopy(plain).double()
    y, gx = run(layer, x, gelu=name.startswith("1x1"))
    plain_y, plain_gx = run(plain, x, gelu=name.startswith("1x1"))
    _, exact_gx = run(exact, x.double(), gelu=name.startswith("1x1"))
    index = layer.index.long()

    assert torch.equal(y, plain_y)
    assert_within_budget(gx, plain_gx, exact_gx)
    triple = [m.weight.grad.flatten()[index] for m in (plain, exact)]
    assert_within_budget(layer.delta.grad, triple[0], triple[1])
    assert layer.weight.grad is None
    if layer.bias is not None:
        assert_within_budget(
            layer.bias_delta.grad, plain.bias.grad[[0, 3]], exact.bias.grad[[0, 3]]
        )


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("seed", range(40))
def test_any_geometry(seed: int) -> None:
    conv, x = draw(seed)
    n_entries = conv.weight.numel()
    index = torch.randperm(n_entries)[: n_entries if seed % 3 == 0 else n_entries // 5 + 1]
    index = index.sort().values
    bias_index = None if conv.bias is None else torch.arange(len(conv.bias))
    plain, exact = copy.deepcopy(conv), copy.deepcopy(conv).double()
    layer = SparseDeltaConv2d(conv, index, bias_index)

    y, gx = run(layer, x, gelu=seed % 2 == 0)
    plain_y, plain_gx = run(plain, x, gelu=seed % 2 == 0)
    _, exact_gx = run(exact, x.double(), gelu=seed % 2 == 0)
    assert torch.equal(y, plain_y)
    assert_within_budget(gx, plain_gx, exact_gx)
    entries = [m.weight.grad.flatten()[index] for m in (plain, exact)]
    few = 4.0 if len(index) < 16 else 1.0
    assert_within_budget(layer.delta.grad, entries[0], entries[1], roundings=few)
    if bias_index is not None:
        assert_within_budget(layer.bias_delta.grad, plain.bias.grad, exact.bias.grad)


def test_patches_keep_what_a_layer_norm_kept() -> None:
    layer = tuned("patch_4x4")
    x = torch.randn(2, 8, 8, 4, requires_grad=True)
    y = layer(F.layer_norm(x, (4,)).permute(0, 3, 1, 2))
    assert y.grad_fn.saved_input.kind == "layer_norm"
    y.square().sum().backward()
    weight = layer.weight.detach().clone().requires_grad_()
    leaf = x.detach()
    F.conv2d(
        F.layer_norm(leaf, (4,)).permute(0, 3, 1, 2), weight, layer.bias, 4
    ).square().sum().backward()
    torch.testing.assert_close(layer.delta.grad, weight.grad.flatten()[layer.index.long()])


def test_without_a_batch_and_without_gradients() -> None:
    layer = tuned("patch_4x4")
    x = torch.randn(4, 8, 8)
    y = layer(x)
    assert y.shape == (6, 2, 2)
    y.sum().backward()
    assert layer.delta.grad is not None
    with torch.no_grad():
        assert torch.equal(layer(x), layer.plain(x))


@pytest.mark.parametrize("name", ["patch_4x4", "depthwise_7x7"])
def test_autocast(name: str) -> None:
    layer = tuned(name)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    layer(x).square().sum().backward()
    exact = layer.delta.grad.clone()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert layer.delta.grad.dtype == torch.float32
    assert float((layer.delta.grad - exact).norm() / exact.norm()) < 3e-2


def test_channels_last() -> None:
    layer = tuned("full_3x3_strided")
    x = torch.randn(2, 4, 8, 8)
    expected = layer(x)
    layer.to(memory_format=torch.channels_last)
    assert layer.weight.is_contiguous()
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), expected)
    layer.to(memory_format=torch.contiguous_format)
    untune(layer)
    assert layer.weight.is_contiguous()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_weight_in_channels_last_is_so_again_when_it_is_plain(when: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1)
    index = torch.tensor([3, 40, 100, 215])
    plain, dense = copy.deepcopy(conv), copy.deepcopy(conv)
    if when == "before":
        conv.to(memory_format=torch.channels_last)
    layer = SparseDeltaConv2d(conv, index)
    if when == "after":
        layer.to(memory_format=torch.channels_last)
    assert torch.equal(layer.original, plain.weight.flatten()[index])
    x = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
    layer(x).square().sum().backward()
    dense(x).square().sum().backward()
    truth = dense.weight.grad.flatten()[index]
    torch.testing.assert_close(layer.delta.grad, truth)
    with torch.no_grad():
        layer.delta.fill_(0.5)
    layer(x)
    expected = plain.weight.detach().clone()
    expected.view(-1)[index] += 0.5
    assert torch.equal(layer.weight, expected)
    twin, file = copy.deepcopy(layer), io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for each in (twin, torch.load(file, weights_only=False), layer.half().float()):
        untune(each)
        assert each.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(twin.weight, expected)


def test_a_layer_that_0_8_3_pickled_in_channels_last() -> None:
    """Which held the format itself, that `torch.save` cannot write."""
    conv = nn.Conv2d(4, 6, 3, padding=1).to(memory_format=torch.channels_last)
    layer = SparseDeltaConv2d(conv, torch.tensor([3, 40]))
    layer.__dict__["_spt_formats"] = {"weight": torch.channels_last}
    again = pickle.loads(pickle.dumps(layer))
    torch.save(again, io.BytesIO())
    untune(again)
    assert again.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_state_dict_in_channels_last_that_is_assigned() -> None:
    layer, other = tuned("full_3x3_strided"), tuned("full_3x3_strided")
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    state["weight"] = state["weight"].to(memory_format=torch.channels_last)
    assert not state["weight"].is_contiguous()
    other.load_state_dict(state, assign=True)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        for each in (layer, other):
            each.delta.fill_(0.5)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(3, 3, 4, 6).permute(3, 2, 0, 1),
        torch.randn(1, 4, 3, 3).expand(6, 4, 3, 3),
        torch.randn(6, 4, 3, 6)[..., ::2],
    ],
    ids=["permuted", "expanded", "strided"],
)
def test_another_layout_is_refused(weight: torch.Tensor) -> None:
    conv = nn.Conv2d(4, 6, 3)
    conv.weight = nn.Parameter(weight)
    with pytest.raises(ValueError, match=r"weight must be contiguous \(or channels-last\), got"):
        SparseDeltaConv2d(conv, torch.tensor([1]))
    assert conv.weight.requires_grad


def test_refuses_what_is_no_conv2d_and_what_has_no_bias() -> None:
    with pytest.raises(TypeError, match="got Linear"):
        SparseDeltaConv2d(nn.Linear(2, 2), torch.tensor([0]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no bias"):
        SparseDeltaConv2d(CONVS["patch_no_bias"](), torch.tensor([0]), torch.tensor([0]))


def test_keeps_the_attributes_of_a_conv2d() -> None:
    layer = tuned("patch_4x4")
    assert (layer.in_channels, layer.out_channels, layer.kernel_size) == (4, 6, (4, 4))
    assert repr(layer) == (
        "SparseDeltaConv2d(4, 6, kernel_size=(4, 4), stride=(4, 4), nnz=9, bias_nnz=2)"
    )
    twin = copy.deepcopy(layer)
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(twin(x), layer(x))
    layer.bfloat16()
    assert layer.delta.dtype == torch.float32


@pytest.mark.parametrize("producer", ["leaf", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "index", "kept"),
    [
        ("depthwise_7x7", [51, 60, 97, 147, 195], [1, 3]),
        ("depthwise_7x7", [0, 49, 98, 147], None),
        ("grouped", [54, 70, 107], [2, 3]),
        ("full_3x3_strided", [3, 80], None),
    ],
    ids=["depthwise-some", "depthwise-all", "grouped-one", "full"],
)
def test_groups_without_trained_entries_are_not_kept(
    name: str, index: list[int], kept: list[int] | None, dtype: torch.dtype, producer: str
) -> None:
    torch.manual_seed(0)
    conv = CONVS[name]().to(dtype)
    layer = SparseDeltaConv2d(conv, torch.tensor(index))
    x = torch.randn(2, 4, 9, 11, generator=torch.Generator().manual_seed(1)).to(dtype)
    h = x.requires_grad_()
    y = layer(F.gelu(h) if producer == "gelu" else h)
    saved = y.grad_fn.saved_input.kind
    assert saved == ("gelu" if producer == "gelu" else "tensor" if kept is None else "columns")
    if saved == "columns":
        assert torch.equal(y.grad_fn.saved_tensors[-1], x.detach()[:, kept])
    y.double().square().sum().backward()

    plain = copy.deepcopy(layer.plain).requires_grad_()
    exact = copy.deepcopy(plain).double()
    _, plain_gx = run(plain, x, gelu=producer == "gelu")
    _, exact_gx = run(exact, x.double(), gelu=producer == "gelu")
    dense, truth = (m.weight.grad.flatten()[index] for m in (plain, exact))
    assert_within_budget(layer.delta.grad, dense, truth)
    assert_within_budget(h.grad, plain_gx, exact_gx)


def test_touched_groups_follow_a_loaded_index() -> None:
    layer = SparseDeltaConv2d(CONVS["depthwise_7x7"](), torch.tensor([0, 5]))
    other = SparseDeltaConv2d(CONVS["depthwise_7x7"](), torch.tensor([60, 150]))
    layer.load_state_dict(other.state_dict())
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    y = layer(x)
    assert torch.equal(y.grad_fn.saved_tensors[-1], x.detach()[:, [1, 3]])
    y.square().sum().backward()
    other(x).square().sum().backward()
    assert torch.equal(layer.delta.grad, other.delta.grad)
