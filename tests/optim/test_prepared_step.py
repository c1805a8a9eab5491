"""A prepared step is the general step, whatever changes between steps."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spt_kernels import native
from spt_kernels.layers import SparseDeltaLinear, untune
from spt_kernels.layers.deltas.sparse_delta import SparseDelta
from spt_kernels.optim import SparseAdamW, param_groups
from spt_kernels.optim.prepared_step import PreparedStep

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_unavailable())


class Model(nn.Sequential):
    """Two sparse layers, one with a trained bias, and a dense head."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        first, second = nn.Linear(40, 30).to(dtype), nn.Linear(30, 20).to(dtype)
        super().__init__(
            SparseDeltaLinear(first, torch.arange(3, 1200, 7), bias_index=torch.arange(0, 30, 4)),
            SparseDeltaLinear(second, torch.arange(1, 600, 5)),
            nn.Linear(20, 3),
        )
        for layer in self.deltas_held():
            layer.write_stale_deltas()  # as a forward does: a layer never called is refused

    def deltas_held(self) -> list[SparseDeltaLinear]:
        return [module for module in self if isinstance(module, SparseDeltaLinear)]


class Run:
    """Some steps of a model on made-up gradients; counts those that went the short way."""

    def __init__(self, dtype: torch.dtype = torch.float32, **options: object) -> None:
        self.model = Model(dtype)
        options = {"lr": 1e-2, "seed": 3, "stochastic_rounding": True} | options
        self.optimizer = SparseAdamW(param_groups(self.model), **options)  # type: ignore[arg-type]
        self.generator = torch.Generator().manual_seed(1)
        self.short = 0

    def steps(self, n: int, skipped: tuple[str, ...] = ()) -> None:
        for _ in range(n):
            self.optimizer.zero_grad(set_to_none=True)
            left_out = {id(dict(self.model.named_parameters())[name]) for name in skipped}
            for group in self.optimizer.param_groups:
                for param in group["params"]:
                    grad = torch.randn(param.shape, generator=self.generator)
                    param.grad = None if id(param) in left_out else grad
            self.step()

    def step(self) -> None:
        prepared = self.optimizer._prepared
        taken = []
        if prepared is not None:
            take = prepared.take
            prepared.take = lambda *args: taken.append(take(*args)) or taken[-1]  # type: ignore
        try:
            self.optimizer.step()
        finally:
            self.short += sum(taken)

    def state(self) -> dict[str, Tensor]:
        found = {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}
        for n, param in enumerate(p for g in self.optimizer.param_groups for p in g["params"]):
            for part, value in self.optimizer.state.get(param, {}).items():
                found[f"{n}.{part}"] = value.clone()
        return found


@pytest.fixture
def general_only() -> Iterator[Callable[[], None]]:
    """Keeps every step from being prepared, once it is called."""
    with pytest.MonkeyPatch.context() as patch:
        yield lambda: patch.setattr(PreparedStep, "of", lambda *args: None)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def first(run: Run) -> SparseDeltaLinear:
    return run.model.deltas_held()[0]


def new_weight(run: Run) -> None:
    layer = first(run)
    weight, index = layer.weight.detach() + 1, layer.index.long()
    weight.view(-1)[index] = layer.weight.detach().view(-1)[index]
    layer.weight = nn.Parameter(weight, requires_grad=False)


def new_positions(run: Run) -> None:
    layer = first(run)
    layer.index = layer.index + 1
    layer.original = layer.weight.detach().view(-1)[layer.index.long()]


def positions_in_place(run: Run) -> None:
    first(run).index.add_(1)


def load_state(run: Run) -> None:
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))


def double_state(run: Run) -> None:
    state = run.optimizer.state[first(run).delta]
    state["exp_avg"] = state["exp_avg"] * 2


def double_state_data(run: Run) -> None:
    for state in run.optimizer.state.values():
        state["exp_avg_sq"].data = state["exp_avg_sq"].data * 2


def count_on(run: Run) -> None:
    run.optimizer.state[first(run).delta]["step"] += 5


def forget_state(run: Run) -> None:
    run.optimizer.state.clear()


def move_delta(run: Run) -> None:
    first(run).delta.data = first(run).delta.data + 0.25


def move_weight(run: Run) -> None:
    first(run).weight.data = first(run).weight.data.clone()


def share_memory(run: Run) -> None:
    run.model.share_memory()


def in_half(run: Run) -> None:
    run.model.bfloat16()
    run.model[2].float()


def there_and_back(run: Run) -> None:
    run.model.double()
    run.model.float()


def add_group(run: Run) -> None:
    extra = nn.Parameter(torch.ones(5))
    run.model.register_parameter("extra", extra)
    run.optimizer.add_param_group({"params": [extra], "lr": 0.5})


def drop_param(run: Run) -> None:
    del run.optimizer.param_groups[0]["params"][0]


def other_rounding(run: Run) -> None:
    run.optimizer.param_groups[0]["stochastic_rounding"] = False
    run.optimizer.param_groups[1]["seed"] = 8


def other_groups(run: Run) -> None:
    run.optimizer.param_groups = [dict(group, lr=0.5) for group in run.optimizer.param_groups]


