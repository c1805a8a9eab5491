"""Borrowing a model: whatever is switched for a measurement is put back, also after an error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, ValuesView
from typing import Any

import torch
from torch import Tensor, nn

from .parameter_state import restore, states_of

# dictionaries that every module has; what a forward puts into its buffers is as in any other
_MEMBERS = frozenset(vars(nn.Module())) - {"_buffers"}


@contextlib.contextmanager
def borrowed(model: nn.Module, *, train: bool) -> Iterator[None]:
    """Freeze every parameter, set the mode, and compute gradients eagerly, for a `with` block.

    Mode, parameters and buffers are put back afterwards, whatever was done to them within.
    What a forward leaves in its modules, as LeViT does with biases in eval mode, is forgotten
    before the next one: it would lead into a graph that a backward has freed.
    """
    parameters = states_of(model.parameters())
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with _in_mode(model, train=train), _forgetting(model):
            for parameter in model.parameters():  # of which a mode may have thawed some
                parameter.requires_grad_(False)
            with torch.inference_mode(False), torch.enable_grad(), _eager():
                yield
    finally:
        restore(parameters)
        for buffer, copy in buffers:
            # its version does not tell: batch_norm updates running statistics without counting
            if not torch.equal(buffer, copy):
                with torch.no_grad():
                    buffer.copy_(copy)


@contextlib.contextmanager
def _in_mode(model: nn.Module, *, train: bool) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(True)  # on the way from which to eval mode caches are emptied
        model.train(train)
        yield
    finally:
        for module, mode in modes:  # each before those within it
            if module.training != mode:
                module.train(mode)  # which may undo what another mode had done to weights
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def frozen(module: object) -> Iterator[None]:
    """Let no parameter of a module ask for a gradient in a `with` block; anything else has none."""
    parameters = list(module.parameters()) if isinstance(module, nn.Module) else []
    needs_grad = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in zip(parameters, needs_grad, strict=True):
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def _forgetting(model: nn.Module) -> Iterator[None]:
    """Let tensors that a forward leaves in modules be gone before the next, and in the end.

    They are attributes, buffers and what is in dictionaries of tensors; what was there stays.
    """
    caches = _held(
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if type(value) is dict and name not in _MEMBERS
        if all(inner is None or isinstance(inner, Tensor) for inner in value.values())
    )
    attributes = _held(vars(module) for module in model.modules())

    def forget(*_: object) -> None:
        for cache, before in _changed(caches):
            cache.clear()
            cache.update(before)
        for own, before in _changed(attributes):
            for name, value in list(own.items()):
                was = before.get(name)
                if value is was or not (_holds_tensors(value) or _holds_tensors(was)):
                    continue
                if name in before:
                    own[name] = was
                else:
                    del own[name]

    with contextlib.ExitStack() as left:
        left.callback(forget)
        left.callback(model.register_forward_pre_hook(forget).remove)
        yield


_Contents = tuple[dict[str, Any], dict[str, Any], list[int]]


def _held(dictionaries: Iterable[dict[str, Any]]) -> list[_Contents]:
    """Each dictionary with what it holds now, and the ids of that."""
    return [(own, dict(own), list(map(id, own.values()))) for own in dictionaries]


def _changed(held: list[_Contents]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Those that hold something else, with what they held; told fast, as each forward asks."""
    return [(own, before) for own, before, ids in held if list(map(id, own.values())) != ids]


def _holds_tensors(value: object) -> bool:
    inner = value.values() if isinstance(value, dict) else value
    some = inner if isinstance(inner, (list, tuple, ValuesView)) else (value,)
    return any(isinstance(each, Tensor) for each in some)


def _eager() -> contextlib.AbstractContextManager[object]:
    # compiled code does not show its calls; where dynamo was never loaded there is none
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
