"""LayerNorms from their output: nearly exact gradients, half of the memory, tuned or not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spt_kernels import LoraLinear, LoraSpec, SparseDeltaLinear, SparseDeltaNorm, approximate
from spt_kernels.layers.norm import is_layer_norm

from .test_activation import kept_bytes

WIDTH = 48


def tokens(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed))
    x[..., 3] += 30.0  # the few large features that a residual stream has
    return 4 * x + 1


def norm(**how: bool) -> nn.LayerNorm:
    made = nn.LayerNorm(WIDTH, **how)
    for seed, parameter in enumerate(made.parameters()):
        nn.init.normal_(parameter, 1.0, 0.5, generator=torch.Generator().manual_seed(seed))
    return made


@pytest.mark.parametrize("how", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 7)], ids=str)
def test_output_is_exact_and_gradients_are_off_by_what_16_bits_lose(
    shape: tuple[int, ...], how: dict[str, bool]
) -> None:
    module, x = norm(**how), tokens(*shape)
    grad = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(1))
    plain = module(x)
    wide = x.double().requires_grad_()
    affine = [p.detach().double().requires_grad_() for p in module.parameters()]
    truth = torch.autograd.grad(
        F.layer_norm(wide, (WIDTH,), *affine), [wide, *affine], grad.double()
    )
    approximate(module, layer_norm="from-output")
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    assert torch.equal(y, plain)
    found = torch.autograd.grad(y, [leaf, *module.parameters()], grad)
    for own, exact in zip(found, truth, strict=True):
        assert float((own - exact).norm()) <= 2**-10 * float(exact.norm())


def test_half_of_the_input_is_kept() -> None:
    module, x = norm(), tokens(16).requires_grad_()
    exact = kept_bytes(lambda: module(x))
    approximate(module, layer_norm="from-output")
    assert exact == x.nbytes + 2 * 16 * 4
    assert kept_bytes(lambda: module(x)) == x.nbytes // 2 + 16 * 4


def test_inputs_of_other_dtypes_are_exact() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        module, x = norm().to(dtype), tokens(3).to(dtype).requires_grad_()
        approximate(module, layer_norm="from-output")
        assert module(x).grad_fn.name() == "NativeLayerNormBackward0"


def test_large_and_constant_rows_stay_finite() -> None:
    x = torch.zeros(2, WIDTH)
    x[0, 0] = 1e15  # normalized, the square root of the width
    x.requires_grad_()
    module = approximate(norm(), layer_norm="from-output")
    module(x).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("steps", ["none", "view", "permute"])
def test_a_tuned_layer_behind_rebuilds_its_input_from_what_is_kept(
    steps: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spt_kernels.layers.lora.small_shape", lambda *_: None)  # which keep theirs
    moves: dict[str, Callable[[Tensor], Tensor]] = {
        "none": lambda y: y,
        "view": lambda y: y.view(-1, WIDTH),
        "permute": lambda y: y.permute(1, 0, 2),
    }
    module, x = norm(), tokens(4, 5).requires_grad_()
    torch.manual_seed(0)
    plain = nn.Linear(WIDTH, 8)
    for layer in (
        SparseDeltaLinear(plain, torch.arange(0, 8 * WIDTH, 3)),
        LoraLinear(plain, LoraSpec(2, ((0, 8),), WIDTH, 1.0, 0.0)),
    ):
        if isinstance(layer, LoraLinear):
            nn.init.normal_(layer.lora_b)
        trained = [p for p in layer.parameters() if p.requires_grad]
        grads = []
        for choice in (None, "from-output"):
            approximate(module, layer_norm=choice)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = layer(moves[steps](module(x)))
            kind = y.grad_fn.saved_input.kind
            assert kind == ("layer_norm" if choice is None else "function")
            grads.append(torch.autograd.grad(y.float().square().sum(), [x, *trained]))
        for exact, own in zip(*grads, strict=True):
            assert float((own - exact).norm()) < (0.02 if autocast else 0.002) * float(exact.norm())


def test_the_mask_of_a_layer_behind_leaves_what_is_kept_as_it_is() -> None:
    torch.manual_seed(0)
    module, x = norm(elementwise_affine=False), tokens(4).requires_grad_()
    layer = LoraLinear(nn.Linear(WIDTH, 8), LoraSpec(2, ((0, 8),), WIDTH, 1.0, 0.5))
    nn.init.normal_(layer.lora_b)
    grads = []
    for choice in (None, "from-output"):
        approximate(module, layer_norm=choice)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.float16):  # in which the norm's output is kept, too
            y = layer(module(x))
        assert y.grad_fn.saved_input.kind == ("layer_norm" if choice is None else "function")
        grads.append(torch.autograd.grad(y.float().square().sum(), [x, layer.lora_a]))
    for exact, own in zip(*grads, strict=True):
        assert float((own - exact).norm()) < 0.01 * float(exact.norm())


def test_a_layer_behind_a_checkpoint_keeps_its_input() -> None:
    torch.manual_seed(0)
    module, x = norm(), tokens(4).requires_grad_()
    layer = SparseDeltaLinear(nn.Linear(WIDTH, 8), torch.arange(0, 8 * WIDTH, 3))
    runs, grads = [], []

    def block(x: Tensor) -> Tensor:
        runs.append(x)
        return module(x * 1.5)

    for choice in (None, "from-output"):
        approximate(module, layer_norm=choice)
        y = layer(checkpoint(block, x, use_reentrant=False))
        assert y.grad_fn.saved_input.kind == "columns"
        grads.append(torch.autograd.grad(y.square().sum(), [x, layer.delta]))
    assert len(runs) == 2 * 2  # forward and recomputation
    for exact, own in zip(*grads, strict=True):
        assert float((own - exact).norm()) < 0.002 * float(exact.norm())


def test_a_forward_over_a_graph_that_is_gone_still_runs() -> None:
    module, x = approximate(norm(), layer_norm="from-output"), tokens(4).requires_grad_()
    layer = SparseDeltaLinear(nn.Linear(WIDTH, 8), torch.tensor([0, 1]))
    y = module(x)
    y.sum().backward()
    assert layer(y).grad_fn.saved_input.kind == "columns"


def test_edited_output_is_kept_by_the_layer_behind() -> None:
    module, x = approximate(norm(), layer_norm="from-output"), tokens(4).requires_grad_()
    layer = SparseDeltaLinear(nn.Linear(WIDTH, 8), torch.tensor([0, 1]))
    y = module(x)
    with torch.no_grad():
        y.mul_(2.0)
    assert layer(y).grad_fn.saved_input.kind == "columns"


def test_second_derivatives_are_refused() -> None:
    module, x = approximate(norm(), layer_norm="from-output"), tokens(4).requires_grad_()
    (grad,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.square().sum().backward()


def test_a_norm_with_deltas_trains_them_before_and_after() -> None:
    x, index = tokens(5).requires_grad_(), torch.tensor([0, 3, 7])
    for make in (norm, lambda: timm.layers.LayerNorm(WIDTH)):
        module = SparseDeltaNorm(make(), index, index)
        assert is_layer_norm(module)
        grads = []
        for choice in (None, "from-output", None):
            approximate(module, layer_norm=choice)
            y = module(x)
            deltas = module.weight_delta, module.bias_delta
            grads.append(torch.autograd.grad((y * tokens(5, seed=2)).sum(), [x, *deltas]))
        for exact, own, again in zip(*grads, strict=True):
            assert torch.equal(exact, again)
            assert float((own - exact).norm()) < 2**-9 * float(exact.norm())
        with torch.no_grad():
            module.weight_delta.add_(1.0)  # as an optimizer does, and the next call sees it
        approximate(module, layer_norm="from-output")
        moved = module(x)
        assert torch.equal(moved, F.layer_norm(x, (WIDTH,), module.weight, module.bias, module.eps))


def test_other_norms_are_none() -> None:
    for module in (nn.BatchNorm2d(4), nn.GroupNorm(2, 4), timm.layers.LayerNorm2d(4)):
        assert not is_layer_norm(module)
