"""Borrowing a model: whatever is switched for a measurement is put back, also after an error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def borrowed(model: nn.Module, *, train: bool) -> Iterator[None]:
    """Freeze every parameter, set the mode, and compute gradients eagerly, for a `with` block.

    Mode, `requires_grad` and buffers are put back afterwards; `.grad` and hooks are not touched.
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
        model.train(train)
        with torch.inference_mode(False), torch.enable_grad(), _eager():
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


def _eager() -> contextlib.AbstractContextManager[object]:
    # compiled code does not show its calls; where dynamo was never loaded there is none
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
