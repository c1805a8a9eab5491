"""The base model inside a tuned one: its parameters, by their own names, with their own bytes."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from .layers import is_attached, sparse_deltas, tuned_modules


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself under `torch.compile` and data-parallel wrappers."""
    while True:
        if _is_wrapper(model):
            model = model.module  # type: ignore[assignment]
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def is_data_parallel(model: nn.Module) -> bool:
    """Whether a data-parallel wrapper relies on the parameters that the model has now."""
    while isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model._orig_mod  # type: ignore[assignment]
    return _is_wrapper(model)


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of the base model by its own name, in the base model's order.

    A weight that holds base + delta is given as it is; see `base_tensors`.
    """
    deltas = {id(delta.delta) for delta in sparse_deltas(model).values()}
    return {
        prefix + name: parameter
        for prefix, module in _base_modules(model, "", tuned_modules(model))
        for name, parameter in module.named_parameters(recurse=False)
        if id(parameter) not in deltas
    }


def base_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Every floating buffer that a state dict of the base model has: running statistics."""
    originals = {id(delta.original) for delta in sparse_deltas(model).values()}
    return {
        prefix + name: buffer
        for prefix, module in _base_modules(model, "", tuned_modules(model))
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.is_floating_point()
        and name not in module._non_persistent_buffers_set
        and id(buffer) not in originals
    }


def base_tensors(model: nn.Module, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Name and base value of some parameters: itself, or a copy with the originals put back."""
    deltas = sparse_deltas(model)
    for name, parameter in base_parameters(model).items():
        if name not in names:
            continue
        base = parameter.detach()
        if name in deltas:
            base = base.clone(memory_format=torch.contiguous_format)
            base.view(-1)[deltas[name].index.long()] = deltas[name].original
        yield name, base


def _base_modules(
    module: nn.Module, name: str, tuned: dict[str, nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """Prefix of the names in it, and module, for every module of the base model."""
    # a tuned module stands where the plain one stood, so this meets parameters in the base's order
    if name in tuned and not is_attached(module):
        module = module.plain  # type: ignore[assignment]
    prefix = f"{name}." if name else ""
    yield prefix, module
    for local, child in module.named_children():
        yield from _base_modules(child, prefix + local, tuned)


def _is_wrapper(model: nn.Module) -> bool:
    return isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
