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
    return dict(_walk(model, "", tuned_modules(model), deltas))


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


def _walk(
    module: nn.Module, prefix: str, tuned: dict[str, nn.Module], deltas: set[int]
) -> Iterator[tuple[str, nn.Parameter]]:
    # a tuned module stands where the plain one stood, so this meets parameters in the base's order
    if prefix in tuned and not is_attached(module):
        module = module.plain  # type: ignore[assignment]
    dotted = f"{prefix}." if prefix else ""
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) not in deltas:
            yield dotted + name, parameter
    for name, child in module.named_children():
        yield from _walk(child, dotted + name, tuned, deltas)


def _is_wrapper(model: nn.Module) -> bool:
    return isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
