"""The weight holds base + delta whenever a forward runs, whoever has changed the delta."""

from __future__ import annotations

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from spt_kernels.layers import (
    SparseDelta,
    SparseDeltaConv2d,
    SparseDeltaLinear,
    delta_of,
    restore_deltas,
    write_deltas,
)

from .truth import INDEX, sparse_linear, tokens


def of_weight(layer: SparseDeltaLinear) -> SparseDelta:
    return layer.sparse_deltas()["weight"]


def holds(layer: SparseDeltaLinear) -> bool:
    return torch.equal(layer.weight.view(-1)[INDEX], layer.original + layer.delta)


def test_memory_that_comes_and_goes_is_told_apart() -> None:
    layer = sparse_linear()
    for _ in range(30):
        for _ in range(2):  # the second may come to lie where the one before the last was
            layer.delta.data = torch.randn(len(INDEX))
        layer(tokens(3, 8))
        assert holds(layer)


def test_parts_of_one_tensor_are_told_apart() -> None:
    layer, population = sparse_linear(), torch.randn(3, len(INDEX))
    for values in population:
        layer.delta.data = values
        layer(tokens(3, 8))
        assert holds(layer)


class WritesThroughData(Optimizer):
    """Bumps no version, as many third-party optimizers do."""

    def __init__(self, params) -> None:  # type: ignore[no-untyped-def]
        super().__init__(params, {})

    def step(self, closure=None):  # type: ignore[no-untyped-def]
        for group in self.param_groups:
            for parameter in group["params"]:
                version = parameter._version
                parameter.data.add_(0.5)
                assert parameter._version == version


class MarksWritten(WritesThroughData):
    """Writes the weight itself, rounded to the other side, as stochastic rounding does."""

    def step(self, closure=None):  # type: ignore[no-untyped-def]
        super().step()
        for parameter in self.param_groups[0]["params"]:
            delta = delta_of(parameter)
            delta.target.view(-1)[delta.index.long()] = on_the_other_side(delta)
            delta.mark_written()


def on_the_other_side(delta: SparseDelta) -> Tensor:
    """Base + delta in 16 bits, rounded to the number beyond it that is not the nearest."""
    truth = delta.original.float() + delta.delta.detach()
    nearest = truth.to(delta.target.dtype)
    beyond = torch.where(nearest.float() > truth, -torch.inf, torch.inf).to(nearest.dtype)
    return torch.nextafter(nearest, beyond)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
        WritesThroughData,
    ],
    ids=["sgd", "adamw", "adamw_for_loop", "data"],
)
def test_any_optimizer_is_followed_by_a_write(make) -> None:  # type: ignore[no-untyped-def]
    layer = sparse_linear()
    optimizer = make([layer.delta, layer.bias_delta])
    layer(tokens(3, 8)).sum().backward()
    before = layer.delta.detach().clone()
    optimizer.step()
    assert not torch.equal(layer.delta, before)
    assert holds(layer)
    assert torch.equal(layer.bias[[1, 4]], layer.bias_original + layer.bias_delta)


def test_what_an_optimizer_has_written_itself_stays() -> None:
    layer, x = sparse_linear(torch.bfloat16), tokens(3, 8, dtype=torch.bfloat16)
    optimizer = MarksWritten([layer.delta])
    layer(x).sum().backward()
    optimizer.step()
    for _ in range(3):
        layer(x)
        assert torch.equal(layer.weight.view(-1)[INDEX], on_the_other_side(of_weight(layer)))
    WritesThroughData([layer.delta]).step()
    expected = (layer.original.float() + layer.delta).bfloat16()
    assert torch.equal(layer.weight.view(-1)[INDEX], expected)


