"""What autocast does to the factors of a product, and how a backward is kept from it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ops.torch_internals import is_any_autocast_enabled

# Asked for once: `torch.compile` of torch 2.11 cannot trace the question
_KINDS = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)
)
_AS_IT_IS: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


def _is_any_autocast_on() -> bool:
    return is_any_autocast_enabled() or torch.is_autocast_enabled("mps")  # which torch leaves out


# () -> bool: whether autocast is on for some device, in a quarter of what asking for one takes
is_any_autocast_on: Callable[[], bool] = (
    _is_any_autocast_on if torch.backends.mps.is_built() else is_any_autocast_enabled
)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """For what has cast its tensors itself: autocast must not change dtypes a second time."""
    if is_any_autocast_on():
        kind = device.type
        if kind in _KINDS and torch.is_autocast_enabled(kind):
            return torch.autocast(kind, enabled=False)
    return _AS_IT_IS


def is_cast(x: Tensor, factor: Tensor) -> bool:
    """Whether autocast makes another tensor of a factor of a product with `x`."""
    if not is_any_autocast_on() or torch.compiler.is_compiling():
        return False
    kind = x.device.type
    if kind not in _KINDS or not torch.is_autocast_enabled(kind):
        return False
    return factor.dtype not in (torch.get_autocast_dtype(kind), torch.float64)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, which to ask for costs as much as to do where there is nothing to do."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """In which a sum over tokens is taken."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
