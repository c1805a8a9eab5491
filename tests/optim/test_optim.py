"""SparseAdamW against `torch.optim.AdamW`, on the same values and on dense masked weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spt_kernels.layers import SparseDeltaLinear, delta_of
from spt_kernels.layers.deltas.delta_holder import DeltaHolder
from spt_kernels.optim import SparseAdamW, param_groups

from .runs import Run, scale_of

# Both run the same fp32 arithmetic, up to fused multiply-adds, for tens of steps
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


class Holder(DeltaHolder):
    """A tensor of any shape with a sparse delta, and nothing else."""

    _main_parameter = "weight"

    def __init__(self, weight: Tensor, nnz: int, seed: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(weight.numel(), generator=generator)[:nnz]
        self.hold_delta("weight", chosen.sort().values)
        self.write_stale_deltas()  # as a forward does: a layer that is never called is refused


def holds_base_plus_delta(holder: Holder) -> bool:
    dtype = holder.weight.dtype
    summed = (holder.original.float() + holder.delta.detach().float()).to(dtype)
    return torch.equal(holder.weight.view(-1)[holder.index.long()], summed)


def grads_like(params: list[Tensor], steps: int, seed: int = 1) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(p.shape, generator=generator) for p in params] for _ in range(steps)]


def train(
    optimizer: torch.optim.Optimizer, params: list[Tensor], grads: list[list[Tensor]]
) -> None:
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad.to(param.dtype, copy=True)
        optimizer.step()


def parameters(seed: int = 0) -> list[Tensor]:
    """A head, its bias, a LoRA matrix."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(5, 24), (5,), (8, 24)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


OPTIONS = [
    {},
    {"maximize": True},
    {"weight_decay": 0.0},
    {"betas": (0.0, 0.5), "eps": 1e-3, "lr": 0.1},
    {"lr": torch.tensor(1e-2)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["default", "maximize", "wd0", "betas", "lr"])
def test_follows_torch_adamw(options: dict[str, Any]) -> None:
    ours, theirs = parameters(), parameters()
    grads = grads_like(ours, 30)
    train(SparseAdamW(ours, **options), ours, grads)
    train(torch.optim.AdamW(theirs, **options), theirs, grads)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weight_holds_base_plus_delta_after_each_step(dtype: torch.dtype) -> None:
    base = torch.randn(16, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    sparse, head = Holder(base.clone(), 50), nn.Parameter(torch.ones(3, 4))
    expected = [nn.Parameter(torch.zeros(50)), nn.Parameter(torch.ones(3, 4))]
    optimizer = SparseAdamW([sparse.delta, head], lr=1e-2)
    theirs = torch.optim.AdamW(expected, lr=1e-2)
    trained = torch.zeros(base.numel(), dtype=torch.bool)
    trained[sparse.index.long()] = True

    for step in grads_like(expected, 10):
        train(optimizer, [sparse.delta, head], [step])
        train(theirs, expected, [step])
        weight = sparse.weight.view(-1)
        summed = (sparse.original.float() + sparse.delta.detach()).to(dtype)
        assert torch.equal(weight[trained], summed)
        assert torch.equal(weight[~trained], base.view(-1)[~trained])
        assert delta_of(sparse.delta).is_fresh, "a fresh delta was not marked as written"

    torch.testing.assert_close(sparse.delta, expected[0], **CLOSE)
    torch.testing.assert_close(head, expected[1], **CLOSE)


def test_equals_dense_adamw_with_a_masked_gradient() -> None:
    # an ordinary dense training loop in which only the masked entries get a gradient, without decay
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(32, 24, generator=generator), torch.randn(32, 16, generator=generator)
    base = torch.randn(16, 24, generator=generator)
    sparse = Holder(base.clone(), 60)
    index = sparse.index.long()
    mask = torch.zeros(base.numel()).index_fill_(0, index, 1.0).view_as(base)
    dense = nn.Parameter(base.clone())
    dense_optimizer = torch.optim.AdamW([dense], lr=1e-2, weight_decay=0.0)
    optimizer = SparseAdamW([sparse.delta], lr=1e-2, weight_decay=0.0)

    for _ in range(25):
        loss = F.mse_loss(F.linear(x, dense), y)
        (gradient,) = torch.autograd.grad(loss, dense)
        dense.grad = gradient * mask
        dense_optimizer.step()

        weight = sparse.weight.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.mse_loss(F.linear(x, weight), y), weight)
        sparse.delta.grad = gradient.view(-1)[index]
        optimizer.step()

    torch.testing.assert_close(sparse.weight, dense.detach(), rtol=1e-4, atol=1e-5)
    assert float((sparse.weight - base).abs().max()) > 0.1, "nothing was trained"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_tuned_layers_train_as_with_torch_adamw(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(8, 12, generator=generator).to(dtype)
    found = []
    for kind in (SparseAdamW, torch.optim.AdamW):
        torch.manual_seed(8)
        model = nn.Sequential(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 3)).to(dtype)
        index = torch.arange(0, 120, 7)
        model[0] = layer = SparseDeltaLinear(model[0], index, bias_index=torch.tensor([2, 5]))
        optimizer = kind(param_groups(model), lr=1e-2)
        for _ in range(12):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        wide = layer.original if dtype == torch.float64 else layer.original.float()
        assert torch.equal(layer.weight.view(-1)[index], (wide + layer.delta.detach()).to(dtype))
        found.append([layer.delta, layer.bias_delta, layer.weight, layer.bias, model[2].weight])
    # in bf16 a rounding that falls the other way moves the next gradients by a place
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else CLOSE
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **close)
    assert float(found[0][0].detach().abs().min()) > 1e-3, "nothing was trained"


