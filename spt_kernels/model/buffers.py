"""The persistent buffers of a model: what forwards keep in it, such as running statistics."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def persistent_buffers(model: nn.Module) -> dict[str, Tensor | None]:
    """Name -> buffer that a state dict has or, being None as yet, would have; the very tensors."""
    return {
        f"{prefix}.{local}" if prefix else local: buffer
        for prefix, module in model.named_modules()
        for local, buffer in module._buffers.items()
        if local not in module._non_persistent_buffers_set
    }


def copied(buffers: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The same values in memory of their own."""
    return {name: None if b is None else b.detach().clone() for name, b in buffers.items()}


def set_buffer(module: nn.Module, local: str, value: Tensor | None) -> None:
    """Give a buffer of a module another value, where it lies if it can stay there.

    Args:
        module: has the buffer, which may be None.
        local: its name in the module.
        value: copied, onto the device of the buffer and in its dtype if both are floating.
    """
    now = module._buffers[local]
    if now is not None and value is not None and _may_hold(now, value):
        now.copy_(value)
        return
    device = None if now is None else now.device
    module._buffers[local] = None if value is None else value.detach().clone().to(device)


def _may_hold(buffer: Tensor, value: Tensor) -> bool:
    both_floating = buffer.is_floating_point() and value.is_floating_point()
    return buffer.shape == value.shape and (buffer.dtype == value.dtype or both_floating)
