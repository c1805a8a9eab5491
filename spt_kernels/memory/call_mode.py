"""A mode that sees what is called on tensors, but not who asks a fake one for its device."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

_DEVICE = torch.ops.prim.device.default


class CallMode(TorchDispatchMode):
    """While active, every call of an operator goes to `called`.

    Of the calls in a step on fake tensors, two in three ask for a device: torch checks it of all
    that autograd handles. These are answered at once.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].device
        return self.called(func, args, kwargs or {})

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the call, or answer it."""
        return func(*args, **kwargs)
