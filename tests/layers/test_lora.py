"""LoRA on whole layers and on slices, against the formula in plain autograd."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spt_kernels import LoraSpec
from spt_kernels.layers import LoraLinear, SparseDeltaLinear, sparse_deltas, tuned_modules
from spt_kernels.layers.autograd import tuned_linear
from spt_kernels.layers.deltas.sparse_delta import owner_of
from spt_kernels.ops.native_calls import available
from tests.tolerance import assert_within_budget

from .truth import INDEX, sparse_linear, tokens

ROWS = {
    "whole": ((0, 6),),
    "middle": ((1, 5),),
    "apart": ((0, 2), (4, 6)),
    "side-by-side": ((0, 2), (2, 4), (4, 6)),
    "uneven-widths": ((0, 1), (1, 6)),
    "uneven-steps": ((0, 1), (2, 3), (5, 6)),
}


def lora(
    rows: tuple[tuple[int, int], ...] = ((0, 6),),
    *,
    base: nn.Module | None = None,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.5,
) -> LoraLinear:
    torch.manual_seed(0)
    base = nn.Linear(8, 6) if base is None else base
    layer = LoraLinear(base.to(dtype), LoraSpec(3, rows, 8, scale, dropout))
    with torch.no_grad():
        layer.lora_b.normal_()
    return layer


def by_formula(layer: LoraLinear, x: Tensor, mask: Tensor | float = 1.0) -> Tensor:
    """`W x + scale · B_i A_i (mask · x)`, from the definition, for autograd to differentiate."""
    y = F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
    low, up = layer.lora_a.to(x.dtype), layer.lora_b.to(x.dtype)
    updates, first = torch.zeros_like(y), 0
    for i, (start, stop) in enumerate(layer.spec.rows):
        down_i, up_i = low[3 * i : 3 * i + 3], up[first : first + stop - start]
        columns = torch.zeros(stop - start, 6, dtype=x.dtype)
        columns[:, start:stop] = torch.eye(stop - start, dtype=x.dtype)
        updates = updates + layer.spec.scale * ((x * mask) @ down_i.t() @ up_i.t()) @ columns
        first += stop - start
    return y + updates


def gradients(run: Callable[[Tensor], Tensor], layer: LoraLinear, x: Tensor) -> list[Tensor]:
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = run(x)
    y.double().square().sum().backward()
    return [y.detach(), x.grad, layer.lora_a.grad.clone(), layer.lora_b.grad.clone()]


def check(layer: LoraLinear, make: Callable[[Tensor], Tensor], x: Tensor, mask=1.0) -> None:  # type: ignore[no-untyped-def]
    actual = gradients(lambda x: layer(make(x)), layer, x)
    plain = gradients(lambda x: by_formula(layer, make(x), mask), layer, x)
    truth = gradients(lambda x: by_formula(layer, make(x), mask), layer, x.double())
    wide = copy.deepcopy(layer).double()
    for parameter, own in zip(wide.parameters(), layer.parameters(), strict=True):
        parameter.data = own.data.double()
    truth = gradients(lambda x: by_formula(wide, make(x), mask), wide, x.double())
    for own, dense, exact in zip(actual, plain, truth, strict=True):
        assert_within_budget(own, dense, exact)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "read",
    [lambda y: y, lambda y: y.transpose(0, 2) * 2, lambda y: y[:, 1:, ::2]],
    ids=["one-value-for-all", "transposed", "some-columns"],
)
def test_a_gradient_that_comes_as_a_view(rows: str, read) -> None:  # type: ignore[no-untyped-def]
    layer = lora(ROWS[rows])
    x = tokens(4, 5, 8)
    read(layer(x)).sum().backward()
    assert layer.lora_b.grad.is_contiguous()
    actual = [layer.lora_a.grad.clone(), layer.lora_b.grad.clone()]
    layer.zero_grad()
    read(by_formula(layer, x)).sum().backward()
    expected = [layer.lora_a.grad, layer.lora_b.grad]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [F.gelu, lambda x: x], ids=["gelu", "leaf"])
def test_gradients_are_those_of_the_formula(rows: str, dtype: torch.dtype, make) -> None:  # type: ignore[no-untyped-def]
    layer = lora(ROWS[rows], dtype=dtype)
    assert layer.lora_a.dtype == torch.float32
    check(layer, make, tokens(4, 5, 8, dtype=dtype))


def test_starts_as_the_base_layer() -> None:
    torch.manual_seed(0)
    base = nn.Linear(8, 6)
    layer = LoraLinear(base, LoraSpec(3, ((0, 6),), 8))
    x = tokens(4, 8)
    torch.testing.assert_close(layer(x), base(x))
    assert bool((layer.lora_b == 0).all())
    bound = (1 / 8) ** 0.5
    assert float(layer.lora_a.detach().abs().max()) <= bound
    assert float(layer.lora_a.detach().std()) > bound / 4
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_a", "lora_b"]


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (F.gelu, "gelu"),
        (lambda x: F.layer_norm(x, (8,)), "layer_norm"),
        (F.relu, "tensor"),
        (lambda x: 2 * x, "tensor"),
    ],
    ids=["gelu", "layer_norm", "relu", "leaf"],
)
def test_what_is_saved(make, kind: str) -> None:  # type: ignore[no-untyped-def]
    assert lora()(make(tokens(8200, 8))).grad_fn.saved_input.kind == kind
    if available():  # so little is kept, whatever made it
        assert lora()(make(tokens(4, 8))).grad_fn.saved_input.kind == "tensor"


@pytest.mark.parametrize("p", [0.5, 0.1, 1.0])
@pytest.mark.parametrize("make", [F.gelu, F.relu], ids=["rebuilt", "kept"])
def test_dropout_has_the_same_mask_in_the_backward(p: float, make) -> None:  # type: ignore[no-untyped-def]
    # with A and B of identities the output shows the mask
    base = nn.Linear(8, 6)
    probe = LoraLinear(base, LoraSpec(8, ((0, 6),), 8, 1.0, p))
    probe.lora_a.data.copy_(torch.eye(8))
    layer = lora(dropout=p, base=base)
    x = tokens(50, 40, 8)
    masks = []
    for columns in (slice(0, 6), slice(2, 8)):
        probe.lora_b.data.copy_(torch.eye(8)[columns])
        torch.manual_seed(11)
        shown = probe(torch.ones(50, 40, 8)) - base(torch.ones(50, 40, 8))
        masks.append(shown.detach())
    mask = torch.cat([masks[0], masks[1][..., 4:]], -1)  # 0 or 1 / (1 - p)
    if p < 1.0:
        assert torch.allclose(mask[mask.abs() > 0.5], torch.tensor(1 / (1 - p)))
        share = float((mask.abs() > 0.5).double().mean())
        assert abs(share - (1 - p)) < 0.02
        mask = torch.where(mask.abs() > 0.5, 1 / (1 - p), 0.0)
    else:
        assert float(mask.abs().max()) < 1e-6
        mask = torch.zeros_like(mask)

    def seeded(x: Tensor) -> Tensor:
        h = make(x)
        torch.manual_seed(11)
        return h

    check(layer, seeded, x, mask)


def test_dropout_is_off_in_eval_and_drawn_anew_in_training() -> None:
    layer, x = lora(dropout=0.5), tokens(4, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), by_formula(layer, x))
    state = torch.get_rng_state()
    layer(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_draws_on_the_cpu_whatever_the_default_device() -> None:
    layer, x = lora(dropout=0.5), tokens(4, 8)
    torch.manual_seed(3)
    expected = layer(x)
    torch.manual_seed(3)
    with torch.device("meta"):
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_dropout_under_checkpoint(reentrant: bool) -> None:
    layer = lora(dropout=0.5)

    def run(x: Tensor) -> Tensor:
        return layer(F.gelu(x))

    torch.manual_seed(3)
    expected = gradients(run, layer, tokens(4, 5, 8))
    torch.manual_seed(3)
    actual = gradients(
        lambda x: checkpoint(run, x, use_reentrant=reentrant), layer, tokens(4, 5, 8)
    )
    for own, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("make", [F.gelu, F.relu, lambda x: 2 * x], ids=["gelu", "relu", "leaf"])
def test_on_a_sparse_layer_both_train(make) -> None:  # type: ignore[no-untyped-def]
    rows = ((0, 2),)
    index = INDEX[INDEX >= 16]  # below the rows of the LoRA
    torch.manual_seed(0)
    layer = lora(rows, base=SparseDeltaLinear(nn.Linear(8, 6), index), dropout=0.3)
    nn.init.normal_(layer.delta)
    torch.manual_seed(5)
    actual = gradients(lambda x: layer(make(x)), layer, tokens(4, 5, 8))
    sparse = layer.delta.grad.clone()
    assert torch.equal(layer.weight.view(-1)[index], layer.original + layer.delta)

    # the gradient of a weight in a row without LoRA is that of the plain layer
    weight = layer.weight.detach().clone().requires_grad_()
    y = F.linear(make(tokens(4, 5, 8)), weight, layer.bias)
    y.square().sum().backward()
    torch.testing.assert_close(sparse, weight.grad.flatten()[index])
    assert set(sparse_deltas(layer)) == {"weight"}
    assert tuned_modules(layer) == {"": layer}
    assert len(actual) == 4


def test_autocast() -> None:
    layer, x = lora(dropout=0.0), tokens(4, 5, 8)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(F.gelu(x))

    actual = gradients(run, layer, x)
    assert actual[0].dtype == torch.bfloat16
    truth = gradients(lambda x: by_formula(layer, F.gelu(x)), layer, x)
    for own, exact in zip(actual, truth, strict=True):
        assert float((own - exact).norm() / exact.norm()) < 2e-2


def test_no_grad_inference_mode_and_frozen_parts() -> None:
    layer, x = lora(), tokens(4, 8)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(layer(x), by_formula(layer, x))
    layer.lora_a.requires_grad_(False)
    y = layer(F.gelu(x))
    assert y.grad_fn.saved_input is None
    y.relu_().sum().backward()
    assert layer.lora_b.grad is not None
    assert layer.lora_a.grad is None


def test_update_is_what_merging_adds() -> None:
    layer, x = lora(((0, 2), (4, 6))), tokens(4, 8)
    merged = F.linear(x, layer.weight + layer.update(), layer.bias)
    torch.testing.assert_close(merged, layer(x))


def test_update_is_as_exact_as_the_weight_and_knows_no_autocast() -> None:
    layer, wide = lora(((0, 2), (4, 6))), lora(((0, 2), (4, 6)), dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        within = layer.update()
    assert torch.equal(within, layer.update())
    assert within.dtype == torch.float32
    x = tokens(4, 8, dtype=torch.float64)
    merged = F.linear(x, wide.weight + wide.update(), wide.bias)
    torch.testing.assert_close(merged, wide(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rows", [((0, 6),), ((0, 2), (4, 6))], ids=["whole", "apart"])
def test_a_layer_that_0_7_1_pickled(rows: tuple[tuple[int, int], ...]) -> None:
    layer, x = lora(rows), tokens(4, 8)
    parts = layer.__dict__
    # pickled by the name of where it was, and by its fields in their order
    parts["_spt_plain_call"] = tuned_linear.LoraCall(parts["_spt_plain_call"].groups, 1.5, 0.0, 0)
    y = layer(x)
    torch.testing.assert_close(y, by_formula(layer, x))
    trained = layer.lora_a, layer.lora_b
    actual = torch.autograd.grad(y.sum(), trained)
    expected = torch.autograd.grad(by_formula(layer, x).sum(), trained)
    torch.testing.assert_close(actual, expected)


def test_a_layer_that_was_pickled_before_modules_lay_in_folders() -> None:
    layer, x = lora(((0, 2), (4, 6)), base=sparse_linear()), tokens(4, 8)
    now = pickle.dumps(layer, protocol=2)  # torch.save's, whose names have no length before them
    then = re.sub(rb"spt_kernels\.layers\.(autograd|deltas)\.", b"spt_kernels.layers.", now)
    assert then != now
    assert torch.equal(pickle.loads(then)(x), layer(x))


def test_moved_copied_pickled_and_loaded() -> None:
    layer, x = lora(((0, 2), (4, 6)), base=sparse_linear()), tokens(4, 8)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    other = lora(((0, 2), (4, 6)), base=sparse_linear(seed=4))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    layer.bfloat16()
    assert layer.lora_a.dtype == layer.lora_b.dtype == layer.delta.dtype == torch.float32
    assert layer.weight.dtype == torch.bfloat16
    assert repr(layer) == (
        "LoraLinear(in_features=8, out_features=6, bias=True, nnz=19, bias_nnz=2, "
        "rank=3, rows=((0, 2), (4, 6)), scale=1.5, dropout=0.0)"
    )
    assert type(layer.plain) is nn.Linear


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (LoraSpec(3, ((0, 6),), 9), ValueError, "spec is for 9 input features, base has 8"),
        (LoraSpec(3, ((0, 7),), 8), ValueError, r"within \[0, 6\]"),
        (LoraSpec(3, ((2, 4), (3, 6)), 8), ValueError, "apart"),
        (LoraSpec(0, ((0, 6),), 8), ValueError, "rank 0"),
        (LoraSpec(3, (), 8), ValueError, "rows"),
        (LoraSpec(3, ((0, 6),), 8, dropout=1.5), ValueError, "dropout"),
    ],
    ids=["in_features", "out_of_range", "overlap", "rank", "no_rows", "dropout"],
)
def test_refuses_a_spec(spec: LoraSpec, error: type[Exception], message: str) -> None:
    base = nn.Linear(8, 6)
    with pytest.raises(error, match=message):
        LoraLinear(base, spec)
    assert base.weight.requires_grad


def test_refuses_another_base() -> None:
    with pytest.raises(TypeError, match="got Conv2d"):
        LoraLinear(nn.Conv2d(1, 1, 1), LoraSpec(1, ((0, 1),), 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", ROWS)
def test_16_bits_on_a_cpu_leave_its_library_on(rows: str) -> None:
    # torch turns oneDNN off for the whole process once a product of strided batches has failed
    layer, x = lora(ROWS[rows], dtype=torch.bfloat16), tokens(40, 8, dtype=torch.bfloat16)
    layer(x).float().square().sum().backward()
    assert torch._C._get_mkldnn_enabled()


@pytest.mark.parametrize("assign", [False, True], ids=["swapped_in", "assigned"])
def test_a_state_dict_that_brings_other_tensors_leaves_the_layer_theirs(assign: bool) -> None:
    layer = lora(base=SparseDeltaLinear(nn.Linear(8, 6), INDEX))
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    torch.__future__.set_swap_module_params_on_conversion(not assign)
    try:
        layer.load_state_dict(state, assign=assign)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for parameter in (layer.lora_a, layer.lora_b, layer.delta):
        assert owner_of(parameter) is layer
