"""Having an activation again from what its producer keeps, instead of keeping the activation."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

# Cheap functions whose backward pass keeps their first argument, and not their result
_CHEAP = frozenset({F.gelu, F.silu, F.layer_norm, torch.layer_norm})

Remake = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Production:
    """One call of a cheap function."""

    output: weakref.ref[Tensor]
    source: weakref.ref[Tensor]
    state: tuple[int, int, int]  # of the two as the call left them
    remake: Remake


class Productions:
    """Remembers which call of a cheap function made a tensor, for as long as both are there.

    An edit of either is noticed, and other memory given to it through `.data` as well. A write into
    `.data` leaves no trace, here as in autograd: the scores are then those of the numbers before.

    A function with a parameter shows itself to who watches that; of others only those are known
    that are modules of their own, as activations mostly are.
    """

    def __init__(self) -> None:
        self._by_id: dict[int, _Production] = {}
        self._modules: set[nn.Module] = set()

    @contextlib.contextmanager
    def noting(self, *, find: bool) -> Iterator[None]:
        """Note what cheap modules make in a `with` block.

        Args:
            find: look for them among all modules that run, else go by those found before.
        """
        if find:
            handles = [register_module_forward_hook(self._find)]
        else:
            handles = [module.register_forward_hook(self._note_module) for module in self._modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._by_id.clear()

    def _find(self, module: nn.Module, args: Any, output: Any) -> None:
        if _cheap_call(args, output) and not isinstance(module, torch.jit.ScriptModule):
            self._modules.add(module)
            self._note_module(module, args, output)

    def _note_module(self, module: nn.Module, args: Any, output: Any) -> None:
        call = _cheap_call(args, output)
        if call is not None:
            func, kwargs = call
            self.note(func, args, kwargs, output)

    def note(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """Remember that `func(*args, **kwargs)` made `output`, if it can be made again."""
        if func not in _CHEAP or not args or not isinstance(output, Tensor):
            return
        source, *others = args
        if output is source:
            return  # in place: what it was made from is gone
        # without a graph nothing keeps the source, and anybody may write into it
        if not output.requires_grad or not source.requires_grad or source.dtype != output.dtype:
            return
        tensors = [value for value in (*others, *kwargs.values()) if isinstance(value, Tensor)]
        if any(tensor.dtype != source.dtype for tensor in tensors):
            return  # autocast has had a hand in this
        others = [_detached(value) for value in others]
        kwargs = {key: _detached(value) for key, value in kwargs.items()}

        def remake(source: Tensor) -> Tensor:
            with torch.autocast(source.device.type, enabled=False):
                made: Tensor = func(source, *others, **kwargs)
            return made

        self._by_id[id(output)] = _Production(
            weakref.ref(output), weakref.ref(source), _state_of(output, source), remake
        )

    def keep(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Remake]:
        """What to save of `x`, and how to have `x` in `dtype` again from that.

        What is made again has the bits of `x`: the same function computes it from the same numbers.
        """
        production = self._by_id.get(id(x))
        if production is not None and production.output() is x:
            source = production.source()
            if source is not None and _state_of(x, source) == production.state:
                return source.detach(), lambda source: production.remake(source).to(dtype)
        return x.detach().to(dtype), lambda x: x


def _cheap_call(args: Any, output: Any) -> tuple[Any, dict[str, Any]] | None:
    """Function and keywords of a module that does nothing but this to its only argument."""
    source = args[0] if len(args) == 1 else None
    if not isinstance(source, Tensor) or not isinstance(output, Tensor):
        return None
    node: Any = output.grad_fn
    if node is None or source.grad_fn is None or output._version:
        return None
    # one node lies between the two, and its name says which function it is of
    if node.next_functions[:1] != ((source.grad_fn, source.output_nr),):
        return None
    if node.name() == "GeluBackward0":
        return F.gelu, {"approximate": node._saved_approximate}
    return (F.silu, {}) if node.name() == "SiluBackward0" else None


def _state_of(output: Tensor, source: Tensor) -> tuple[int, int, int]:
    # the version of the source is autograd's to check: the producer's own backward needs it too
    return output._version, output.untyped_storage()._cdata, source.untyped_storage()._cdata


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
