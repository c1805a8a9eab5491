"""`computed`: a parameter with its delta, made of both by calls of torch that transforms follow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.torch_internals import is_vmapped, is_wrapped, unwrapped
from .name_in_model import told_as


def computed(holder: Any, local: str) -> Any:
    """A parameter of a module as base + delta, out of place where it has a delta.

    It is what the parameter holds, but for stochastic rounding, and may be differentiated in any
    way any number of times. The delta is the one that the module has in this call, as
    `torch.func.functional_call` gives it; nothing is written.

    Args:
        holder: a `DeltaHolder`.
        local: name of the parameter in it; or of an attribute that is none, which comes as it is.

    Raises:
        ValueError: the parameter is a batch, but positions and base values are those of one model.
    """
    if local not in holder._parameters:
        return getattr(holder, local)
    target, state = holder._parameters[local], holder._spt_states.get(local)
    if state is None:
        return target
    target, delta = holder._own_parameter(local), holder._own_parameter(state.name)
    if state.index_name is None:  # trained whole
        return delta.to(target.dtype)
    if not torch.compiler.is_compiling() and _is_batch(target):
        raise ValueError(
            f"{told_as(holder)}.{local} is tuned and comes as a batch, but which of its entries "
            "are tuned is that of one model: batch what is trained alone, {n: p for n, p in "
            "model.named_parameters() if p.requires_grad}"
        )
    _, index_name, original_name = holder.delta_local_names(local)
    index, original = holder.__dict__[index_name], holder.__dict__[original_name]
    values = (original + delta).to(target.dtype)  # [nnz]
    return target.flatten().index_copy(0, index.long(), values).view(target.shape)


def _is_batch(tensor: Tensor) -> bool:
    """Whether `vmap` has made it one, alone or with other transforms."""
    while is_wrapped(tensor):
        if is_vmapped(tensor):
            return True
        tensor = unwrapped(tensor)
    return False
