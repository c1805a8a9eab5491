"""Each thing that is taken of torch's own is there, and is what it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.hooks import RemovableHandle

from spt_kernels.ops import torch_internals as internals


def test_this_torch_has_lost_nothing() -> None:
    assert internals.LOST == [], f"torch {torch.__version__} has lost {', '.join(internals.LOST)}"


def test_what_is_lost_is_told_where_it_is_called() -> None:
    absent = internals._of_torch("_C._never_was")
    assert internals.LOST.pop() == "_C._never_was"
    with pytest.raises(RuntimeError, match=r"needs _C\._never_was of torch, which 2"):
        absent(1, two=3)


def counts_modes() -> None:
    assert internals.count_dispatch_modes() == 0
    with TorchDispatchMode():
        assert internals.count_dispatch_modes() == 1


def finds_what_keeps_outputs() -> None:
    seen: list[type] = []

    def look(x: Tensor) -> Tensor:
        seen.extend(type(mode) for mode in internals.dispatch_modes())
        return x * x

    def contexts() -> Any:
        return create_selective_checkpoint_contexts([torch.ops.aten.mul.Tensor])

    x = torch.ones(2, requires_grad=True)
    checkpoint(look, x, use_reentrant=False, context_fn=contexts).sum().backward()
    assert seen == [internals.CachingMode, internals.CachedMode]


def knows_transforms() -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(internals.is_functorch_active())
        return x

    torch.vmap(look)(torch.ones(2))
    assert seen == [True]
    assert not internals.is_functorch_active()


def knows_forward_mode() -> None:
    assert not internals.is_transformed()
    with forward_ad.dual_level():
        assert internals.is_transformed()
        assert not internals.is_functorch_active()


def knows_autocast() -> None:
    assert not internals.is_any_autocast_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        assert internals.is_any_autocast_enabled()


def knows_compilers() -> None:
    assert internals.compiler_callback() in (None, False)


def knows_compiled_backwards() -> None:
    from torch._dynamo import compiled_autograd

    assert not internals.is_backward_compiled()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        assert internals.is_backward_compiled()


class Heard(Tensor):
    heard = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.heard += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def keeps_subclasses_out() -> None:
    own = torch.ones(2).as_subclass(Heard)
    for without in (internals.DisableTorchFunctionSubclass, internals.DisableTorchFunction):
        before = Heard.heard
        with without():
            torch.add(own, 1)
            assert Heard.heard == before
            with internals.EnableTorchFunction():
                torch.add(own, 1)
            assert Heard.heard > before


def finds_hooks() -> None:
    assert internals.are_hooks_allowed()
    assert internals.hooks_in_use() is None
    hooks = (lambda x: x, lambda x: x)
    internals.push_hooks(*hooks)
    try:
        assert internals.hooks_in_use() == hooks
    finally:
        internals.pop_hooks()
    assert internals.hooks_in_use() is None


def follows_a_backward() -> None:
    tasks, nodes, ends = [], [], []
    x = torch.ones(2, requires_grad=True)
    y = x * 2

    def look(grad: Tensor) -> None:
        tasks.append(internals.current_graph_task())
        nodes.append(internals.current_node())
        internals.queue_callback(lambda: ends.append(internals.current_graph_task()))

    y.register_hook(look)
    y.sum().backward()
    assert internals.current_graph_task() == -1
    assert internals.current_node() is None
    assert tasks[0] >= 0
    assert nodes[0] is not None
    assert len(ends) == 1


def compares_storages() -> None:
    x = torch.ones(4)
    assert internals.is_alias_of(x[1:], x)
    assert not internals.is_alias_of(x.clone(), x)


def counts_hooks() -> None:
    before = internals.next_hook_id()
    assert before == RemovableHandle.next_id
    torch.ones(1, requires_grad=True).register_hook(lambda grad: None).remove()
    assert internals.next_hook_id() > before


class Look(torch.autograd.Function):
    seen: ClassVar[list[Any]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        plain = internals.remove_batch_dim(grad, 1, 0, 0)
        Look.seen.append((internals.is_batch(grad), internals.is_batch(plain), plain.shape))
        return internals.add_batch_dim(plain, 0, 1)


def opens_batches() -> None:
    x = torch.ones(3, requires_grad=True)
    (found,) = torch.autograd.grad(Look.apply(x), x, torch.eye(3), is_grads_batched=True)
    assert Look.seen.pop() == (True, False, (3, 3))
    assert torch.equal(found, torch.eye(3))


def opens_what_transforms_make() -> None:
    outside, seen = torch.ones(3), []

    def look(x: Tensor) -> Tensor:
        assert internals.is_wrapped(x)
        assert not internals.is_wrapped(outside)
        seen.append((internals.is_vmapped(x), internals.is_vmapped(internals.unwrapped(x))))
        made = outside * 2  # seen by the transform
        with internals.without_transforms():
            assert not internals.is_functorch_active()
            assert not internals.is_wrapped(outside * 2)
        assert internals.is_functorch_active()
        return (x * made).sum()

    of_each = torch.vmap(torch.func.grad(look))(torch.ones(2, 3))
    assert seen == [(False, True)]
    assert torch.equal(of_each, torch.full((2, 3), 2.0))


def tells_convolutions_apart() -> None:
    x, weight = torch.ones(1, 2, 5, 5), torch.ones(2, 2, 3, 3)
    how = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    found = internals.select_conv_backend(x, weight, None, *how, None)
    assert isinstance(found, internals.ConvBackend)
    assert internals.ConvBackend.Slow2d != internals.ConvBackend.Mkldnn


CHECKS: dict[str, Callable[[], None]] = {
    "count_dispatch_modes": counts_modes,
    "dispatch_modes, CachingMode, CachedMode": finds_what_keeps_outputs,
    "is_functorch_active": knows_transforms,
    "is_transformed": knows_forward_mode,
    "is_any_autocast_enabled": knows_autocast,
    "compiler_callback": knows_compilers,
    "is_backward_compiled": knows_compiled_backwards,
    "DisableTorchFunctionSubclass, DisableTorchFunction, EnableTorchFunction": keeps_subclasses_out,
    "hooks_in_use, push_hooks, pop_hooks, are_hooks_allowed": finds_hooks,
    "current_node, current_graph_task, queue_callback": follows_a_backward,
    "is_alias_of": compares_storages,
    "next_hook_id": counts_hooks,
    "is_batch, remove_batch_dim, add_batch_dim": opens_batches,
    "is_wrapped, is_vmapped, unwrapped, without_transforms": opens_what_transforms_make,
    "ConvBackend, select_conv_backend": tells_convolutions_apart,
}


@pytest.mark.parametrize("names", CHECKS)
def test_it_is_what_it_was(names: str) -> None:
    CHECKS[names]()


def test_everything_is_tried() -> None:
    others = {"LOST", "annotations", "Any", "RemovableHandle"}
    public = {
        name
        for name, value in vars(internals).items()
        if name[0] != "_" and name not in others and not isinstance(value, type(torch))
    }
    assert public == {name for names in CHECKS for name in names.split(", ")}