def test_what_a_step_does_not_touch_keeps_its_random_rounding() -> None:
    layer = SparseDeltaLinear(nn.Linear(64, 64, dtype=torch.bfloat16), torch.arange(4096))
    head = nn.Parameter(torch.ones(3))
    optimizer = SparseAdamW([layer.delta, head], lr=1e-3, stochastic_rounding=True)
    layer(torch.ones(2, 64, dtype=torch.bfloat16)).float().sum().backward()
    optimizer.step()
    rounded = layer.weight.detach().clone()
    assert not torch.equal(
        rounded.view(-1), (layer.original.float() + layer.delta.detach()).bfloat16()
    )

    optimizer.zero_grad()
    head.grad = torch.ones(3)
    optimizer.step()  # the layer has no gradient
    assert torch.equal(layer.weight, rounded)

    layer.delta.grad = torch.full((4096,), float("inf"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()  # the gradients overflowed
    assert torch.equal(layer.weight, rounded)


def test_stochastic_rounding_keeps_small_updates_on_average() -> None:
    # each step moves the delta by 1e-3, an eighth of the gap between bf16 neighbours of 1
    targets = {}
    for stochastic in (False, True):
        sparse = Holder(torch.ones(4000, dtype=torch.bfloat16), 4000)
        optimizer = SparseAdamW(
            [sparse.delta], lr=1e-3, weight_decay=0.0, stochastic_rounding=stochastic
        )
        train(optimizer, [sparse.delta], [[torch.full((4000,), -1.0)]])
        targets[stochastic] = sparse.weight.double().mean()
    assert float(targets[False]) == 1.0
    # the mean of 4,000 draws, each of deviation 2^-7 √(0.128 · 0.872): five deviations
    assert abs(float(targets[True]) - 1.001) < 5 * 2**-7 * 0.334 / 4000**0.5


def test_resumed_run_is_the_uninterrupted_run() -> None:
    def fresh() -> tuple[Holder, SparseAdamW]:
        sparse = Holder(torch.ones(10, 10, dtype=torch.bfloat16), 30)
        return sparse, SparseAdamW([sparse.delta], lr=1e-2, stochastic_rounding=True, seed=5)

    whole, optimizer = fresh()
    grads = grads_like([whole.delta], 8)
    train(optimizer, [whole.delta], grads)

    first, optimizer = fresh()
    train(optimizer, [first.delta], grads[:4])
    saved = pickle.loads(pickle.dumps((optimizer.state_dict(), first.delta.detach())))
    second, optimizer = fresh()
    with torch.no_grad():
        second.delta.copy_(saved[1])
    optimizer.load_state_dict(saved[0])
    train(optimizer, [second.delta], grads[4:])

    assert torch.equal(whole.delta, second.delta)
    assert torch.equal(whole.weight, second.weight)


@pytest.mark.parametrize("ours_first", [True, False], ids=["from-ours", "to-ours"])
def test_state_dicts_move_between_torch_and_here(ours_first: bool) -> None:
    kinds = [SparseAdamW, torch.optim.AdamW][:: 1 if ours_first else -1]
    params, expected = parameters(), parameters()
    grads = grads_like(params, 10)
    train(torch.optim.AdamW(expected), expected, grads)

    before = kinds[0](params)
    train(before, params, grads[:5])
    after = kinds[1](params)
    after.load_state_dict(before.state_dict())
    train(after, params, grads[5:])

    for one, other in zip(params, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    assert set(after.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}
    assert after.state[params[0]]["exp_avg"].shape == params[0].shape


def test_own_options_survive_a_state_dict_of_torch() -> None:
    params = parameters()
    optimizer = SparseAdamW(params, stochastic_rounding=True, seed=9)
    optimizer.load_state_dict(torch.optim.AdamW(params).state_dict())
    assert optimizer.param_groups[0]["stochastic_rounding"] is True
    assert optimizer.param_groups[0]["seed"] == 9


def test_amsgrad_is_refused_and_nothing_is_changed() -> None:
    params = parameters()
    optimizer, theirs = SparseAdamW(params, lr=1e-2), torch.optim.AdamW(params, lr=5, amsgrad=True)
    train(optimizer, params, grads_like(params, 1))
    with pytest.raises(ValueError, match="amsgrad: expected False"):
        optimizer.load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match="amsgrad: expected False"):
        optimizer.add_param_group({"params": parameters(), "amsgrad": True})
    (group,) = optimizer.param_groups
    assert group["lr"] == 1e-2
    assert all(optimizer.state[param]["step"] == 1 for param in params)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_optimizer_can_be_copied_with_its_model(way: str) -> None:
    params = parameters()
    optimizer = SparseAdamW(params, lr=1e-2)
    grads = grads_like(params, 6)
    train(optimizer, params, grads[:3])
    pair = (params, optimizer)
    copies = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    train(optimizer, params, grads[3:])
    train(copies[1], copies[0], grads[3:])
    for one, other in zip(params, copies[0], strict=True):
        assert torch.equal(one, other)


def test_learning_rate_schedules_and_groups() -> None:
    results = []
    for kind in (SparseAdamW, torch.optim.AdamW):
        params = parameters()
        optimizer = kind([{"params": params[:1], "lr": 0.05, "name": "head"}], lr=1e-2)
        optimizer.add_param_group({"params": params[1:], "weight_decay": 0.3})
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
        for step in grads_like(params, 12):
            train(optimizer, params, [step])
            schedule.step()
        results.append(params)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_accumulation_clipping_and_zero_grad() -> None:
    results = []
    for kind in (SparseAdamW, torch.optim.AdamW):
        head, x = nn.Linear(6, 3), torch.arange(24.0).view(4, 6) / 10
        with torch.no_grad():
            for p in head.parameters():
                p.fill_(0.1)
        optimizer = kind(head.parameters(), lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad(set_to_none=True)
            for half in x.split(2):
                head(half).square().sum().backward()
            nn.utils.clip_grad_norm_(head.parameters(), 0.5)
            optimizer.step()
        results.append(list(head.parameters()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_closure_is_evaluated_with_gradients() -> None:
    param = nn.Parameter(torch.tensor([2.0]))
    optimizer = SparseAdamW([param], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 4.0
    assert float(param.detach()) < 2.0


def test_parameters_without_gradient_are_left_alone() -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = SparseAdamW(params)
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    assert torch.equal(params[0], before[0])
    assert not torch.equal(params[1], before[1])
    assert torch.equal(params[2], before[2])
    assert len(optimizer.state) == 1


def test_random_bits_do_not_depend_on_who_else_has_a_gradient() -> None:
    results = []
    for alone in (True, False):
        first = Holder(torch.ones(500, dtype=torch.bfloat16), 500)
        second = Holder(torch.ones(500, dtype=torch.bfloat16), 500)
        optimizer = SparseAdamW([first.delta, second.delta], stochastic_rounding=True)
        if not alone:
            first.delta.grad = torch.ones(500)
        second.delta.grad = torch.ones(500)
        optimizer.step()
        results.append((first.weight, second.weight))
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[1][0], results[1][1]), "two parameters share their bits"


@pytest.mark.parametrize("overflow", [False, True], ids=["finite", "overflow"])
def test_grad_scaler(overflow: bool) -> None:
    results = []
    for kind in (SparseAdamW, torch.optim.AdamW):
        param = nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = kind([param], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(4):
            optimizer.zero_grad()
            factor = float("inf") if overflow and step == 2 else 1.0
            scaler.scale(param.pow(4).sum() * factor).backward()
            if step % 2:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_([param], 1.0)
            scaler.step(optimizer)
            scaler.update()
        assert float(optimizer.state[param]["step"]) == (3.0 if overflow else 4.0)
        results.append(param.detach())
    torch.testing.assert_close(*results, **CLOSE)


def test_overflow_found_on_the_device_skips_the_step() -> None:
    # with capturable, what GradScaler found is never read on the host
    param = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = SparseAdamW([param], lr=0.1, capturable=True)
    for found in (0.0, 1.0, 0.0):
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(found)
        param.grad = torch.full((2,), float("nan") if found else 8.0)
        optimizer.step()
    expected = nn.Parameter(torch.tensor([1.0, -2.0]))
    train(torch.optim.AdamW([expected], lr=0.1), [expected], [[torch.ones(2)]] * 2)
    torch.testing.assert_close(param, expected, **CLOSE)
    assert float(optimizer.state[param]["step"]) == 2.0


def test_gradients_found_finite_on_the_device_round_as_ever() -> None:
    options = {"capturable": True, "stochastic_rounding": True}
    runs = [Run("cpu", torch.bfloat16, torch.float32, **options) for _ in range(2)]
    runs[0].new_grads(8.0)
    scale_of(runs[0], 0.0)
    runs[1].new_grads()
    for run in runs:
        run.optimizer.step()
    for one, other in zip(*(run.state() for run in runs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(3, 4, dtype=torch.bfloat16),
        lambda: torch.ones(3, 4, dtype=torch.float64),
        lambda: torch.ones(4, 3).t(),
        lambda: torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last),
    ],
    ids=["bf16", "fp64", "transposed", "channels-last"],
)
def test_other_parameters_go_through_torch(make: Callable[[], Tensor]) -> None:
    results = []
    for kind in (SparseAdamW, torch.optim.AdamW):
        params = [nn.Parameter(make()), nn.Parameter(torch.ones(7))]
        optimizer = kind(params, lr=1e-2)
        train(optimizer, params, grads_like(params, 5))
        assert optimizer.state[params[0]]["exp_avg"].stride() == params[0].stride()
        results.append(params)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_non_contiguous_gradient() -> None:
    ours, theirs = (nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    for param, kind in ((ours, SparseAdamW), (theirs, torch.optim.AdamW)):
        param.grad = torch.arange(12.0).view(4, 3).t()
        kind([param]).step()
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.gpu
def test_a_step_never_waits_for_the_device() -> None:
    params = [nn.Parameter(p.detach().cuda()) for p in parameters()]
    expected = parameters()
    grads = grads_like(expected, 6)
    optimizer = SparseAdamW(params, lr=1e-2)
    on_device = [[grad.cuda() for grad in step] for step in grads]
    train(optimizer, params, on_device[:1])  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(optimizer, params, on_device[1:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    train(torch.optim.AdamW(expected, lr=1e-2), expected, grads)
    for one, other in zip(params, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, **CLOSE)


@pytest.mark.gpu
def test_captured_steps_are_the_steps() -> None:
    captured = [nn.Parameter(p.detach().cuda()) for p in parameters()]
    expected = parameters()
    optimizer = SparseAdamW(captured, lr=1e-2, capturable=True)
    for param in captured:
        param.grad = torch.ones_like(param)
    optimizer.step()  # compiles, and makes the state
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(4):
        graph.replay()
    train(
        torch.optim.AdamW(expected, lr=1e-2), expected, [[torch.ones_like(p) for p in expected]] * 5
    )
    for one, other in zip(captured, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, **CLOSE)
    assert float(optimizer.state[captured[0]]["step"]) == 5.0
    other_graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capturable=True"), torch.cuda.graph(other_graph):
        SparseAdamW(captured).step()


def test_sparse_gradient_is_refused() -> None:
    embedding = nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="needs dense gradients"):
        SparseAdamW(embedding.parameters()).step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"eps": -1e-8}, "eps must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\)"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"lr": torch.ones(2)}, "lr must be a number or a scalar tensor"),
    ],
    ids=["lr", "eps", "weight-decay", "betas", "one-beta", "lr-vector"],
)
def test_bad_hyperparameters_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseAdamW(parameters(), **options)


def test_a_hyperparameter_that_is_no_number_is_refused() -> None:
    with pytest.raises(TypeError, match="lr must be a number, got '1e-3'"):
        SparseAdamW(parameters(), lr="1e-3")  # type: ignore[arg-type]
