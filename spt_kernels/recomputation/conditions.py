"""`Conditions`: under which a region was computed, and must be computed again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.sharded import is_sharded
from .packed import unobserved


class NotRecomputable(RuntimeError):
    """A region that cannot be computed again, or not in the way that was chosen."""


class WritesCache(NotRecomputable):
    """A region with a cache of keys and values, which the model can be called without."""


class Conditions:
    """Autocast, modes of modules and the versions of what they hold, at the end of a forward.

    Args:
        name: of the region, for messages.
        modules: what is called when it is computed.
        device: of its input.
    """

    def __init__(self, name: str, modules: Sequence[nn.Module], device: torch.device) -> None:
        self.name = name
        self._modules = modules
        self._autocast = _autocast_of(device)
        self.parameters: list[Tensor] = []
        # of each module what it has for parameters and buffers, and what that was at the beginning
        self._held: list[tuple[dict[str, Tensor | None], dict[str, Tensor | None]]] = []
        self._buffers: list[tuple[nn.Module, str, Tensor, int]] = []
        for module in modules:
            self._gather(module)
        self._versions: list[int] = []
        self._is_training: list[bool] = []
        self._rewritten: list[tuple[nn.Module, str]] = []

    def _gather(self, module: nn.Module) -> None:
        # as `parameters()` and `buffers()`, which take several times as long
        own = vars(module)
        self._held += [
            (place, dict(place)) for place in (own["_parameters"], own["_buffers"]) if place
        ]
        self.parameters += [p for p in own["_parameters"].values() if p is not None]
        self._buffers += [
            (module, name, buffer, buffer._version)
            for name, buffer in own["_buffers"].items()
            if buffer is not None
        ]
        for child in own["_modules"].values():
            if child is not None:
                self._gather(child)

    def settle(self) -> None:
        """The forward is over: what is there now must be there when it is computed again.

        Raises:
            NotRecomputable: it has written into a buffer that its output may depend on.
        """
        self.parameters = [p for p in self.parameters if not is_sharded(p)]
        self._versions = [p._version for p in self.parameters]
        self._is_training = [module.training for module in self._modules]
        for module, name, buffer, version in self._buffers:
            if isinstance(module, nn.modules.batchnorm._NormBase):
                if module.training:  # its kernels write what it counts behind autograd's back
                    self._rewritten.append((module, name))
            elif module._buffers.get(name) is not buffer or buffer._version != version:
                raise NotRecomputable(
                    f"{self.name} cannot be computed again: {type(module).__name__} changes its "
                    f"buffer {name} in every forward; leave this block out of spt.recompute"
                )
        self._buffers = []

    def check(self) -> None:
        """Raise a RuntimeError unless all is as it was at the end of the forward."""
        if [module.training for module in self._modules] != self._is_training:
            raise RuntimeError(
                f"{self.name} is computed again in the backward, and was switched between training "
                "and evaluation since its forward: switch after the backward"
            )
        with unobserved():
            versions = [p._version for p in self.parameters]
        if versions != self._versions:
            raise RuntimeError(
                f"{self.name} is computed again in the backward, and one of its parameters was "
                "changed in place since its forward: change parameters after the backward"
            )

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """The same autocast and tensors; what batch norms count is not counted a second time."""
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype, caches in self._autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled, caches))
            for place, held in self._held:  # `torch.func.functional_call` has lent others
                if any(place.get(name) is not tensor for name, tensor in held.items()):
                    stack.callback(place.update, dict(place))
                    place.update((n, t) for n, t in held.items() if t is None or not is_sharded(t))
            for module, name in self._rewritten:
                buffer: Any = module._buffers[name]
                stack.callback(module._buffers.update, {name: buffer})
                module._buffers[name] = buffer.clone()
            yield


def _autocast_of(device: torch.device) -> list[tuple[str, bool, torch.dtype, bool]]:
    kinds = [k for k in dict.fromkeys((device.type, "cpu")) if torch.amp.is_autocast_available(k)]
    caches = torch.is_autocast_cache_enabled()
    return [(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k), caches) for k in kinds]
