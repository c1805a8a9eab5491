"""LoRA and Adapter on 1×1 convolutions against the same thing written out with plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spt_kernels import AdapterSpec, LoraSpec
from spt_kernels.layers import AdapterConv2d, LoraConv2d, SparseDeltaConv2d
from spt_kernels.layers.autograd import pointwise_lora
from tests.tolerance import assert_within_budget

from .test_memory import LiveStorages

ROWS = [((0, 8),), ((0, 3), (4, 8)), ((2, 6),)]
STRIDES = [1, 2, (2, 1)]


def image(channels_last: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(3, 6, 5, 7, generator=torch.Generator().manual_seed(3)).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    return x.requires_grad_()


def lora(
    rows: tuple[tuple[int, int], ...] = ROWS[0],
    stride: int | tuple[int, int] = 1,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> LoraConv2d:
    torch.manual_seed(0)
    base = nn.Conv2d(6, 8, 1, stride=stride).to(dtype)
    layer = LoraConv2d(base, LoraSpec(2, rows, 6, 1.5, dropout))
    nn.init.normal_(layer.lora_b)
    return layer


def written_out(layer: LoraConv2d, x: Tensor, mask: Tensor | float, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    """Output and gradients of input, `lora_a` and `lora_b`, in `dtype`."""
    a = layer.lora_a.detach().to(dtype).requires_grad_()
    b = layer.lora_b.detach().to(dtype).requires_grad_()
    x = x.detach().to(dtype).requires_grad_()
    y = F.conv2d(x, layer.weight.to(dtype), layer.bias.to(dtype), layer.stride)
    updates, first = [torch.zeros_like(y[:, :0])], 0
    last = 0
    for i, (start, stop) in enumerate(layer.spec.rows):
        low = F.conv2d(x * mask, a[2 * i : 2 * i + 2, :, None, None], stride=layer.stride)
        update = 1.5 * F.conv2d(low, b[first : first + stop - start, :, None, None])
        updates += [torch.zeros_like(y[:, last:start]), update]
        first, last = first + stop - start, stop
    y = y + torch.cat([*updates, torch.zeros_like(y[:, last:])], 1)
    return y, torch.autograd.grad(y.square().sum(), (x, a, b))


def check(layer: LoraConv2d, x: Tensor, mask: Tensor | float = 1.0) -> None:
    y = layer(x)
    own = torch.autograd.grad(y.square().sum(), (x, layer.lora_a, layer.lora_b))
    plain_y, plain = written_out(layer, x, mask, x.dtype)
    exact_y, exact = written_out(layer, x, mask, torch.float64)
    assert_within_budget(y, plain_y, exact_y)
    for mine, other, true in zip(own, plain, exact, strict=True):
        assert_within_budget(mine.to(x.dtype), other, true)


@pytest.mark.parametrize("channels_last", [False, True], ids=["row-major", "channels-last"])
@pytest.mark.parametrize("stride", STRIDES, ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_lora_is_exact(rows, stride, channels_last: bool) -> None:  # type: ignore[no-untyped-def]
    check(lora(rows, stride), image(channels_last))


@pytest.mark.parametrize("stride", [1, 2])
def test_dropout_drops_the_same_in_forward_and_backward(stride: int, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(pointwise_lora, "_ELEMENTS_AT_ONCE", 300)  # a sample at a time
    layer, x = lora(ROWS[1], stride, dropout=0.4), image()
    torch.manual_seed(5)
    seed = layer._this_call(x).seed
    kept = layer._this_call(x)._replace(seed=seed).dropped(torch.ones_like(x))
    assert 0.4 < kept.mean() < 0.8
    torch.manual_seed(5)
    check(layer, x, kept / 0.6)
    assert torch.equal(layer.eval()(x), layer(x))


def test_in_sixteen_bits_and_under_autocast() -> None:
    check(lora(dtype=torch.bfloat16), image(dtype=torch.bfloat16))
    layer = lora()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(image())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.lora_a.grad.dtype == layer.lora_b.grad.dtype == torch.float32


def test_beside_sparse_deltas_both_are_trained() -> None:
    torch.manual_seed(0)
    sparse = SparseDeltaConv2d(nn.Conv2d(6, 8, 1), torch.tensor([0, 7, 11]), torch.tensor([1]))
    layer = LoraConv2d(sparse, LoraSpec(2, ((2, 8),), 6))
    nn.init.normal_(layer.lora_b)
    layer.eval()
    x = image()
    layer(x).square().sum().backward()
    weight = layer.weight.detach().clone().requires_grad_()
    whole = weight.flatten(1) + layer.update()
    F.conv2d(x, whole[..., None, None], layer.bias).square().sum().backward()
    torch.testing.assert_close(layer.delta.grad, weight.grad.flatten()[[0, 7, 11]])


@pytest.mark.parametrize("stride", STRIDES, ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_adapter_is_exact(rows, stride) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    layer = AdapterConv2d(nn.Conv2d(6, 8, 1, stride=stride), AdapterSpec(2, rows))
    x = image()
    assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias, layer.stride))
    for name in ("up_weight", "up_bias"):
        nn.init.normal_(getattr(layer, name))
    y = layer(x)
    trained = [layer.down_weight, layer.down_bias, layer.up_weight, layer.up_bias]
    own = torch.autograd.grad(y.square().sum(), (x, *trained))
    base = F.conv2d(x, layer.weight, layer.bias, layer.stride)
    expected, first = base.clone(), 0
    for i, (start, stop) in enumerate(rows):
        part = slice(first, first + stop - start)
        tokens = base[:, start:stop].movedim(1, -1)
        low = tokens @ layer.down_weight[:, part].t() + layer.down_bias[2 * i : 2 * i + 2]
        up = F.gelu(low) @ layer.up_weight[part].t() + layer.up_bias[part]
        expected[:, start:stop] = expected[:, start:stop] + up.movedim(-1, 1)
        first = part.stop
    torch.testing.assert_close(y, expected)
    theirs = torch.autograd.grad(expected.square().sum(), (x, *trained))
    for mine, other in zip(own, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls", [LoraConv2d, AdapterConv2d])
def test_gradient_of_the_input_in_float64(cls) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    spec = LoraSpec(2, ((0, 2), (4, 6)), 4, 0.5, 0.0) if cls is LoraConv2d else None
    layer = cls(nn.Conv2d(4, 6, 1, stride=2), spec or AdapterSpec(2, ((2, 6),)))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    layer.double()
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x), (x,), check_undefined_grad=False)


def test_compiled_they_are_one_graph_with_the_same_gradients() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    spec = LoraSpec(2, ROWS[1], 6, 1.5, 0.0)
    model = nn.Sequential(
        LoraConv2d(nn.Conv2d(6, 8, 1, stride=2), spec),
        AdapterConv2d(nn.Conv2d(8, 8, 1), AdapterSpec(2, ROWS[1])),
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    trained = [p for p in model.parameters() if p.requires_grad]
    x = image()
    expected = torch.autograd.grad(model(x).square().sum(), (x, *trained))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(x).square().sum(), (x, *trained))
    for mine, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-3)


def test_after_an_activation_nothing_but_the_bottleneck_is_kept() -> None:
    def kept(layer: nn.Module, activation: nn.Module) -> int:
        model = nn.Sequential(nn.Conv2d(3, 6, 3).requires_grad_(False), activation, layer)
        x = torch.randn(2, 3, 12, 12, requires_grad=True)
        model(x)
        with LiveStorages() as live:
            output = model(x)
        return live.bytes_alive_besides(x, output, *model.parameters())

    for activation in (nn.GELU(), nn.ReLU()):
        frozen = kept(SparseDeltaConv2d(nn.Conv2d(6, 8, 1), torch.tensor([0])), activation)
        assert kept(lora(), activation) <= frozen + 2 * 2 * 100 * 4 + 64


def test_it_is_a_conv2d_and_one_image_will_do() -> None:
    layer = lora(stride=2)
    assert isinstance(layer, nn.Conv2d)
    assert type(layer).__name__ == "LoraConv2d"
    torch.testing.assert_close(layer(image()[1]), layer(image())[1])


@pytest.mark.parametrize(
    "base",
    [nn.Conv2d(6, 8, 3), nn.Conv2d(6, 8, 1, groups=2), nn.Conv2d(6, 8, 1, padding=1)],
    ids=["3×3", "groups", "padded"],
)
def test_other_convolutions_are_refused(base: nn.Module) -> None:
    with pytest.raises(TypeError, match="1×1 without groups or padding"):
        LoraConv2d(base, LoraSpec(2, ((0, 8),), 6))
    with pytest.raises(ValueError, match="spec is for 5 input features, base has 6"):
        LoraConv2d(nn.Conv2d(6, 8, 1), LoraSpec(2, ((0, 8),), 5))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_batch_without_images(dropout: float) -> None:
    layer = lora(dropout=dropout)
    x = torch.zeros(0, 6, 5, 7, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 8, 5, 7)
    assert x.grad is not None
    assert x.grad.shape == x.shape
    for factor in (layer.lora_a, layer.lora_b):
        assert factor.grad is not None
        assert not factor.grad.any()
