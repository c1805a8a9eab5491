"""`Region`: the module hooks that give every forward of a module a frame."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from ..layers.autograd.recording import recording_in_use
from ..layers.running import Running
from ..ops.torch_internals import are_hooks_allowed, compiler_callback
from .call import NormCall
from .frame import Frame, drop_interrupted
from .packed import unobserved
from .random_state import is_capturing
from .replay import Replay


class Region:
    """Computes the calls of a module again in the backward, for as long as it is attached.

    A region holds no module and nothing of a call that is over: models are copied and saved with
    their regions.

    Args:
        name: of the module, for messages.
        until_attention: see `Frame`.
        norms: what the norms around the module gave last; its own are no part of them.
    """

    def __init__(self, name: str, until_attention: bool, norms: LastNorm | None = None) -> None:
        self.name, self._until_attention, self._norms = name, until_attention, norms
        self._draws_on_device = False  # as far as is known

    def attach(self, module: nn.Module) -> None:
        """Begin to stand around a module's calls."""
        # first: what other hooks make of the arguments they make again
        module.register_forward_pre_hook(self.open, with_kwargs=True, prepend=True)
        module.register_forward_hook(self.close, always_call=True)

    def open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward."""
        if torch.compiler.is_compiling() or _is_compiled():
            raise RuntimeError(
                f"{self.name}: torch.compile decides by itself what the backward computes again "
                "(torch._functorch.config.activation_memory_budget); take spt.recompute off the "
                'model before, with spt.recompute(model, "nothing")'
            )
        if not torch.is_grad_enabled() or not _may_have_hooks():
            return
        outer = recording_in_use()
        if isinstance(outer, Replay) and outer.module is module:
            return
        with unobserved():
            made_by = None if self._norms is None else self._norms.take(args, kwargs)
            frame = Frame(self.name, module, args, kwargs, made_by, self._until_attention)
        if self._draws_on_device and is_capturing(frame.device):
            raise RuntimeError(
                f"{self.name} draws random numbers on the card (dropout, stochastic depth), which "
                "cannot be drawn again in a CUDA graph: leave this block out of spt.recompute, or "
                "train it without these"
            )
        frame.begin(Running(sys._getframe(1)))

    def close(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a forward, one that has failed too."""
        frame = recording_in_use()
        if not isinstance(frame, Frame) or frame.module is not module:
            return
        if frame.has_failed():
            frame.abandon()
            return
        with unobserved():
            frame.end(output)
        self._draws_on_device |= frame.draws_on_device()


class LastNorm:
    """Which norm gave its result last, and what it was given: all of it known weakly.

    A region that is called with that result needs to keep neither: it has the norm called again.
    """

    def __init__(self) -> None:
        self._last: tuple[nn.Module, _Seen, _Seen] | None = None  # and what it was given, and gave

    def attach(self, norms: Iterable[nn.Module]) -> None:
        """Begin to note what norms give."""
        for norm in norms:
            norm.register_forward_hook(self.note_call, with_kwargs=True)

    def note(self, norm: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """After a norm's forward, in a model that was saved before 0.8.1."""
        self.note_call(norm, args, {}, result)

    def note_call(
        self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """After a norm's forward."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        self._last = None
        is_plain = len(args) == 1 and not kwargs  # called again with its input alone
        if is_plain and isinstance(args[0], Tensor) and isinstance(result, Tensor):
            with unobserved():
                self._last = norm, _Seen(args[0]), _Seen(result)

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NormCall | None:
        """The norm's call, if its result is among the arguments of a region's."""
        if self._last is None:
            return None
        norm, given, made = self._last
        self._last = None
        x, result = given.unchanged(), made.unchanged()
        if x is None or result is None:
            return None
        if not any(value is result for value in (*args, *kwargs.values())):
            return None
        return NormCall(norm, x, result)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_last": None}


class _Seen:
    """A tensor known weakly, for as long as nothing is written into it."""

    __slots__ = ("_ref", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._ref, self._version = TensorWeakRef(tensor), tensor._version

    def unchanged(self) -> Tensor | None:
        """The tensor; None once it is gone, or another one."""
        tensor = self._ref()
        return tensor if tensor is not None and tensor._version == self._version else None


class Whose:
    """Stands before the forward of a whole model; models are saved with it under these names."""

    def drop_stale_frames(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Let go of what an interrupted forward holds, be it followed by one without gradients."""
        if not torch.compiler.is_compiling():
            drop_interrupted()


def _is_compiled() -> bool:
    """Whether this runs between two graphs of a model that `torch.compile` has broken up."""
    callback = compiler_callback()
    return callback not in (None, False)


def _may_have_hooks() -> bool:
    """Whether there may be hooks of saved tensors here; under `torch.func` there may not."""
    return bool(are_hooks_allowed())
