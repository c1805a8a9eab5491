"""Borrowing a model: whatever is switched for a measurement is put back, also after an error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def borrowed(model: nn.Module, *, train: bool) -> Iterator[None]:
    """Freeze every parameter, set the mode, and compute gradients eagerly, for a `with` block.

    Mode, `requires_grad` and buffers are put back afterwards; `.grad` and hooks are not touched.
    What a forward keeps in a dictionary of its module, as LeViT does with biases in eval mode, is
    forgotten before the next one: it would lead into a graph that a backward has freed.
    """
    modes = [(module, module.training) for module in model.modules()]
    needs_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        for parameter, _ in needs_grad:
            parameter.requires_grad_(False)
        model.train(True)  # on the way from which to eval mode such caches are emptied
        model.train(train)
        with torch.inference_mode(False), torch.enable_grad(), _eager(), _forgetting(model):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in needs_grad:
            parameter.requires_grad_(flag)
        for module, name, buffer, copy in buffers:
            # its version does not tell: batch_norm updates running statistics without counting
            if not torch.equal(buffer, copy):
                with torch.no_grad():
                    buffer.copy_(copy)
            module._buffers[name] = buffer


@contextlib.contextmanager
def _forgetting(model: nn.Module) -> Iterator[None]:
    """Let what a forward puts into dictionaries of tensors be gone before the next, and in the end.

    They are caches: what is in one from before stays.
    """
    caches = [
        (value, dict(value))
        for module in model.modules()
        for name, value in vars(module).items()
        if type(value) is dict and not name.startswith("_")
        if all(isinstance(inner, Tensor) for inner in value.values())
    ]

    def forget(*_: object) -> None:
        for cache, before in caches:
            cache.clear()
            cache.update(before)

    with contextlib.ExitStack() as left:
        if caches:
            left.callback(forget)
            left.callback(model.register_forward_pre_hook(forget).remove)
        yield


def _eager() -> contextlib.AbstractContextManager[object]:
    # compiled code does not show its calls; where dynamo was never loaded there is none
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
