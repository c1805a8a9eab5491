"""Views of fake tensors: made by torch's C++ at once, to which its fake mode has a long way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.utils._pytree import tree_map_only

_UNSAFE_VIEW = torch.ops.aten._unsafe_view.default  # a view, though its schema does not say so


def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `func(*args, **kwargs)` gives under the mode of fake tensors, of which views are most.

    A view has the memory of its tensor, in a shape and strides that nothing but those of the tensor
    and the arguments decide: neither rules for devices nor decompositions have a part in it.
    """
    if not (func.is_view or func is _UNSAFE_VIEW) or not _is_plain(args, kwargs):
        return func(*args, **kwargs)
    tensor = args[0]
    mode, device = tensor.fake_mode, tensor.fake_device
    with in_kernel_invocation_manager(mode):
        made = func(*args, **kwargs)
    if isinstance(made, Tensor):  # most are one, for which no tree is gone through
        return FakeTensor(mode, made, device)
    return tree_map_only(Tensor, lambda part: FakeTensor(mode, part, device), made)


def _is_plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a view is of one fake tensor with memory of its own, of sizes that are numbers."""
    if not args or type(args[0]) is not FakeTensor:
        return False
    tensor = args[0]
    return (
        tensor.layout == torch.strided
        and tensor.constant is None
        and tensor.fake_mode.shape_env is None
        and not any(isinstance(value, Tensor) for value in (*args[1:], *kwargs.values()))
    )
