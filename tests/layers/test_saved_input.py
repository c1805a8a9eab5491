"""What a sparse layer keeps of its input after every producer, and that gradients are exact."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from operator import attrgetter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from spt_kernels.layers import SparseDeltaLinear
from spt_kernels.layers.autograd import graph_nodes

from .truth import INDEX, check_gradients, dense_twin, run_plain, run_sparse, sparse_linear, tokens

WEIGHT = torch.linspace(0.5, 1.5, 8)
BIAS = torch.linspace(-0.3, 0.4, 8)
SPARSE = torch.eye(5).to_sparse()  # which has no storage


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, (8,), WEIGHT.to(x.dtype), BIAS.to(x.dtype))


def attention(x: Tensor) -> Tensor:
    # as a ViT does it, so that the kernel's output has the layout of the tokens
    qkv = torch.cat([x, 2 * x, x + 1], -1).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)


def edited_in_place(x: Tensor) -> Tensor:
    y = F.gelu(x)
    with torch.no_grad():
        y.mul_(2.0)  # autograd does not see it
    return y


PRODUCERS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "gelu": (F.gelu, "gelu"),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), "gelu"),
    "gelu_of_a_slice": (lambda x: F.gelu(torch.cat([x, x], -1)[..., 4:12]), "gelu"),
    "gelu_dropout_p0": (lambda x: F.dropout(F.gelu(x), 0.0), "gelu"),
    "gelu_view": (lambda x: F.gelu(x).view(-1, 8), "gelu"),
    "gelu_of_3d_reshaped_to_4d": (lambda x: F.gelu(x).reshape(5, 2, 2, 8), "gelu"),
    "gelu_transpose": (lambda x: F.gelu(x).transpose(0, 1), "gelu"),
    "gelu_transpose_of_negative_dims": (lambda x: F.gelu(x).transpose(-3, -2), "gelu"),
    "gelu_permute_view": (lambda x: F.gelu(x).permute(1, 0, 2).unflatten(-1, (2, 4)).flatten(2),
                          "gelu"),
    "gelu_permute_negative": (lambda x: F.gelu(x).permute(-2, 0, -1), "gelu"),
    "layer_norm": (layer_norm, "layer_norm"),
    "layer_norm_plain": (lambda x: F.layer_norm(x, (8,)), "layer_norm"),
    "layer_norm_two_dims": (lambda x: F.layer_norm(x, (5, 8)), "layer_norm"),
    "layer_norm_of_transposed": (lambda x: layer_norm(x.transpose(0, 1)), "layer_norm"),
    "layer_norm_permuted": (lambda x: layer_norm(x).permute(1, 0, 2), "layer_norm"),
    "attention": (attention, "tensor"),
    "relu": (F.relu, "tensor"),
    "softmax": (lambda x: x.softmax(-1), "tensor"),
    "sigmoid_viewed": (lambda x: x.sigmoid().view(-1, 8), "tensor"),
    "gelu_dropout": (lambda x: F.dropout(F.gelu(x), 0.5), "columns"),
    "gelu_drop_path": (lambda x: F.gelu(x) * torch.empty(x.shape[0], 1, 1).bernoulli_(0.5),
                       "columns"),
    "gelu_clone": (lambda x: F.gelu(x).transpose(0, 1).contiguous(), "columns"),
    "gelu_edited_in_place": (edited_in_place, "columns"),
    "gelu_added_in_place": (lambda x: F.gelu(x).add_(1.0), "columns"),
    "half_of_a_gelu": (lambda x: F.gelu(torch.cat([x, x]))[:4], "columns"),
    "product_with_sparse": (lambda x: SPARSE.to(x.dtype) @ x[0], "columns"),
    "residual": (lambda x: x + F.gelu(x), "columns"),
    "leaf": (lambda x: x, "columns"),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCERS)
def test_gradients_are_those_of_the_plain_layer(name: str) -> None:
    make, kind = PRODUCERS[name]
    kinds = []

    def net(x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        y = layer(make(x))
        if isinstance(layer, SparseDeltaLinear):
            kinds.append(y.grad_fn.saved_input.kind)  # type: ignore[union-attr]
        return y

    check_gradients(net, sparse_linear(), tokens(4, 5, 8))
    assert kinds == [kind]


@pytest.mark.parametrize("shape", [(8,), (1, 8), (0, 8), (2, 3, 2, 8)], ids=str)
def test_shapes_of_the_input(shape: tuple[int, ...]) -> None:
    check_gradients(lambda x, layer: layer(F.gelu(x)), sparse_linear(), tokens(*shape))


@pytest.mark.parametrize("name", ["gelu", "layer_norm", "leaf"])
def test_producer_whose_input_needs_no_gradient_has_no_node(name: str) -> None:
    make, _ = PRODUCERS[name]
    layer = sparse_linear()
    check_gradients(lambda x, layer: layer(make(x)), layer, tokens(4, 5, 8, grad=False))
    kind = layer(make(tokens(4, 5, 8, grad=False))).grad_fn.saved_input.kind
    assert kind == "columns"


def test_all_columns_are_kept_as_the_input_itself() -> None:
    layer = SparseDeltaLinear(nn.Linear(4, 2), torch.arange(8))
    assert layer(tokens(3, 4)).grad_fn.saved_input.kind == "tensor"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["gelu", "layer_norm", "attention", "leaf"])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    make, _ = PRODUCERS[name]
    net = lambda x, layer: layer(make(x))  # noqa: E731
    layer, x = sparse_linear(dtype), tokens(4, 5, 8, dtype=dtype)
    if dtype != torch.float64:
        check_gradients(net, layer, x)
        return
    actual, truth = run_sparse(net, layer, x), run_plain(net, layer, x)
    torch.testing.assert_close(actual.x, truth.x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual.weight.double(), truth.weight, rtol=2**-23, atol=0)


@pytest.mark.parametrize("backward_inside", [False, True], ids=["backward_outside", "inside"])
@pytest.mark.parametrize("name", ["gelu", "layer_norm", "attention", "relu", "leaf"])
def test_autocast(name: str, backward_inside: bool) -> None:
    make, _ = PRODUCERS[name]

    def net(x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(make(x))

    layer = sparse_linear()
    if not backward_inside:
        check_gradients(net, layer, tokens(4, 5, 8))
        return
    expected = run_sparse(net, layer, tokens(4, 5, 8))
    with torch.autocast("cpu", torch.bfloat16):
        actual = run_sparse(net, layer, tokens(4, 5, 8))
    assert actual.output.dtype == torch.bfloat16
    for name in ("x", "weight", "bias"):
        assert torch.equal(getattr(actual, name), getattr(expected, name))


def test_autocast_saves_no_second_copy_of_the_weight() -> None:
    layer = sparse_linear()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(F.gelu(tokens(4, 5, 8)))
    saved = [t.untyped_storage().data_ptr() for t in y.grad_fn.saved_tensors if t is not None]
    assert layer.weight.untyped_storage().data_ptr() in saved


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("name", ["gelu", "layer_norm", "leaf"])
def test_checkpoint_recomputes_once_and_only_in_the_backward(name: str, reentrant: bool) -> None:
    make, _ = PRODUCERS[name]
    runs = []

    def net(x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        def part(x: Tensor) -> Tensor:
            runs.append(name)
            return layer(make(x * 1.5))

        return checkpoint(part, x, use_reentrant=reentrant)

    check_gradients(net, sparse_linear(), tokens(4, 5, 8))
    assert len(runs) == 3 * 2  # sparse, plain and float64, forward and recomputation each


def test_layer_outside_of_the_checkpoint_that_holds_its_producer() -> None:
    runs = []

    def producer(x: Tensor) -> Tensor:
        runs.append("gelu")
        return F.gelu(x * 1.5)

    def net(x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        y = layer(checkpoint(producer, x, use_reentrant=False))
        runs.append("forward is over")
        return y

    check_gradients(net, sparse_linear(), tokens(4, 5, 8))
    assert runs == ["gelu", "forward is over", "gelu"] * 3


@pytest.mark.parametrize("where", ["producer", "layer", "both"])
def test_saved_tensor_hooks_are_not_run_in_the_forward(where: str) -> None:
    unpacked = []

    def unpack(t: Tensor) -> Tensor:
        unpacked.append(t)
        return t

    def hooks(active: bool) -> contextlib.AbstractContextManager[None]:
        return saved_tensors_hooks(lambda t: t.clone(), unpack) if active else _nothing()

    def net(x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        unpacked.clear()
        with hooks(where != "layer"):
            h = F.gelu(x * 1.5)
        with hooks(where != "producer"):
            y = layer(h)
        assert not unpacked
        return y

    check_gradients(net, sparse_linear(), tokens(4, 5, 8))
    assert unpacked


@contextlib.contextmanager
def _nothing():  # type: ignore[no-untyped-def]
    yield


def test_where_torch_does_not_tell_of_hooks_nothing_is_rebuilt(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(graph_nodes, "hook_of", attrgetter("no_such_attribute"))
    layer = sparse_linear()
    check_gradients(lambda x, layer: layer(F.gelu(x)), layer, tokens(4, 5, 8))
    assert layer(F.gelu(tokens(4, 8))).grad_fn.saved_input.kind == "columns"
    assert layer(F.relu(tokens(4, 8))).grad_fn.saved_input.kind == "columns"


def test_save_on_cpu() -> None:
    def net(x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        with save_on_cpu():
            return layer(layer_norm(F.gelu(x)).repeat(1, 1, 1))

    check_gradients(net, sparse_linear(), tokens(4, 5, 8))


def test_layer_used_twice() -> None:
    def net(x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        first = layer(F.gelu(x))
        return layer(layer_norm(torch.cat([first, first[..., :2]], -1)))

    check_gradients(net, sparse_linear(), tokens(4, 5, 8))


def test_two_layers_share_their_input() -> None:
    def net(x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        h = layer_norm(x)
        return layer(h) * (other if h.dtype == torch.float32 else dense_twin(other, h.dtype))(h)

    other = sparse_linear(seed=5)
    check_gradients(net, sparse_linear(), tokens(4, 5, 8))
    assert other.delta.grad is not None


def test_in_place_activation_after_the_layer() -> None:
    check_gradients(lambda x, layer: layer(F.gelu(x)).relu_(), sparse_linear(), tokens(4, 5, 8))


def test_input_edited_after_the_layer_is_seen_or_harmless() -> None:
    layer = sparse_linear()
    expected = run_sparse(lambda x, layer: layer(F.gelu(x)), layer, tokens(4, 5, 8)).weight

    def edited(x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        h = F.gelu(x)
        y = layer(h)
        with torch.no_grad():
            h.zero_()  # what is rebuilt comes from x, not from h
        return y

    assert torch.equal(run_sparse(edited, layer, tokens(4, 5, 8)).weight, expected)

    def producer_edited(x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        h = x * 1.0
        y = layer(F.gelu(h))
        with torch.no_grad():
            h.zero_()
        return y

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run_sparse(producer_edited, layer, tokens(4, 5, 8))


def test_forward_over_a_graph_that_is_gone_still_runs() -> None:
    layer = sparse_linear()
    h = F.gelu(tokens(4, 8))
    h.sum().backward()  # frees what the GELU saved
    y = layer(h)
    assert torch.equal(y, F.linear(h, layer.weight, layer.bias))
    torch.autograd.grad(y.sum(), layer.delta)


def test_backward_after_another_that_freed_the_producer_is_torchs_error() -> None:
    layer = sparse_linear()
    h = F.gelu(tokens(4, 8))
    y = layer(h)
    h.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


def test_what_a_producer_keeps_is_remembered_by_what_it_is() -> None:
    layer = sparse_linear()
    kinds = []
    for make in (F.relu, F.gelu, lambda x: F.relu(x).clone(), F.relu, attention, attention):
        kinds.append(layer(make(tokens(4, 5, 8))).grad_fn.saved_input.kind)
    assert kinds == ["tensor", "gelu", "columns", "tensor", "tensor", "tensor"]


def test_what_a_producer_packed_away_is_not_taken_for_kept() -> None:
    layer = sparse_linear()
    assert layer(F.relu(tokens(4, 8))).grad_fn.saved_input.kind == "tensor"
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        h = F.relu(tokens(4, 8))
    assert layer(h).grad_fn.saved_input.kind == "columns"


def test_retain_graph_and_accumulation() -> None:
    layer = sparse_linear()
    y = layer(F.gelu(tokens(4, 5, 8))).square().sum()
    y.backward(retain_graph=True)
    once = layer.delta.grad.clone()
    y.backward()
    torch.testing.assert_close(layer.delta.grad, 2 * once, rtol=0, atol=0)
    x = tokens(4, 5, 8)
    (alone,) = torch.autograd.grad(layer(F.gelu(x)).square().sum(), layer.delta)
    torch.testing.assert_close(alone, once, rtol=0, atol=0)


def test_hooks_on_the_layer_see_input_output_and_gradients() -> None:
    layer, seen = sparse_linear(), []
    layer.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    layer.register_forward_hook(lambda module, args, y: 2 * y)
    layer.register_full_backward_hook(lambda module, gx, gy: seen.append("backward"))
    x = tokens(4, 5, 8)
    y = layer(F.gelu(x))
    torch.testing.assert_close(y, 2 * F.linear(F.gelu(x), layer.weight, layer.bias))
    y.sum().backward()
    assert seen == ["pre", "backward"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_saved(mode: Callable[[], object]) -> None:
    layer, x = sparse_linear(), tokens(4, 5, 8)
    with mode():  # type: ignore[attr-defined]
        y = layer(F.gelu(x))
    assert y.grad_fn is None
    assert torch.equal(y, F.linear(F.gelu(x), layer.weight, layer.bias))


def test_only_what_needs_a_gradient_is_made() -> None:
    layer = sparse_linear()
    layer.delta.requires_grad_(False)
    y = layer(F.gelu(tokens(4, 5, 8)))
    assert y.grad_fn.saved_input is None
    y.sum().backward()
    assert layer.delta.grad is None
    assert layer.bias_delta.grad is not None
    layer.bias_delta.requires_grad_(False)
    assert type(layer(tokens(4, 8, grad=False)).grad_fn) is type(None)


def test_second_derivatives_are_refused() -> None:
    layer = sparse_linear()
    x = tokens(4, 8)
    (gx,) = torch.autograd.grad(layer(F.gelu(x)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gx.square().sum().backward()


def test_index_of_every_entry_is_the_dense_gradient() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 6)
    layer = SparseDeltaLinear(linear, torch.arange(48))
    x = tokens(4, 5, 8)
    layer(F.gelu(x)).square().sum().backward()
    weight = linear.weight.detach().clone().requires_grad_()
    F.linear(F.gelu(x), weight, linear.bias).square().sum().backward()
    torch.testing.assert_close(layer.delta.grad, weight.grad.flatten())
    assert len(INDEX) < 48
