"""The memory of tuned parameters, which is row-major while they are tuned, as kernels expect it.

Positions count the elements of a weight in row-major order, whatever its memory format. A weight in
channels-last format is therefore copied into row-major order when it gets a delta, and into its own
format when it is plain again. Any other layout is refused: it may share its memory with others.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def layout_problem(name: str, target: Tensor) -> str:
    """Why the memory of a tensor cannot be made row-major; empty when it can."""
    if target.is_contiguous() or format_of(target) is not torch.contiguous_format:
        return ""
    return (
        f"{name} must be contiguous (or channels-last), got shape {tuple(target.shape)} with "
        f"strides {target.stride()}: replace it by a contiguous copy first"
    )


def format_of(target: Tensor) -> torch.memory_format:
    """Channels-last where a tensor has that format and is not row-major as well."""
    channels_last = _CHANNELS_LAST.get(target.dim())
    if channels_last is None or target.is_contiguous():
        return torch.contiguous_format
    is_last = target.is_contiguous(memory_format=channels_last)
    return channels_last if is_last else torch.contiguous_format


def name_of_format(memory_format: torch.memory_format | str) -> str:
    """A format by its name, as `torch.save` writes no memory format; of a name that itself."""
    return str(memory_format).removeprefix("torch.")


def format_named(name: str) -> torch.memory_format:
    """What `name_of_format` has named."""
    named: torch.memory_format = getattr(torch, name)
    return named


def put_into(target: Tensor, memory_format: torch.memory_format) -> None:
    """Give a parameter memory of another format, with the same values; the object stays."""
    if not target.is_contiguous(memory_format=memory_format):
        target.data = target.data.contiguous(memory_format=memory_format)