def release(run: Run) -> None:
    untune(first(run))


CHANGES = [
    new_weight, new_positions, load_state, double_state, double_state_data, forget_state,
    move_delta, move_weight, share_memory, in_half, there_and_back, add_group, drop_param,
    other_rounding, other_groups, release,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_steps_is_noticed(
    change: Callable[[Run], None], dtype: torch.dtype, general_only: Callable[[], None]
) -> None:
    found = []
    for prepared in (True, False):
        if not prepared:
            general_only()
        run = Run(dtype)
        run.steps(3)
        assert run.short == (2 if prepared else 0)
        change(run)
        run.steps(1)
        assert run.short == (2 if prepared else 0), "the change was overlooked"
        run.steps(3)
        found.append(run.state())
    assert_same(*found)


def set_lr(run: Run) -> None:
    for group in run.optimizer.param_groups:
        group["lr"] = 0.3


def set_tensor_lr(run: Run) -> None:
    for group in run.optimizer.param_groups:
        group["lr"] = torch.tensor(0.3)


def set_numbers(run: Run) -> None:
    run.optimizer.param_groups[0] |= {"weight_decay": 0.3, "betas": (0.5, 0.7), "maximize": True}
    run.optimizer.param_groups[1]["eps"] = 1e-2


@pytest.mark.parametrize(
    "change",
    [set_lr, set_tensor_lr, set_numbers, positions_in_place, count_on],
    ids=lambda change: change.__name__,
)
def test_what_may_change_is_followed_on_the_short_way(
    change: Callable[[Run], None], general_only: Callable[[], None]
) -> None:
    found = []
    for prepared in (True, False):
        if not prepared:
            general_only()
        run = Run()
        run.steps(3)
        before = run.state()
        change(run)
        run.steps(3)
        assert run.short == (5 if prepared else 0)
        found.append(run.state())
    assert_same(*found)
    assert not torch.equal(before["0.delta"], found[0]["0.delta"])


def test_gradients_may_stay_the_same_tensors_or_be_strided() -> None:
    run = Run()
    run.steps(3)
    with torch.no_grad():
        run.model[2].weight.grad.mul_(2)  # accumulated in place
    run.step()
    assert run.short == 3
    run.model[2].weight.grad = torch.randn(20, 3, generator=run.generator).t()
    run.step()
    assert run.short == 3
    run.step()
    assert run.short == 3, "a strided gradient went the short way"


def in_inference(grad: Tensor) -> Tensor:
    with torch.inference_mode():
        return grad.clone()


@pytest.mark.parametrize(
    "odd",
    [
        lambda grad: torch._neg_view(-grad),
        lambda grad: torch.complex(grad, -grad).conj().imag,
        lambda grad: torch.stack([grad, grad], -1)[..., 0],
        lambda grad: grad[..., :1].clone().expand(grad.shape),
        lambda grad: grad.T.contiguous().T if grad.dim() == 2 else grad,
        in_inference,
    ],
    ids=["negative", "conjugate", "strided", "expanded", "transposed", "inference"],
)
def test_odd_gradients_are_what_they_stand_for(odd: Callable[[Tensor], Tensor]) -> None:
    run, plain = Run(), Run()
    for one in (run, plain):
        one.steps(3)
        for group in one.optimizer.param_groups:
            for param in group["params"]:
                grad = odd(torch.randn(param.shape, generator=one.generator))
                param.grad = grad if one is run else grad.resolve_neg().contiguous()
        one.step()
    assert_same(run.state(), plain.state())


def test_parameters_that_never_have_a_gradient_do_not_stop_the_short_way(
    general_only: Callable[[], None],
) -> None:
    found = []
    for prepared in (True, False):
        if not prepared:
            general_only()
        run = Run(torch.bfloat16)
        run.steps(2)  # rounded at random: a write of the hook's would round to nearest
        run.steps(4, skipped=("0.delta", "2.bias"))
        assert run.short == (3 if prepared else 0)
        with torch.no_grad():
            run.model[0].delta.add_(0.5)
        run.steps(2, skipped=("0.delta", "2.bias"))
        layer = run.model[0]
        summed = layer.original.float() + layer.delta.detach()
        assert torch.equal(layer.weight.view(-1)[layer.index.long()], summed.bfloat16())
        run.steps(2)
        found.append(run.state())
    assert_same(*found)


def test_a_layer_that_is_never_called_is_still_an_error() -> None:
    run = Run()
    run.model[1].__dict__["_spt_called"] = False
    run.steps(2, skipped=("1.delta",))
    assert run.short == 1
    run.model[1].weight.sum().backward()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="never calls it"):
            run.steps(1, skipped=("1.delta",))
    assert run.short == 3


def test_weights_count_as_changed_and_as_fresh() -> None:
    run = Run()
    run.steps(2)
    layer = first(run)
    versions = layer.weight._version, layer.delta._version
    run.steps(1)
    assert run.short == 2
    assert layer.weight._version > versions[0]
    assert layer.delta._version > versions[1]
    assert all(delta.is_fresh for delta in layer.sparse_deltas().values())
    summed = layer.original + layer.delta.detach()
    assert torch.equal(layer.weight.view(-1)[layer.index.long()], summed)