@pytest.mark.parametrize(
    "edit",
    [
        lambda layer: layer.delta.add_(1.0),
        lambda layer: layer.delta.copy_(torch.ones(len(INDEX))),
        lambda layer: setattr(layer.delta, "data", torch.ones(len(INDEX))),
        lambda layer: layer.load_state_dict({"delta": torch.ones(len(INDEX))}, strict=False),
        lambda layer: nn.init.constant_(layer.delta, 3.0),
    ],
    ids=["in_place", "copy", "data", "load_state_dict", "init"],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_next_forward_sees_an_edit(edit, mode) -> None:  # type: ignore[no-untyped-def]
    layer = sparse_linear()
    layer(tokens(3, 8))
    with torch.no_grad():
        edit(layer)
    with mode():
        layer(tokens(3, 8))
    assert holds(layer)


def test_a_fresh_forward_does_not_write() -> None:
    layer = sparse_linear()
    version = layer.weight._version
    for _ in range(3):
        layer(tokens(3, 8))
    assert layer.weight._version == version


def copied_through_data(values: Tensor, layer: SparseDeltaLinear) -> None:
    """As averages are copied to a model by torch_ema, diffusers and Lightning."""
    version = layer.delta._version
    layer.delta.data.copy_(values)
    assert layer.delta._version == version


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("switch_first", [True, False])
def test_an_average_that_is_copied_where_the_model_is_switched(
    switch_first: bool, dtype: torch.dtype
) -> None:
    layer, x = sparse_linear(dtype), tokens(3, 8, dtype=dtype)
    own = layer.delta.detach().clone()
    layer(x)
    for values, mode in ((own + 1, False), (own, True), (own - 1, False)):
        if switch_first:
            layer.train(mode)
        copied_through_data(values, layer)
        if not switch_first:
            layer.train(mode)
        layer(x)
        expected = (layer.original.float() + values).to(dtype)
        assert torch.equal(layer.weight.view(-1)[INDEX], expected)


def test_a_switch_does_not_write_what_is_there() -> None:
    layer = sparse_linear(torch.bfloat16)
    with torch.no_grad():
        layer.weight.view(-1)[INDEX] = on_the_other_side(of_weight(layer))
    of_weight(layer).mark_written()
    held, version = layer.weight.detach().clone(), layer.weight._version
    for mode in (False, True, True, False):
        layer.train(mode)(tokens(2, 8, dtype=torch.bfloat16))
    assert torch.equal(layer.weight, held)
    assert layer.weight._version == version


def test_what_is_validated_twice() -> None:
    """Raw, then averaged, without training between."""
    layer, x = sparse_linear(), tokens(3, 8)
    layer.eval()(x)
    copied_through_data(layer.delta.detach() + 1, layer)
    layer.eval()(x)
    assert holds(layer)


def by_hand(layer: SparseDeltaLinear) -> None:
    layer.delta.data -= 0.1 * layer.delta.grad
    layer.zero_grad()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("n_forwards", [1, 2, 3, 5])
def test_a_loop_that_writes_through_data_is_refused(n_forwards: int, checkpointed: bool) -> None:
    layer, x = sparse_linear(), tokens(3, 8)

    def one_step() -> None:
        for _ in range(n_forwards):
            y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
            y.square().sum().backward()

    one_step()
    by_hand(layer)
    with pytest.raises(RuntimeError, match=r"SparseDeltaLinear.weight no longer holds what is tr"):
        one_step()
    write_deltas(layer.sparse_deltas().values())
    layer(x)
    assert holds(layer)


def test_a_loop_over_a_layer_that_is_called_three_times_is_refused() -> None:
    layer, x = sparse_linear(), tokens(3, 8)
    sum(layer(x).square().sum() for _ in range(3)).backward()  # type: ignore[union-attr]
    by_hand(layer)
    with pytest.raises(RuntimeError, match="no longer holds what is trained of it"):
        layer(x)


def test_a_teacher_that_is_averaged_through_data_is_followed() -> None:
    student, x = sparse_linear(), tokens(3, 8)
    teacher = copy.deepcopy(student).eval()
    for _ in range(8):
        with torch.no_grad():
            for _ in range(2):
                teacher(x)
                held, truth = teacher.weight.view(-1)[INDEX], teacher.original + teacher.delta
                torch.testing.assert_close(held, truth)  # the weights are averaged as well
        student.delta.data.add_(1.0)
        write_deltas(student.sparse_deltas().values())
        for own, other in zip(teacher.parameters(), student.parameters(), strict=True):
            own.data.mul_(0.5).add_(other.data, alpha=0.5)


def test_tensors_of_one_call_are_left_alone() -> None:
    layer, x = sparse_linear(), tokens(3, 8)
    own, other = layer.weight.detach().clone(), torch.zeros(6, 8)
    for mode in (torch.no_grad(), torch.enable_grad()):
        for _ in range(3):
            layer.eval()
            with mode:
                y = functional_call(layer, {"weight": other}, (x,))
            assert torch.equal(y, layer.bias.expand(3, 6))
            assert not other.any()
    copied_through_data(layer.delta.detach() + 1, layer)
    layer(x)
    assert holds(layer)
    assert not torch.equal(layer.weight, own)


def test_inference_looks_a_few_times() -> None:
    layer = sparse_linear()
    with torch.no_grad():
        for _ in range(6):
            layer(tokens(3, 8))
    assert "_spt_doubted" not in vars(layer)


def test_a_switch_within_a_compiled_function_breaks_no_graph() -> None:
    layer, x = sparse_linear(), tokens(3, 8)

    def evaluated(x: Tensor) -> Tensor:
        layer.eval()
        return layer(x)

    found = torch.compile(evaluated, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(found, layer(x))


def test_threads_settle_a_doubt_side_by_side() -> None:
    layer, x = sparse_linear(), tokens(3, 8)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(40):
                layer.eval()
                calls = [pool.submit(layer, x) for _ in range(4)]
                assert len({float(call.result().sum().detach()) for call in calls}) == 1
    finally:
        sys.setswitchinterval(before)


def test_compiled_forwards_compute_with_what_was_changed_before_the_switch() -> None:
    layer, x = sparse_linear(), tokens(3, 8)
    compiled = torch.compile(layer, backend="eager")
    compiled(x)
    with torch.no_grad():
        layer.delta.add_(1.0)
    compiled.eval()
    assert holds(layer)
    torch.testing.assert_close(compiled(x), layer(x))


def test_a_switch_is_remembered_where_nothing_can_be_read() -> None:
    layer = sparse_linear()
    layer(tokens(2, 8))
    copied_through_data(layer.delta.detach() + 1, layer.eval())
    torch.vmap(layer)(tokens(2, 8))
    layer(tokens(2, 8))
    assert holds(layer)


def test_an_edit_between_forward_and_backward_is_refused_as_for_a_plain_layer() -> None:
    layer = sparse_linear()
    y = layer(tokens(3, 8))
    torch.optim.SGD([layer.delta], lr=0.1).step()
    layer.delta.data.add_(1.0)
    layer.sparse_deltas()["weight"].write()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_restore_gives_the_base_weights_back_bit_for_bit() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 6).bfloat16()
    linear.weight.data.view(-1)[0] = -0.0
    base = copy.deepcopy(linear.weight)
    layer = SparseDeltaLinear(linear, INDEX)
    with torch.no_grad():
        layer.delta.normal_()
    layer(tokens(2, 8, dtype=torch.bfloat16))
    assert not torch.equal(layer.weight, base)
    restore_deltas(layer.sparse_deltas().values())
    assert torch.equal(layer.weight.view(torch.int16), base.view(torch.int16))
    write_deltas(layer.sparse_deltas().values())
    expected = (layer.original.double() + layer.delta.double()).bfloat16()
    assert torch.equal(layer.weight.view(-1)[INDEX], expected)


def test_delta_of_knows_its_own() -> None:
    layer = sparse_linear()
    found = delta_of(layer.bias_delta)
    assert found.target is layer.bias
    assert found.delta is layer.bias_delta
    assert found.is_fresh
    assert delta_of(layer.weight) is None
    assert delta_of(nn.Parameter(torch.ones(2))) is None


def test_a_shallow_copy_does_not_take_the_delta_away() -> None:
    layer = sparse_linear()
    twin = copy.copy(layer)
    assert twin.delta is layer.delta
    del twin
    assert delta_of(layer.delta).target is layer.weight


def test_the_tag_does_not_keep_the_layer_alive() -> None:
    layer = sparse_linear()
    delta = layer.delta
    del layer
    assert delta_of(delta) is None


def test_after_a_write_into_data_that_no_optimizer_made_write_is_enough() -> None:
    layer = sparse_linear()
    layer.delta.data.add_(0.5)
    layer.sparse_deltas()["weight"].write()
    layer(tokens(3, 8))
    assert holds(layer)


def test_a_layer_that_gets_no_gradient_this_time_is_no_error() -> None:
    layer, other = sparse_linear(), sparse_linear()
    optimizer = torch.optim.SGD([layer.delta, other.delta], lr=0.1)
    other(tokens(3, 8))
    layer(tokens(3, 8)).sum().backward()
    optimizer.step()
    assert holds(layer)


@pytest.mark.parametrize("lost", [torch.nan, torch.inf, 1e6])
def test_what_is_not_a_number_is_held_as_such(lost: float) -> None:
    """A loss that is not finite is told of by whoever looks at it, and not by the layers."""
    layer, x = sparse_linear(torch.float16), tokens(3, 8, dtype=torch.float16)
    for _ in range(3):
        layer(x)
        with torch.no_grad():
            layer.delta[2] = lost
    assert not layer.weight.isfinite().all()


def test_another_parameter_is_refused_where_the_tuned_one_is() -> None:
    layer, x = sparse_linear(), tokens(3, 8)
    expected = layer(x)
    for other in (torch.full((6, 8), 7.0), torch.zeros(3, 8)):
        with pytest.raises(ValueError, match=r"weight is tuned and cannot be another parameter"):
            layer.weight = nn.Parameter(other, requires_grad=False)
    assert torch.equal(layer(x), expected)
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    assert torch.equal(layer(x), expected)
    layer.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(layer(x), expected)
    conv = SparseDeltaConv2d(nn.Conv2d(2, 4, 1), torch.tensor([1, 3]))
    norm = nn.BatchNorm2d(4).eval()
    norm.running_var.fill_(4.0)
    with pytest.raises(ValueError, match=r"weight is tuned and cannot be another parameter"):
        fuse_conv_bn_eval(conv.eval(), norm)


def test_positions_of_another_shape_are_never_written() -> None:
    layer = sparse_linear()
    layer._parameters["weight"] = nn.Parameter(torch.zeros(3, 8), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"tuned at positions of \[6, 8\], and is \[3, 8\] now"):
        layer.sparse_deltas()["weight"].write()
