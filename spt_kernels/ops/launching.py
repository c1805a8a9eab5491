"""How a launcher of an op is reached, through the dispatcher or past its round trip, and where."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from itertools import filterfalse
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .torch_internals import (
    count_dispatch_modes,
    is_any_autocast_enabled,
    is_functorch_active,
)
from .torch_internals import is_transformed as is_transformed


def register(op: str, device: str, launcher: Callable[..., Any]) -> None:
    """Let the dispatcher find what an op does with the tensors of a device.

    Autograd and autocast are still on when that is called. What it does by torch's own calls would
    be recorded, down to sums that then need a gradient, or refused for its `out`; and multiplied in
    16 bits.
    """

    def undisturbed(*arguments: Any) -> Any:
        if not (torch.is_grad_enabled() or is_any_autocast_enabled()):
            return launcher(*arguments)  # as in a backward; to make it so costs more
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return launcher(*arguments)

    # not as a decorator: what that leaves of a function cannot be called
    torch.library.register_kernel(op, device, undisturbed)


def mark_mutated(tensors: Iterable[Tensor]) -> None:
    """Tell autograd that raw pointers were written through: a saved tensor is then found stale.

    Tensors of inference mode have no version, and autograd saves none of them.
    """
    torch.autograd.graph.increment_version([*filterfalse(Tensor.is_inference, tensors)])


def check_unrecorded(name: str, written: Tensor) -> None:
    """Refuse, by name, to write into what autograd follows, which would not see it."""
    if written.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} must need no gradient, for autograd does not see what is written into it: "
            "call this under torch.no_grad()"
        )


def may_launch(tensor: Tensor) -> bool:
    """Whether a tensor is what it seems, and nobody listens: no fake, no subclass, no compiler.

    Nor a view of the opposite, as the imaginary part of a conjugate is: its memory has other signs.
    The registered ops are for those; each costs a second dispatch and a guard, more than all that
    an autograd function does else.
    """
    # the first stops what traces, and is all that `torch.compiler.is_compiling` could add here:
    # what exports otherwise does so with tensors of other types; then `is_plain`, without its frame
    return (
        not is_dynamo_compiling()
        and type(tensor) is Tensor
        and (tensor.is_cpu or tensor.is_cuda)
        and not tensor.is_neg()
        and count_dispatch_modes() == 0
        and not is_functorch_active()
    )


def may_launch_all(tensors: Sequence[Tensor]) -> bool:
    """`may_launch` of each of some tensors on one device, not none."""
    return (
        may_launch(tensors[0])
        and set(map(type, tensors)) == {Tensor}
        and not any(map(Tensor.is_neg, tensors))
    )


def is_plain(tensor: Tensor) -> bool:
    """`may_launch` for those who know that nothing is compiled here."""
    return (
        type(tensor) is Tensor
        and (tensor.is_cpu or tensor.is_cuda)
        and not tensor.is_neg()
        and count_dispatch_modes() == 0
        and not is_functorch_active()
    )


_AS_ON_CARD: ContextVar[bool] = ContextVar("spt_as_on_card", default=False)


@contextlib.contextmanager
def as_on_card() -> Iterator[None]:
    """Let what is computed within go the ways of a card, as its rehearsal on fake tensors does."""
    token = _AS_ON_CARD.set(True)
    try:
        yield
    finally:
        _AS_ON_CARD.reset(token)


def goes_as_on_card(tensor: Tensor) -> bool:
    """Whether a tensor is on a card, or stands for one that is."""
    # of torch 2.11 and older no compiler traces the variable, and none runs within a rehearsal
    return tensor.is_cuda or (not torch.compiler.is_compiling() and _AS_ON_CARD.get())


def load_for_capture(device: torch.device) -> None:
    """Load the kernel by which tables come to a card while a CUDA graph is captured."""
    from ..kernels import address_table

    address_table.load_for_capture(device)


def on_card(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device; to make it so costs more than to find it so."""
    if torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(device)