def test_another_optimizer_on_the_same_model_is_followed() -> None:
    run = Run(torch.bfloat16)
    run.steps(3)
    other = torch.optim.SGD([layer.delta for layer in run.model.deltas_held()], lr=0.5)
    for _ in range(2):
        other.step()
        layer = first(run)
        summed = (layer.original.float() + layer.delta.detach()).bfloat16()
        assert torch.equal(layer.weight.view(-1)[layer.index.long()], summed)
        run.steps(1)
    assert run.short == 4


def test_memory_lent_to_a_delta_between_steps_is_noticed_when_it_comes_again() -> None:
    run = Run()
    run.steps(3)
    layer = first(run)
    trained, average = layer.delta.data, layer.delta.detach() + 1
    for _ in range(2):
        layer.delta.data = average
        layer.write_stale_deltas()
        assert torch.equal(layer.weight.view(-1)[layer.index.long()], layer.original + average)
        layer.delta.data = trained
        run.steps(1)
    assert run.short == 4


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_an_optimizer_does_not_keep_weights_that_its_model_has_let_go(how: str) -> None:
    run = Run()
    run.steps(3)
    assert run.short == 2
    weight = weakref.ref(first(run).weight)
    if how == "deleted":
        del run.model
    else:
        run.model[0] = nn.Linear(40, 30)
    gc.collect()
    assert weight() is None
    for group in run.optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    run.step()  # the parameters are its own, and go on
    assert run.short == 2


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_does_not_write_into_the_model_it_was_made_from(way: str) -> None:
    run = Run()
    run.steps(3)
    pair = (run.model, run.optimizer)
    model, optimizer = (
        copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    )
    before = run.state()
    for param in model.parameters():
        param.grad = torch.ones_like(param) if param.requires_grad else None
    for _ in range(3):
        optimizer.step()
    assert_same(before, run.state())
    layer = model[0]
    assert float((layer.delta - run.model[0].delta).detach().abs().min()) > 0
    assert torch.equal(layer.weight.view(-1)[layer.index.long()], layer.original + layer.delta)


def test_grad_scaler_goes_the_short_way_and_skips_overflows() -> None:
    results = []
    for kind in (SparseAdamW, torch.optim.AdamW):
        param = nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = kind([param], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(7):
            optimizer.zero_grad()
            factor = float("inf") if step == 4 else 1.0
            scaler.scale(param.pow(4).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        assert float(optimizer.state[param]["step"]) == 6
        results.append(param.detach())
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-6)


def test_a_hook_that_fails_does_not_leave_the_next_step_half_done() -> None:
    run = Run(torch.bfloat16)
    run.steps(2)
    hook = run.optimizer.register_step_post_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.steps(1)
    hook.remove()
    with torch.no_grad():
        first(run).delta.add_(0.5)
    run.steps(1, skipped=("0.delta",))  # the general way: the hook is to write what was edited
    layer = first(run)
    summed = (layer.original.float() + layer.delta.detach()).bfloat16()
    assert torch.equal(layer.weight.view(-1)[layer.index.long()], summed)


class Listens(TorchDispatchMode):
    """Hears which ops are called."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.heard.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_hears_of_the_op() -> None:
    run = Run()
    run.steps(3)
    with Listens() as mode:
        run.steps(1)
    assert any("spt.sparse_adamw" in name for name in mode.heard)


def test_alternating_parameters_are_not_prepared_for() -> None:
    run = Run()
    for _ in range(3):
        run.steps(1, skipped=("0.delta",))
        run.steps(1, skipped=("1.delta",))
    assert run.short == 0
    assert run.optimizer._prepared is None


def test_a_position_that_came_to_lie_outside_is_refused_before_it_is_written() -> None:
    run = Run()
    run.steps(2)
    layer = first(run)
    room = torch.zeros(layer.weight.numel() + 64)
    layer.weight.data = room[:-64].view(30, 40).copy_(layer.weight.data)
    run.steps(2)
    layer.index[-1] = layer.weight.numel() + 1
    with pytest.raises(ValueError, match=r"expected positions in 0\.\.1199, got 1201"):
        run.steps(1)
    assert torch.equal(room[-64:], torch.zeros(64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_and_index_take_12_bytes_a_value(dtype: torch.dtype) -> None:
    model = nn.Sequential(SparseDeltaLinear(nn.Linear(768, 768, dtype=dtype), torch.arange(5000)))
    model[0].write_stale_deltas()
    optimizer = SparseAdamW([model[0].delta])
    model[0].delta.grad = torch.ones(5000)
    optimizer.step()
    delta: SparseDelta = model[0].sparse_deltas()["weight"]
    state = sum(part.nbytes for part in optimizer.state[model[0].delta].values())
    assert 12 <= (state + delta.index.nbytes) / 5000 <= 13
    # what an exact unload needs comes on top: the base values, in the dtype of the weight
    assert delta.original.nbytes == 5000 * dtype.itemsize
