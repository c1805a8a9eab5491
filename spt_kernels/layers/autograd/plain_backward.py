"""How the backward of an autograd function is run: without a record, and without autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ...ops.launching import may_launch
from ...ops.torch_internals import (
    add_batch_dim,
    count_dispatch_modes,
    is_batch,
    is_functorch_active,
    remove_batch_dim,
)
from .autocast import is_any_autocast_on, without_autocast

Backward = Callable[[Any, Tensor], tuple[Tensor | None, ...]]
QuickBackward = Callable[[Any, Tensor, bool], tuple[Tensor | None, ...]]

_MOST_LEVELS = 64  # that torch has


def plain_backward(backward: Backward) -> Backward:
    """Run a backward of one output in its forward's dtypes, and fail if it is differentiated.

    Autocast, under which some call `backward`, must not change dtypes a second time. Nothing is
    recorded; torch's `once_differentiable` says nothing when only the saved tensors, and not the
    gradient that came in, depend on what is differentiated: a gradient penalty would lose terms in
    silence. Of many gradients in one each is taken by itself, as `one_at_a_time` has it.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not is_dynamo_compiling() and is_batch(grad):
            return _one_by_one(functools.partial(wrapper, ctx), grad)
        if torch.is_grad_enabled():  # unlike in an ordinary backward
            return _guarded(backward, ctx, grad)
        if is_any_autocast_on():
            with without_autocast(grad.device):
                return backward(ctx, grad)
        return backward(ctx, grad)

    return wrapper


def quick_backward(backward: QuickBackward) -> Backward:
    """`plain_backward` for layers so small that each frame is felt: one in place of five.

    The backward is told whether its gradient is one that `may_launch` says yes to.
    """
    in_general = plain_backward(lambda ctx, grad: backward(ctx, grad, may_launch(grad)))

    @functools.wraps(backward)
    def wrapper(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return backward(ctx, grad, True) if _is_ordinary(grad) else in_general(ctx, grad)

    return wrapper


def _is_ordinary(grad: Tensor) -> bool:
    """Whether `plain_backward` would do nothing, and `may_launch` say yes."""
    return not (
        is_dynamo_compiling()  # first, as what traces stops here
        or torch.is_grad_enabled()
        or is_any_autocast_on()
        or type(grad) is not Tensor
        or not (grad.is_cpu or grad.is_cuda)
        or grad.is_neg()
        or is_batch(grad)
        or count_dispatch_modes()
        or is_functorch_active()
    )


def one_at_a_time(backward: Backward) -> Backward:
    """Take each of many gradients in one (`is_grads_batched`), which kernels do not, by itself."""

    @functools.wraps(backward)
    def wrapper(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if is_batch(grad):
            return _one_by_one(functools.partial(backward, ctx), grad)
        return backward(ctx, grad)

    return wrapper


def recorded_gradients(
    output: Tensor, inputs: Iterable[Tensor | None], needed: Sequence[bool], grad_output: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients by torch's own backward, which can be differentiated; None where none is needed.

    Args:
        output: computed by torch's calls.
        inputs: of it.
        needed: of which a gradient is.
        grad_output: of the output.
    """
    wanted = [tensor for tensor, is_one in zip(inputs, needed, strict=True) if is_one]
    found = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=True))  # type: ignore[arg-type]
    return tuple(next(found) if is_one else None for is_one in needed)


def _one_by_one(
    gradients_of: Callable[[Tensor], tuple[Tensor | None, ...]], batch: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of each of a batch that `torch.autograd.grad` looks at as one, as such."""
    level = _level_of(batch)
    grads = remove_batch_dim(batch, level, 0, 0)  # [batch, ...]; it has its own size
    found = zip(*map(gradients_of, grads), strict=True)
    return tuple(
        None if each[0] is None else add_batch_dim(torch.stack(each), 0, level) for each in found
    )


def _level_of(batch: Tensor) -> int:
    """Which vmap made it; torch counts them in the thread of the call, a card's runs in another."""
    for level in range(1, _MOST_LEVELS + 1):
        if not is_batch(remove_batch_dim(batch, level, 0, 0)):
            return level
    raise NotImplementedError(
        "batches of gradients within one another reach a layer tuned or approximated by "
        "spt_kernels: call torch.autograd.grad without is_grads_batched in one of them"
    )


def _guarded(backward: Backward, ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients, which know that they cannot be differentiated."""
    with torch.no_grad(), without_autocast(grad_output.device):
        grads = backward(ctx, grad_output)
    if torch.compiler.is_compiling():
        return grads
    present = [grad for grad in grads if grad is not None]
    if not present:
        return grads
    anchor = torch.empty(0, device=present[0].device, requires_grad=True)
    guarded = iter(_FirstDerivative.apply(anchor, *present))
    return tuple(None if grad is None else next(guarded) for grad in grads)


class _FirstDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise RuntimeError(
            "a layer tuned or approximated by spt_kernels has first derivatives only: its backward "
            "cannot be differentiated again (create_graph=True, gradient penalties): take them by "
            "torch.func, as grad of a grad, or use the plain layer"
        )
